"""Checkpoints and stored episodes that were cut short, damaged, planted or written by another version."""

import errno
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_dqn import checkpoint, cli
from llm_dqn.errors import RunError, UserError
from llm_dqn.replay import PrefixReplay, prioritized, success_biased, uniform
from tests.checkpoints import SmallRun, files, flip_a_bit, names
from tests.networks import episode

NETWORK, OPTIMIZER, STATE = "network.safetensors", "optimizer.safetensors", "state.json"
COLUMNS, FULL, LAST = (f"replay-00000{rest}.safetensors" for rest in ("", "-segment-000000", "-segment-000001"))
EVERY_FILE = (NETWORK, OPTIMIZER, COLUMNS, FULL, LAST, STATE)


@pytest.fixture
def run(tmp_path: Path) -> SmallRun:
    """Three checkpoints, after each of which some episodes were added: a full segment and a growing one."""
    run = SmallRun(tmp_path / "checkpoints")
    run.collect(5)
    for step in (1, 2, 3):
        run.save(step)
        run.collect(1)
    return run


def newest_of(run: SmallRun) -> Path:
    return run.root / "step-000003"


def refused(folder: Path) -> str:
    """What is said when a checkpoint is asked for by name."""
    with pytest.raises(RunError) as error:
        checkpoint.read(folder)
    assert str(error.value).startswith(f"checkpoint {folder} is damaged: ")
    return str(error.value)


def passed_over(run: SmallRun) -> str:
    """What is said when the newest complete one is asked for, which must be the one before."""
    folder, damaged = checkpoint.newest(run.root)
    assert folder == run.root / "step-000002" and len(damaged) == 1 and damaged[0].startswith("step-000003: ")
    return damaged[0]


# --- a run of the command line on a copy of a trained one -----------------------------------------------------------


