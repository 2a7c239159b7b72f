"""Faults that need two real processes: which all of them survive, or none."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_dqn import checkpoint
from llm_dqn.lock import NAME, RunLock
from llm_dqn.resume import dealt
from tests.faults.runs import SLOW, WEIGHTS, equal_checkpoints, logged, start, wait_for
from tests.faults.two_processes import EXAMINED, FEW
from tests.test_trainer import trainer


@pytest.fixture(scope="module")
def two(tiny_llama_path: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """(folder, notes by rank) of two real processes that went through `two_processes`."""
    home = tmp_path_factory.mktemp("two")
    trainer(tiny_llama_path, home / "alone", **FEW, max_steps=2).train()
    launched = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.faults.two_processes"]
    process = start(*launched, tiny_llama_path, str(home))
    said = process.communicate(timeout=280)[0]
    notes = [home / f"notes-{rank}.json" for rank in (0, 1)]
    assert all(file.is_file() for file in notes), said[-3000:]
    return home, [json.loads(file.read_text()) for file in notes]


# --- 2: killed and resumed --------------------------------------------------------------------------------------------
def test_case_02_two_processes_resume_exactly(two):
    """With two processes, too: metrics of both, both replays, weights and samples."""
    home, _ = two
    assert logged(home / "cut") == logged(home / "whole")
    for name in ("samples.jsonl", *WEIGHTS):
        assert (home / "cut" / name).read_bytes() == (home / "whole" / name).read_bytes(), name
    last = "checkpoints/step-000005"
    assert equal_checkpoints(home / "cut" / last, home / "whole" / last)


# --- 9: another number of processes -----------------------------------------------------------------------------------


def test_case_09_a_replay_is_dealt_to_more_processes(two):
    """From one process to two: every episode has one new home, in order of age, and the run says so."""
    home, notes = two
    _, parts = checkpoint.read(home / "alone" / "checkpoints" / "step-000002")
    shares = [note["more_processes"]["rewards"] for note in notes]
    assert sorted(shares[0] + shares[1]) == sorted(parts["replay-00000"]["rewards"].tolist())
    assert [note["more_processes"]["step"] for note in notes] == [2, 2]


def test_case_09_replays_of_two_processes_become_one(two, tiny_llama_path, tmp_path, capsys):
    """From two processes to one: nothing is lost, and the run says that it is no longer bit-exact."""
    home, _ = two
    shutil.copytree(home / "whole", tmp_path / "run")
    options = FEW | {"max_steps": 6, "save_steps": 2, "logging_steps": 3, "lr_scheduler_type": "linear"}
    run = trainer(tiny_llama_path, tmp_path / "run", **options)
    run.train(resume=True)
    assert "the checkpoint is one of 2 processes, and 1 run" in capsys.readouterr().out
    shards = checkpoint.read_replay(home / "whole" / "checkpoints" / "step-000005")
    was = sorted(reward for shard in shards for reward in shard["rewards"].tolist())
    assert sorted(run.replay.rewards[: len(was)].tolist()) == was and run.step == 6


def test_case_09_shares_are_whole_episodes():
    """Tokens and log-probabilities follow their episode, and as many processes as before get what they had."""
    one = {"lengths": [3, 2], "prompt_lengths": [1, 1], "versions": [0, 4], "tokens": [1, 2, 3, 4, 5]}
    other = {"lengths": [4], "prompt_lengths": [2], "versions": [2], "tokens": [6, 7, 8, 9]}
    shards = [{"added": np.array([9])} | {k: np.array(v) for k, v in shard.items()} for shard in (one, other)]
    for shard in shards:
        shard["ref_logprobs"] = np.arange(float((shard["lengths"] - shard["prompt_lengths"]).sum())) + len(shard)
    assert dealt(shards, 1, 2) is shards[1]
    first, second, third = (dealt(shards, rank, 3) for rank in range(3))
    assert [share["tokens"].tolist() for share in (first, second, third)] == [[1, 2, 3], [6, 7, 8, 9], [4, 5]]
    assert third["ref_logprobs"].tolist() == shards[0]["ref_logprobs"][2:].tolist()
    everything = dealt(shards, 0, 1)
    assert everything["versions"].tolist() == [0, 2, 4] and everything["added"].tolist() == [3]


# --- 17: a failure on one process -------------------------------------------------------------------------------------


def test_case_17_a_reward_that_fails_on_one_process_ends_both_and_is_saved(two):
    """Within seconds, with the same message naming process and reward; resuming scores every completion once."""
    _, notes = two
    ends = [note["reward_fails_on_one"] for note in notes]
    assert ends[0]["said"] == ends[1]["said"]
    assert "process 1 of 2: the reward 'reward' failed" in ends[0]["said"][1]
    assert [end["saved_at"] for end in ends] == [2, 2] and [end["scored"] for end in ends] == [16, 16]
    assert all(end["seconds"] < 20 for end in ends)


def test_case_17_code_that_fails_on_one_process_ends_both(two):
    """Also where the other one waits in a collective."""
    _, notes = two
    ends = [note["code_fails_on_one"] for note in notes]
    assert ends[0]["said"] == ends[1]["said"] == ["RunError", "process 1 of 2: ZeroDivisionError: of process 1"]
    assert all(end["seconds"] < 20 for end in ends)


def test_case_17_a_folder_in_use_is_told_to_both_processes(two):
    """Only the main process holds the lock; both end with the same sentence."""
    _, notes = two
    said = [note["folder_in_use"]["said"] for note in notes]
    assert said[0] == said[1] and said[0][0] == "UserError" and "is in use by a run that goes on" in said[0][1]


def test_case_17_a_killed_process_ends_the_other_and_the_run_goes_on_afterwards(tmp_path):
    """Ctrl-C saves on both; SIGKILL of one, or of their launcher: who is left ends in seconds and says who is gone."""
    (tmp_path / "judge.py").write_text(SLOW)
    run = tmp_path / "run"
    settings = [f"train.output_dir={run}", f"reward.funcs=[{tmp_path}/judge.py:slow]", "train.max_steps=100000"]
    settings += ["train.logging_steps=1", "train.eval_steps=0", "train.save_steps=0", "replay.learning_starts=8"]
    settings += ["rollout.prompts_per_collect=16", "train.per_device_train_batch_size=8"]
    command = ["llm_dqn", "train", "hello_world", *settings, "--num-processes", "2"]
    first = start(*command, SLOW="0.3")
    try:
        wait_for((run / "metrics.jsonl").exists, first)
        first.send_signal(signal.SIGINT)
        printed = first.communicate(timeout=60)[0]
        assert first.returncode == 130 and "stopped and saved after step" in printed, printed
    finally:
        first.kill()
    saved, _ = checkpoint.newest(run / "checkpoints")
    second = start(*command, "--resume", SLOW="300")
    try:
        wait_for(lambda: (run / NAME).is_file() and len(children(second.pid)) == 2, second)
        wait_for(lambda: all(sleeps(pid) for pid in children(second.pid)), second)
        os.kill(max(children(second.pid)), signal.SIGKILL)
        started = time.monotonic()
        printed = second.communicate(timeout=60)[0]
        assert time.monotonic() - started < 20
        assert second.returncode == 1 and "process 1 of 2 was ended from outside" in printed, printed
    finally:
        second.kill()
    third = start(*command, "--resume", SLOW="300")
    try:
        wait_for(lambda: len(children(third.pid)) == 2, third)
        time.sleep(12)  # wherever they are then: still starting, or at work
    finally:
        third.kill()
    started = time.monotonic()
    assert "the launcher of the processes was ended from outside" in third.communicate(timeout=60)[0]
    assert time.monotonic() - started < 20  # both have closed what they write to
    assert checkpoint.newest(run / "checkpoints") == (saved, [])
    RunLock(run).acquire()  # the file that is left behind is in nobody's way


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def sleeps(pid: int) -> bool:
    """Whether a process has waited for a while without using the processor."""
    used = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11] for _ in (0, time.sleep(1.5))]
    return used[0] == used[1]


# --- 36: what is not finite -------------------------------------------------------------------------------------------
def test_case_36_a_nan_on_one_process_leaves_the_step_out_on_both(two):
    """The weights of both processes stay finite and alike."""
    _, notes = two
    first, second = (note["nan_on_one"] for note in notes)
    assert first["skipped"] == second["skipped"] == 1
    assert first["weights"] == second["weights"] and np.isfinite(first["weights"]).all()


# --- memory ---------------------------------------------------------------------------------------------------------


def test_case_38_two_processes_begin_a_step_again_together(two):
    """On one process: all go on with half as many episodes at a time, and learn what they would have learned."""
    _, notes = two
    for rank, note in enumerate(notes):
        found = note["memory_runs_out_on_one"]
        assert max(found["apart"].values()) < 1e-6 < found["moved"]
        pieces = [[1, 4], [1, 4]] + [[1, 2]] * 4 + [[2, 2]] * 4
        assert found["pieces"] == [[0, 4]] * 2 + pieces, rank
        assert found["messages"] == [2, 6, 2]  # the second step is followed by a collection, which takes 4
        assert note["memory_runs_out_on_one"]["seconds"] < 60


def test_case_38_out_of_memory_again_ends_both_processes(two):
    """Again on one process: all end with the same sentence, saved."""
    _, notes = two
    ends = [note["memory_runs_out_for_good"] for note in notes]
    assert ends[0]["said"] == ends[1]["said"] and ends[0]["said"][0] == "StepFailed"
    assert "process 1 of 2: out of memory while learning, 2 rows at a time" in ends[0]["said"][1]
    assert [(end["saved_at"], end["step"]) for end in ends] == [(1, 3), (1, 3)]


# --- sums ---------------------------------------------------------------------------------------------------------


def test_gradients_that_only_some_processes_have(two):
    """Missing ones count as 0 where another process has them, and stay missing where none has."""
    _, notes = two
    for note in notes:
        assert note["some_gradients"]["told"] == [2, 1]
        assert note["some_gradients"]["gradients"] == [[3, 3, 3], [1, 1], [[0, 2], [1, 3]], None]


# --- sharing the work -------------------------------------------------------------------------------------------------


def test_one_process_asks_the_rewards_for_both(two):
    """`reward.called_by: main`: each keeps the rewards of what it wrote itself, and nothing is asked twice."""
    _, (first, second) = two
    first, second = first["asked_by_main"], second["asked_by_main"]
    assert first["calls"][0] == 8 and second["calls"] == []  # prompts_per_collect, over both
    assert first["settings"] == second["settings"] and first["settings"][0] == 8
    assert (first["rewards"], second["rewards"]) == ([1, 2, 3], [4, 5, 6, 7])  # it abstained on the first of all


def test_two_processes_measure_what_one_measures(two, tiny_llama_path, tmp_path):
    """The same figures, each process having done its part."""
    _, notes = two
    one = trainer(tiny_llama_path, tmp_path / "one", **EXAMINED).train()
    first, second = (note["examined"] for note in notes)
    assert first["report"] == second["report"] == json.loads(json.dumps(one))
    assert min(first["parts"], second["parts"]) >= 4  # sampled, greedy, and at least one strength each
