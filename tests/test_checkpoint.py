"""What a checkpoint holds, what it costs to write the next one, and which of them stay."""

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from llm_dqn import checkpoint, saver
from llm_dqn.errors import RunError, UserError
from llm_dqn.replay import PrefixReplay
from tests.checkpoints import SmallRun, files, names


def test_the_replay_can_be_read_alone(trained_run):
    newest, _ = checkpoint.newest(trained_run / "checkpoints")
    (arrays,) = checkpoint.read_replay(newest)
    replay = PrefixReplay(10_000)
    replay.load_arrays(arrays)
    assert len(replay) == replay.added == len(arrays["rewards"]) > 0
    assert arrays["lengths"].sum() == len(arrays["tokens"])


def test_a_manifest_says_what_lies_there(trained_run):
    newest, _ = checkpoint.newest(trained_run / "checkpoints")
    manifest = json.loads((newest / "manifest.json").read_text())
    assert manifest["format_version"] == checkpoint.FORMAT_VERSION and manifest["step"] == 48
    assert manifest["evaluation"].keys() == set(checkpoint.MEASURES) and len(manifest["recipe_sha256"]) == 64
    for name, facts in manifest["files"].items():
        assert (newest / name).stat().st_size == facts["bytes"]
        assert checkpoint.sha256(newest / name) == facts["sha256"]
    assert manifest["files"].keys() == {file.name for file in newest.iterdir()} - {"manifest.json"}


def test_full_segments_are_linked_and_the_rest_is_written(tmp_path, monkeypatch):
    run = SmallRun(tmp_path)
    run.collect(10)  # two full segments and a half one
    first = run.save(1)
    run.collect(4)
    summed = []
    monkeypatch.setattr(
        checkpoint, "sha256", lambda file, real=checkpoint.sha256: summed.append(file.name) or real(file)
    )
    second = run.save(2)
    segments = [f"replay-00000-segment-{number:06d}.safetensors" for number in range(4)]
    assert [name for name in segments if (second / name).stat().st_nlink == 2] == segments[:2]
    assert not set(segments[:2]) & set(summed) and {segments[2], segments[3]} <= set(summed)
    monkeypatch.undo()
    assert checkpoint.verify(first) is None and checkpoint.verify(second) is None