class Run:
    """`llm-dqn train --resume` on a copy of a run that has checkpoints after steps 32 and 48."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capture = folder, capture
        self.newest, self.before = (folder / "checkpoints" / f"step-0000{step}" for step in (48, 32))

    def resume(self, *more: str) -> tuple[int, str, str]:
        """(exit code, what was said, what was said on stderr)"""
        settings = ["max_steps=49", "save_steps=0", "logging_steps=8", "eval_steps=16", "final_eval_prompts=2"]
        overrides = [f"train.{setting}" for setting in (f"output_dir={self.folder}", *settings)]
        code = 0
        try:
            cli.main(["train", "hello_world", *overrides, "--resume", *more])
        except SystemExit as end:
            code = int(end.code or 0)
        said = self.capture.readouterr()
        return code, said.out, said.err


@pytest.fixture
def trained(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Run(shutil.copytree(trained_run, tmp_path / "run"), capsys)
    for number, handler in before.items():
        signal.signal(number, handler)


# --- 1: killed while saving -----------------------------------------------------------------------------------------


def _save_for_ever(run: SmallRun, told: int) -> None:
    step = checkpoint.step_of(checkpoint.newest(run.root)[0] or Path("step-000000"))
    while True:
        step += 1
        run.collect(3)
        run.save(step)
        os.write(told, b"%d\n" % step)


def test_case_01_killed_while_saving(tmp_path: Path) -> None:
    """Of 20 `kill -9` while saving each leaves the last finished checkpoint whole; beginnings are reported, ignored."""
    run, rng, done, torn = SmallRun(tmp_path / "checkpoints", capacity=20, keep=2), random.Random(0), 0, 0
    for _ in range(20):
        reading, telling = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                _save_for_ever(run, telling)
            finally:
                os._exit(1)
        os.close(telling)
        first = os.read(reading, 100)  # the child is at work
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(reading, "rb") as rest:
            done = int((first + rest.read()).split()[-1])
        newest, damaged = checkpoint.newest(run.root)
        assert newest is not None and not damaged and checkpoint.step_of(newest) in (done, done + 1)
        torn += len(checkpoint.unfinished(run.root))
        assert {path.name for path in run.root.iterdir()} == {
            *names(run.root),
            *(path.name for path in checkpoint.unfinished(run.root)),
        }
        run.goes_on_from(newest)
        assert len(run.replay) == min(20, run.replay.added) > 0
    assert torn > 0, "no kill fell into a save: the test has proved nothing"


def test_case_01_the_run_says_what_was_not_finished(trained: Run) -> None:
    """A folder that was never finished is named when the run goes on, and gone after the next checkpoint."""
    shutil.copytree(trained.newest, trained.newest.with_name("step-000064.tmp"))
    code, said, _ = trained.resume()
    assert code == 0 and "step-000064.tmp was not finished when its run ended: ignored" in said
    assert f"continuing from {trained.newest}" in said
    assert not list((trained.folder / "checkpoints").glob("*.tmp"))


# --- 4, 5: damaged files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY_FILE)
@pytest.mark.parametrize("at", [0, 0.5, -1], ids=["first", "middle", "last"])
def test_case_04_a_flipped_bit(run: SmallRun, name: str, at: float) -> None:
    """Found by the checksum, the file named; the checkpoint before is taken, one that was named is refused."""
    file = newest_of(run) / name
    flip_a_bit(file, at=int(at if at <= 0 else at * file.stat().st_size))
    assert f"{name} does not match its checksum" in passed_over(run)
    assert f"{name} does not match its checksum" in refused(newest_of(run))


def test_case_04_falls_back_and_says_so(trained: Run) -> None:
    """`--resume` names the damaged file, goes on from the checkpoint before and sets the damaged one aside."""
    flip_a_bit(trained.newest / OPTIMIZER)
    code, said, _ = trained.resume()
    assert code == 0
    assert f"skipping a damaged checkpoint: step-000048: {OPTIMIZER} does not match its checksum" in said
    assert f"continuing from {trained.before}" in said and "step-000048.set-aside-1" in said
    lines = [json.loads(line)["step"] for line in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == [8, 16, 24, 32, 40, 48, 49]
    assert checkpoint.verify(trained.folder / "checkpoints" / "step-000049") is None


def test_case_04_a_named_one_is_refused(trained: Run) -> None:
    """`--resume --checkpoint NAME` takes no other one: exit code 1 where it is damaged, 2 where it is not there."""
    flip_a_bit(trained.newest / NETWORK)
    before = files(trained.newest)
    code, _, said = trained.resume("--checkpoint", "step-000048")
    assert code == 1 and f"{NETWORK} does not match its checksum" in said and files(trained.newest) == before
    code, _, said = trained.resume("--checkpoint", "step-000040")
    assert code == 2 and "step-000040: not among the checkpoints" in said and "step-000048, step-000032" in said
    code, _, said = trained.resume("--checkpoint", "../../elsewhere/step-000032")
    assert code == 2 and "not among the checkpoints" in said
    code, said, _ = trained.resume("--checkpoint", "step-000032")
    assert code == 0 and f"continuing from {trained.before}" in said


def test_case_04_nothing_is_begun_anew_when_all_are_damaged(trained: Run) -> None:
    """Exit code 1 with every damaged file named, and the folder stays as it was."""
    for folder in (trained.newest, trained.before):
        (folder / NETWORK).unlink()
    code, _, said = trained.resume()
    assert code == 1 and said.count(f"{NETWORK} is missing") == 2 and trained.newest.is_dir()
    assert "without --resume the run begins anew" in said


@pytest.mark.parametrize("name", EVERY_FILE)
@pytest.mark.parametrize("left", [0, 7, -1])
def test_case_05_truncated(run: SmallRun, name: str, left: int) -> None:
    """Found by its size, the file named; the checkpoint before is taken, one that was named is refused."""
    file = newest_of(run) / name
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:left])
    says = f"{name} has {len(data[:left])} bytes instead of {len(data)}"
    assert says in passed_over(run) and says in refused(newest_of(run))


def test_case_05_missing(run: SmallRun) -> None:
    """All files that are missing are listed at once."""
    for name in (NETWORK, FULL, STATE):
        (newest_of(run) / name).unlink()
    says = f"{NETWORK}, {FULL}, {STATE} are missing"
    assert says in passed_over(run) and says in refused(newest_of(run))


def test_case_05_no_manifest_or_a_broken_one(run: SmallRun) -> None:
    """Without a manifest that can be read nothing is vouched for."""
    file = newest_of(run) / "manifest.json"
    text = file.read_text()
    for content in (text[: len(text) // 2], "", "[]", "{}", "[" * 100_000, '{"format_version": 3}', "\x00"):
        file.write_text(content)
        assert "manifest.json " in passed_over(run) and "manifest.json " in refused(newest_of(run))
    file.unlink()
    assert "manifest.json is missing" in passed_over(run)


def test_case_05_a_file_too_many(run: SmallRun) -> None:
    """What the manifest does not list is never read, and named with the cure."""
    save_file({"weights": torch.ones(8)}, newest_of(run) / "network-2.safetensors")
    assert "network-2.safetensors is not in manifest.json; remove it" in passed_over(run)
    (newest_of(run) / "network-2.safetensors").rename(newest_of(run) / ".hidden")  # as file systems leave behind
    assert checkpoint.verify(newest_of(run)) is None and set(checkpoint.read(newest_of(run))[1]) == {
        "network",
        "optimizer",
        "replay-00000",
    }


# --- 6: the disk is full --------------------------------------------------------------------------------------------


def _whole_after(run: SmallRun, error: pytest.ExceptionInfo[RunError]) -> None:
    assert "step-000002 could not be written (" in str(error.value)
    assert str(error.value).endswith("step-000001, the one before it, is whole")
    assert [path.name for path in run.root.iterdir()] == ["step-000001"]
    assert checkpoint.verify(run.root / "step-000001") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small tmpfs")
@pytest.mark.parametrize("beside", [False, True])
def test_case_06_a_full_tmpfs(tmp_path: Path, beside: bool) -> None:
    """The checkpoint before stays whole, the beginning of the new one is removed, one sentence says why."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        run = SmallRun(disk / "checkpoints")
        run.collect(5)
        run.save(1)
        run.weights = torch.zeros(100_000)
        with pytest.raises(RunError, match=r"No space left on device|os error 28") as error:
            run.save(2, beside)
            run.saver.finish()
        _whole_after(run, error)
        run.weights = torch.zeros(8)  # once there is room again the run can be saved
        assert checkpoint.verify(run.save(3)) is None
    finally:
        subprocess.run(["umount", disk], check=True)


