"""Rollout workers apart from the learner: real processes, killed on the way, and the files between them."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llm_dqn import checkpoint, exchange
from llm_dqn.errors import RunError, StepFailed
from llm_dqn.processes import Processes
from llm_dqn.recipe import load_recipe
from llm_dqn.rewards import load_reward
from llm_dqn.shared_folder import SharedFolder
from llm_dqn.types import Episode
from tests.faults.runs import start, wait_for

EPISODE = Episode(
    prompt="问候：",
    completion="ab",
    prompt_ids=torch.tensor([5, 6, 7]),
    completion_ids=torch.tensor([1, 2]),
    ref_logprobs=torch.tensor([-0.5, -0.25]),
    behaviour_logprobs=torch.tensor([-0.5, -1.0]),
    ended="eos",
    reward=2.5,
    rewards={"characters": 2.5},
)


def write(folder: Path, number: int, version: int = 0, run: str = "r", worker: str = "w", scored: int = 1) -> Path:
    episode = replace(EPISODE, policy_version=version)
    return exchange.write_segment(folder, worker, number, scored, [episode] * scored, run, b"voc")


def shared(folder: Path, max_age: int | None = None, timeout: float = 0.3) -> SharedFolder:
    said: list[str] = []
    place = SharedFolder(
        folder / "s", folder / "run", Processes(0, 1), b"voc", max_age=max_age, timeout=timeout, say=said.append
    )
    place.open()
    place.run = "r"
    return place


def never() -> bool:
    return False


# --- the files --------------------------------------------------------------------------------------------------------


def test_a_segment_that_is_taken_while_others_look_is_not_there(tmp_path, monkeypatch):
    gone, kept = write(tmp_path, 0), write(tmp_path, 1)
    real = os.scandir

    def slowly(folder):
        entries = list(real(folder))
        gone.unlink()
        return entries

    monkeypatch.setattr(exchange.os, "scandir", slowly)
    assert [segment.path for segment in exchange.segments(tmp_path)] == [kept]


def test_a_segment_comes_back_as_it_was(tmp_path):
    other = replace(EPISODE, completion="c", completion_ids=torch.tensor([9]), ended="length", policy_version=3)
    other = replace(other, ref_logprobs=torch.tensor([-3.0]), behaviour_logprobs=torch.tensor([-2.0]), reward=-1.0)
    exchange.write_segment(tmp_path, "host-1", 0, 3, [EPISODE, other], "run", b"voc")
    (segment,) = exchange.segments(tmp_path)
    assert (segment.worker, segment.number, segment.scored) == ("host-1", 0, 3)
    content = exchange.read_segment(segment)
    assert (content.run, content.vocabulary) == ("run", b"voc".hex())
    for episode, wanted in zip(content.episodes, (EPISODE, other), strict=True):
        for name, value in vars(wanted).items():
            found = getattr(episode, name)
            assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, name


def test_a_segment_of_which_nothing_was_paid_is_counted(tmp_path):
    place = shared(tmp_path)
    exchange.write_segment(place.folder, "w", 0, 4, [], "r", b"voc")
    taken = place.take(0, 4, never)
    assert (taken.scored, taken.episodes) == (4, [])


def test_torn_and_changed_files_are_never_read(tmp_path):
    """A half-written one has no segment's name; one that changed is told and left out; the next ones are taken."""
    place = shared(tmp_path)
    whole = write(place.folder, 0)
    (place.folder / ".w.tmp").write_bytes(whole.read_bytes()[:100])
    content = bytearray(write(place.folder, 1).read_bytes())
    content[-1] ^= 1
    damaged = exchange.segments(place.folder)[1]
    damaged.path.write_bytes(content)
    with pytest.raises(RunError, match="does not match the checksum"):
        exchange.read_segment(damaged)
    write(place.folder, 2)
    taken = place.take(0, 3, never)
    assert taken.scored == len(taken.episodes) == 2 and place.damaged == 1