def test_linked_and_copied_and_rewritten_segments_are_the_same(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(95, "Operation not supported")

    made = {}
    for way in ("linked", "copied", "rewritten"):
        run = SmallRun(tmp_path / way, keep=1)
        run.collect(10)
        first = run.save(1)
        if way == "copied":
            monkeypatch.setattr(os, "link", refused)
        elif way == "rewritten":
            for file in first.glob("*-segment-*"):
                file.unlink()
        run.collect(2)
        made[way] = files(run.save(2))
        monkeypatch.undo()
    assert made["linked"] == made["copied"] == made["rewritten"]


def test_a_resumed_run_writes_what_the_first_would_have_written(tmp_path):
    whole, cut = SmallRun(tmp_path / "whole", capacity=9), SmallRun(tmp_path / "cut", capacity=9)
    for run in (whole, cut):
        run.collect(11)
        run.replay.update_priorities(torch.tensor([3]), torch.tensor([0.25]))
    folder = cut.save(1)
    whole.save(1)
    assert cut.goes_on_from(folder)["step"] == 1
    for step, count in ((2, 1), (3, 5), (4, 20)):
        for run in (whole, cut):
            run.collect(count)
        assert files(whole.save(step)) == files(cut.save(step)), step
    kept = {name for name in files(whole.root / "step-000004") if "segment" in name}
    assert len(kept) == 3  # 37 episodes were added and 9 are left: those of the others are gone


@pytest.mark.parametrize("capacity", [5, 30])
def test_another_capacity_never_links_what_became_another_segment(tmp_path, capacity):
    """All episodes have one length, so segments that were packed anew have the same names and sizes as before."""
    run = SmallRun(tmp_path, capacity=12)
    run.collect(18)
    folder = run.save(1)
    run.replay = PrefixReplay(capacity)
    run.goes_on_from(folder)
    newest = sorted(run.replay.rewards.tolist())
    assert newest == [float(number) for number in range(18 - min(12, capacity), 18)]
    (arrays,) = checkpoint.read_replay(run.save(2))
    assert sorted(arrays["rewards"].tolist()) == newest
    first_action = arrays["tokens"][arrays["prompt_lengths"] + np.cumsum(arrays["lengths"]) - arrays["lengths"]]
    assert first_action.tolist() == arrays["rewards"].tolist()  # every reward still has its own tokens


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    run, go, real = SmallRun(tmp_path), threading.Event(), saver.save_file

    def slow(*given):
        assert go.wait(20)
        real(*given)

    monkeypatch.setattr(saver, "save_file", slow)
    run.collect(6)
    expected = {name: tensor.clone() for name, tensor in run.parts()["replay-00000"].items()}
    folder = run.save(1, beside=True)
    assert not folder.exists()
    run.collect(200)  # the ring goes round
    run.replay.update_priorities(torch.arange(50), torch.rand(50))
    run.saver.look()  # nothing went wrong so far
    go.set()
    run.saver.finish()
    _, parts = checkpoint.read(folder)
    assert parts["replay-00000"].keys() == expected.keys()
    assert all(torch.equal(parts["replay-00000"][name], tensor) for name, tensor in expected.items())


def test_an_error_beside_the_training_is_raised_there(tmp_path, monkeypatch):
    run = SmallRun(tmp_path)
    run.collect(6)
    good = run.save(1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver, "save_file", full)
    run.save(2, beside=True)
    run.saver.wait()
    with pytest.raises(
        RunError, match=r"step-000002 could not be written .*No space left.*; step-000001, the one before"
    ):
        run.saver.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001"] and checkpoint.verify(good) is None
    monkeypatch.undo()
    run.save(2)  # it can be tried again
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_a_step_is_saved_once(tmp_path):
    run = SmallRun(tmp_path)
    run.collect(3)
    run.save(1, beside=True)
    run.saver.finish()
    before = files(tmp_path / "step-000001")
    run.save(1)
    assert files(tmp_path / "step-000001") == before


@pytest.mark.parametrize(
    ("keep", "scores", "left"),
    [
        (2, {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}, [3, 4]),
        (2, {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.4}, [2, 4]),
        (3, {1: 0.9, 2: 0.2, 3: 0.3, 4: 0.4}, [1, 3, 4]),
        (1, {1: 0.1, 2: 0.9, 3: 0.3}, [2, 3]),
        (1, {1: 0.1, 2: 0.2}, [2]),
        (2, {1: 0.5, 2: 0.5, 3: 0.5, 4: 0.4}, [3, 4]),
        (2, {1: None, 2: None, 3: None}, [2, 3]),
    ],
    ids=str,
)
def test_the_newest_and_the_best_stay(tmp_path, keep, scores, left):
    run = SmallRun(tmp_path, keep=keep)
    run.collect(6)
    for step, score in scores.items():
        run.save(step, **({} if score is None else {"reward_greedy": score, "reward": 0.0}))
    assert names(tmp_path) == [f"step-{step:06d}" for step in left]
    assert all(checkpoint.verify(folder) is None for folder in checkpoint.folders(tmp_path))


def test_what_a_killed_run_could_no_longer_delete_goes_with_the_next(tmp_path, monkeypatch):
    """Killed after the last checkpoint of all was complete and before the oldest was deleted."""
    run = SmallRun(tmp_path, keep=2)
    monkeypatch.setattr(checkpoint, "prune", lambda root, keep: None)
    for step in (1, 2, 3):
        run.save(step)
    monkeypatch.undo()
    run.goes_on_from(tmp_path / "step-000003")
    run.save(3)
    assert names(tmp_path) == ["step-000002", "step-000003"]


def test_sampled_rewards_decide_between_equal_greedy_ones(tmp_path):
    run = SmallRun(tmp_path, keep=1)
    for step, sampled in enumerate((0.1, 0.8, 0.3), start=1):
        run.save(step, reward_greedy=1.0, reward=sampled)
    assert names(tmp_path) == ["step-000002", "step-000003"]


def test_a_limit_below_one_is_refused(tmp_path):
    with pytest.raises(UserError, match="save_total_limit must be at least 1, got 0"):
        checkpoint.prune(tmp_path, 0)


def test_steps_beyond_a_million_are_the_newest(tmp_path):
    run = SmallRun(tmp_path)
    for step in (999_999, 1_000_000):
        run.save(step)
    assert checkpoint.newest(tmp_path) == (tmp_path / "step-1000000", [])


def test_later_checkpoints_are_set_aside_not_overwritten(tmp_path):
    run = SmallRun(tmp_path)
    for step in (1, 2, 3):
        run.save(step)
    third = files(tmp_path / "step-000003")
    moved = checkpoint.set_aside(tmp_path, after=1)
    assert [path.name for path in moved] == ["step-000003.set-aside-1", "step-000002.set-aside-1"]
    assert files(moved[0]) == third and names(tmp_path) == ["step-000001"]
    run.goes_on_from(tmp_path / "step-000001")
    run.save(3)
    assert checkpoint.set_aside(tmp_path, after=1)[0].name == "step-000003.set-aside-2"


def test_an_empty_replay_can_be_saved(tmp_path):
    run = SmallRun(tmp_path)
    run.goes_on_from(run.save(1))
    assert len(run.replay) == 0


def test_processes_write_one_checkpoint_together(tmp_path, monkeypatch):
    """Two savers in two threads that meet as processes do; what fails on one is raised on both."""

    def together(work) -> list[BaseException | None]:
        meeting, shared = threading.Barrier(2, timeout=20), [None, None]

        def gather_of(rank):
            def gather(value):
                shared[rank] = value
                meeting.wait()
                everyone = list(shared)
                meeting.wait()
                return everyone

            return gather

        ended: list[BaseException | None] = [None, None]

        def process(rank):
            try:
                work(rank, saver.Saver(tmp_path, None, rank, gather_of(rank)))
            except BaseException as error:
                ended[rank] = error

        threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
        [thread.start() for thread in threads]
        [thread.join(20) for thread in threads]
        return ended

    def save(rank, of_this_rank, step=1):
        run = SmallRun(tmp_path)
        run.collect(5 + rank)
        parts = {k.replace("00000", f"{rank:05d}"): v for k, v in run.parts().items()}
        of_this_rank.save(step, {"step": step}, parts, {}, beside=False)

    assert together(save) == [None, None]
    assert [len(arrays["rewards"]) for arrays in checkpoint.read_replay(tmp_path / "step-000001")] == [5, 6]

    real = saver.save_file

    def full_for_the_second(tensors, file: Path):
        if "replay-00001" in file.name:
            raise OSError(28, "No space left on device")
        real(tensors, file)

    monkeypatch.setattr(saver, "save_file", full_for_the_second)
    errors = together(lambda rank, mine: save(rank, mine, step=2))
    assert [type(error) for error in errors] == [RunError, RunError] and str(errors[0]) == str(errors[1])
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