def test_case_06_the_run_ends_with_one_sentence(tiny_llama_path: str, tmp_path: Path) -> None:
    """Exit code 1, no traceback; `--resume` then goes on from the checkpoint before."""
    (tmp_path / "judge.py").write_text(
        "import pathlib, resource, time\n"
        f"whole, calls = pathlib.Path({str(tmp_path / 'run' / 'checkpoints' / 'step-000004')!r}), []\n"
        "def judge(completions, **columns):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3:  # once the save that goes on beside has ended no file may have more than 20 kB\n"
        "        for _ in range(600):\n"
        "            if whole.exists():\n"
        "                break\n"
        "            time.sleep(0.1)\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"the film {i}"}) + "\n" for i in range(16)))
    settings = {
        "model.model_name_or_path": tiny_llama_path,
        "data.train": tmp_path / "prompts.jsonl",
        "rollout.max_completion_length": 4,
        "rollout.prompts_per_collect": 8,
        "reward.funcs": f"['{tmp_path}/judge.py:judge']",
        "replay.learning_starts": 8,
        "replay.updates_per_collect": 2,
        "train.output_dir": tmp_path / "run",
        "train.max_steps": 9,
        "train.save_steps": 2,
        "train.eval_steps": 0,
        "train.final_eval_prompts": 2,
        "train.per_device_train_batch_size": 4,
    }
    arguments = ["train", "hello_world", *(f"{key}={value}" for key, value in settings.items())]
    code, said = _in_a_child(lambda: cli.main(arguments), tmp_path / "said")
    assert code == 1 and "Traceback" not in said
    last = [line for line in said.splitlines() if line.startswith("the run failed")]
    assert (
        len(last) == 1 and "could not be written" in last[0] and "step-000004, the one before it, is whole" in last[0]
    )
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))
    newest, damaged = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None and newest.name == "step-000004" and not damaged