def test_each_segment_is_taken_once_also_after_going_on(tmp_path):
    """In a worker's order; one that appears before its forerunner waits; what a checkpoint knows is not taken again."""
    place = shared(tmp_path)
    write(place.folder, 1)
    with pytest.raises(StepFailed, match="no collector wrote into"):
        place.take(0, 1, never)
    write(place.folder, 0)
    write(place.folder, 0, worker="other")
    assert place.take(0, 2, never).scored == 2
    again = shared(tmp_path)
    again.load_state(json.loads(json.dumps(place.state())))
    assert again.take(0, 9, never).scored == 1 and again.next == {"w": 2, "other": 1}
    assert exchange.read_taken(tmp_path / "run" / "policy") == {"w": 2, "other": 1}
    assert again.take(0, 9, lambda: True).scored == 0


def test_what_is_too_old_or_of_another_run_is_refused_and_counted(tmp_path):
    place = shared(tmp_path, max_age=8)
    write(place.folder, 0, version=1)
    write(place.folder, 1, version=12)
    write(place.folder, 2, version=30)  # by a learner that was killed and went on from an older checkpoint
    write(place.folder, 3, run="another")
    taken = place.take(20, 4, never)
    assert (taken.ages, taken.scored) == ([8, 0], 3) and (place.refused, place.foreign) == (1, 1)


# --- the processes ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_collectors_and_a_learner_of_which_two_are_killed(tmp_path):
    """One collector dies, then the learner, which goes on: the budget is met, and every episode is whole and once."""
    run, into = tmp_path / "run", tmp_path / "segments"
    settings = [f"train.output_dir={run}", f"rollout.collectors={into}", "rollout.prompts_per_collect=32"]
    settings += ["rollout.publish_steps=2", "replay.max_age=64", "replay.learning_starts=32", "train.max_steps=1000"]
    settings += ["train.max_scored_completions=256", "train.save_steps=4", "train.logging_steps=4"]
    settings += ["train.eval_steps=0", "train.final_eval_prompts=7", "rollout.epsilon.steps=60"]
    learner = start("llm_dqn", "train", "hello_world", *settings)
    workers = [start("llm_dqn", "collect", "hello_world", "--into", str(into), *settings) for _ in (0, 1)]
    try:
        wait_for(lambda: {s.worker for s in exchange.segments(into)}.__len__() == 2, learner)
        workers[0].kill()
        wait_for(lambda: len(checkpoint.folders(run / "checkpoints")) > 1, learner)
        learner.kill()
        learner.communicate()
        learner = start("llm_dqn", "train", "hello_world", *settings, "--resume")
        printed = learner.communicate(timeout=200)[0]
        assert learner.returncode == 0, printed[-3000:]
        assert "does not repeat bit for bit" in printed
        assert workers[1].communicate(timeout=30)[0].endswith(f"completions scored into {into}\n")
        assert workers[1].returncode == 0
    finally:
        for process in (learner, *workers):
            process.kill()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["scored_completions"] == 256 and lines[-1]["replay/staleness"] <= 64
    newest, _ = checkpoint.newest(run / "checkpoints")
    state, _ = checkpoint.read(newest)
    taken = [s for s in exchange.segments(into) if s.number < state["shared"]["next"].get(s.worker, 0)]
    assert sum(segment.scored for segment in taken) == 256 and state["shared"]["damaged"] == 0
    (replay,) = checkpoint.read_replay(newest)
    episodes = [e for segment in taken for e in exchange.read_segment(segment).episodes]
    assert len(episodes) - state["shared"]["refused"] == len(replay["rewards"])
    reward = load_reward(load_recipe("hello_world").reward.funcs[0])
    said = reward(prompts=[e.prompt for e in episodes], completions=[e.completion for e in episodes])
    assert said == [episode.reward for episode in episodes]  # no text parted from its reward
    kept = {tuple(row) for row in zip(replay["versions"].tolist(), replay["rewards"].tolist(), strict=True)}
    assert kept <= {(episode.policy_version, episode.reward) for episode in episodes}
    assert len({episode.policy_version for episode in episodes}) > 1  # collectors followed the policy
    report = json.loads((run / "evaluation.json").read_text())
    assert report["tuned"]["kl"] > 0.01  # it learned from them