def _in_a_child(work: Callable[[], None], output: Path) -> tuple[int, str]:
    """(exit code, what was written) of a forked process, whose limits are its own."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            with open(1, "w", closefd=False) as out, open(2, "w", closefd=False) as err:
                sys.stdout, sys.stderr = out, err
                try:
                    work()
                    code = 0
                except SystemExit as end:
                    code = int(end.code or 0)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output.read_text()


# --- 7: save_total_limit --------------------------------------------------------------------------------------------


def test_case_07_the_old_goes_only_when_the_new_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that fails at its very last step deletes nothing; the only complete and the best one are never deleted."""
    run = SmallRun(tmp_path, keep=1)
    run.save(1, reward_greedy=0.9, reward=0.5)
    real = os.replace

    def fails(source: Path, target: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(RunError, match="Input/output error"):
        run.save(2, reward_greedy=0.1, reward=0.5)
    assert names(tmp_path) == ["step-000001"] and checkpoint.verify(tmp_path / "step-000001") is None
    monkeypatch.setattr(os, "replace", real)
    run.save(2, reward_greedy=0.1, reward=0.5)
    assert names(tmp_path) == ["step-000001", "step-000002"]  # the best, and the newest
    (tmp_path / "step-000002" / NETWORK).unlink()
    checkpoint.prune(tmp_path, keep=1)
    assert "step-000001" in names(tmp_path)  # the only complete one


# --- 10, 50: planted files ------------------------------------------------------------------------------------------


class Planted:
    """Runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.mark,))


def _vouch_for(folder: Path, *more: str) -> None:
    """Makes the manifest fit what lies there, as somebody would who plants files."""
    file = folder / "manifest.json"
    facts = json.loads(file.read_text())
    for name in {*facts["files"], *more}:
        path = folder / name
        facts["files"][name] = {"bytes": path.stat().st_size, "sha256": checkpoint.sha256(path)}
    file.write_text(json.dumps(facts))


@pytest.mark.parametrize("name", [NETWORK, OPTIMIZER, COLUMNS, FULL])
def test_case_10_a_pickle_under_our_name(run: SmallRun, tmp_path: Path, name: str) -> None:
    """Nothing is unpickled, whatever the file is called and whatever the manifest says of it."""
    mark = tmp_path / "ran"
    (newest_of(run) / name).unlink()
    (newest_of(run) / name).write_bytes(pickle.dumps(Planted(mark)))
    assert f"{name} " in refused(newest_of(run))
    _vouch_for(newest_of(run))
    assert f"{name} cannot be opened" in refused(newest_of(run)) and not mark.exists()
    pickle.loads((newest_of(run) / name).read_bytes())
    assert mark.exists()  # it would have run


def test_case_10_pickles_beside_ours(run: SmallRun, tmp_path: Path) -> None:
    """Files that other libraries would unpickle are named, and never read even where the manifest lists them."""
    for name in ("custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl"):
        (newest_of(run) / name).write_bytes(pickle.dumps(Planted(tmp_path / "ran")))
        assert f"{name} is not in manifest.json" in refused(newest_of(run))
        _vouch_for(newest_of(run), name)
        assert set(checkpoint.read(newest_of(run))[1]) == {"network", "optimizer", "replay-00000"}
    assert not (tmp_path / "ran").exists()


NO_PLAIN_NAMES = (
    "/etc/hostname",
    "../step-000002/network.safetensors",
    "a/b.safetensors",
    "..",
    ".",
    "",
    "C:x",
    "a\\b",
)


@pytest.mark.parametrize("name", NO_PLAIN_NAMES)
def test_case_50_names_that_lead_elsewhere(run: SmallRun, name: str) -> None:
    """Absolute paths, `..` and folders in a manifest are refused before anything is opened."""
    file = newest_of(run) / "manifest.json"
    facts = json.loads(file.read_text())
    facts["files"][name] = facts["files"][NETWORK]
    file.write_text(json.dumps(facts))
    says = f"manifest.json lists {name!r}, which is not the plain name of a file beside it"
    assert says in passed_over(run) and says in refused(newest_of(run))


@pytest.mark.parametrize("name", [NETWORK, STATE, FULL, "manifest.json"])
def test_case_50_links_are_not_followed(run: SmallRun, name: str) -> None:
    """A symbolic link in place of a file is refused, even one to the very same bytes."""
    (newest_of(run) / name).unlink()
    (newest_of(run) / name).symlink_to(run.root / "step-000002" / name)
    says = f"{name} is a link, which is never followed"
    assert says in passed_over(run) and says in refused(newest_of(run))


# --- 11: another version --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "cure"),
    [
        (checkpoint.FORMAT_VERSION + 1, "update llm-dqn to go on from it"),
        (checkpoint.FORMAT_VERSION - 1, "go on from it with the version that wrote it"),
        ("two", "go on from it with the version that wrote it"),
        (None, "go on from it with the version that wrote it"),
    ],
)
def test_case_11_another_format(run: SmallRun, version: object, cure: str) -> None:
    """Says which format it has, which is read here, and what to do."""
    file = newest_of(run) / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": version}))
    says = f"format version {version!r}, this llm-dqn reads {checkpoint.FORMAT_VERSION}; {cure}"
    assert says in passed_over(run) and says in refused(newest_of(run))


# --- 39: the replay -------------------------------------------------------------------------------------------------


def test_case_39_a_damaged_segment_can_be_dropped(run: SmallRun) -> None:
    """Refused with the flag that helps; with it the episodes of that segment go, and all others keep what they had."""
    flip_a_bit(newest_of(run) / FULL)
    assert refused(newest_of(run)).endswith("; --replay-repair goes on without these episodes")
    assert checkpoint.newest(run.root, repair=True)[0] == newest_of(run)
    run.goes_on_from(newest_of(run), repair=True)
    assert run.replay.rewards.tolist() == [4, 5, 6] and run.replay.added == 3
    batch = run.replay.batch(np.array([0, 1, 2]))
    assert batch.tokens.actions[:, 0].tolist() == [4, 5, 6]
    run.collect(9)
    folder = run.save(4)
    assert checkpoint.verify(folder) is None
    run.goes_on_from(folder)
    assert len(run.replay) == 12


def test_case_39_the_run_says_what_it_drops(trained: Run, caplog: pytest.LogCaptureFixture) -> None:
    """`--resume --replay-repair` names the file and counts the episodes; without it the checkpoint is passed over."""
    segment = sorted(file.name for file in trained.newest.glob("replay-*-segment-*"))[0]
    flip_a_bit(trained.newest / segment, at=3000)
    code, said, _ = trained.resume("--replay-repair")
    assert code == 0 and f"continuing from {trained.newest}" in said
    assert f"--replay-repair: {segment} does not match its checksum; its episodes are dropped" in said
    assert "stored episodes are left out: their segments are missing" in caplog.text


def test_case_39_other_damage_is_not_repaired(run: SmallRun) -> None:
    """Dropping episodes helps against damaged segments alone."""
    flip_a_bit(newest_of(run) / COLUMNS)
    with pytest.raises(RunError, match="does not match its checksum"):
        checkpoint.read(newest_of(run), repair=True)
    assert checkpoint.newest(run.root, repair=True)[0] == run.root / "step-000002"


def test_case_39_another_tokenizer_or_shape(run: SmallRun) -> None:
    """Token ids of another vocabulary, and arrays that do not fit together, are refused in words."""
    _, parts = checkpoint.read(newest_of(run))
    with pytest.raises(UserError, match="written with another tokenizer"):
        checkpoint.restore_replay(PrefixReplay(100, vocabulary=b"w" * 32), parts, 0, 1)
    file = newest_of(run) / FULL
    tensors = load_file(file)
    file.unlink()
    save_file({name: tensor[:-1] for name, tensor in tensors.items()}, file)
    _vouch_for(newest_of(run))
    with pytest.raises(RunError, match="a segment has fewer tokens than its episodes"):
        run.goes_on_from(newest_of(run))


# --- 40: the corners of the buffer ----------------------------------------------------------------------------------


def test_case_40_the_corners_of_the_buffer() -> None:
    """Empty: refused in words. Smaller than a batch: drawn with replacement. Full: the oldest makes room.

    Priorities that are all 0: drawn evenly. NaN: the old one stays, with a warning. Slots that were overwritten since
    the batch was drawn: left alone. Every sequence of such things is compared with a plain list elsewhere.
    """
    rules = (uniform(), success_biased(0.5), prioritized())
    replay = PrefixReplay(3)
    for rule in rules:
        with pytest.raises(ValueError, match="the replay buffer is empty: add episodes before sampling"):
            replay.sample(2, np.random.default_rng(0), rule)
    replay.add([episode([1], [2], 0.5)])
    for rule in rules:
        assert replay.sample(5, np.random.default_rng(0), rule).slots.tolist() == [0] * 5
    replay.add([episode([1], [2], float(i)) for i in range(3)])
    assert replay.rewards.tolist() == [2, 0, 1] and replay.added == 4
    replay.update_priorities(torch.arange(3), torch.zeros(3))
    drawn = prioritized()(replay, 9000, np.random.default_rng(0))
    assert np.allclose(np.bincount(drawn) / 9000, 1 / 3, atol=0.03)
    with pytest.warns(UserWarning, match=r"1 of 2 TD errors cannot be priorities: \[nan\]"):
        replay.update_priorities(torch.tensor([0, 1]), torch.tensor([float("nan"), 0.5]))
    assert replay.priorities.tolist() == [0, 0.5, 0]
    drawn_at = replay.added
    replay.add([episode([1], [2], 7.0)])  # takes slot 1
    replay.update_priorities(torch.tensor([1, 2]), torch.tensor([9.0, 3.0]), drawn_at=drawn_at)
    assert replay.priorities.tolist() == [0, 0.5, 3.0]
