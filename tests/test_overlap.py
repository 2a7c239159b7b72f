"""Collectors that a run starts beside itself: what they cost, what they repeat, how they end. Real processes."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from llm_dqn import checkpoint, exchange, overlap_worker
from llm_dqn.attempts import of_prompt
from llm_dqn.errors import StepFailed, UserError
from llm_dqn.exchange import Order
from llm_dqn.policy import SHARP, greedy
from llm_dqn.preflight import preflight
from llm_dqn.recipe import RecipeError, load_recipe
from llm_dqn.rollout import rollout
from llm_dqn.trainer import DQNTrainer
from llm_dqn.trust_region import LOOK_STEPS
from llm_dqn.types import Episode
from tests import collecting_worker as two
from tests.faults.runs import WEIGHTS, equal_checkpoints, logged, start, wait_for
from tests.test_trainer import metrics, trainer

STEPS, SIZE, BUDGET = 4, 32, 136  # learner steps between collections, completions of one, and in all
JUDGE = """
import os, time
def length(completions, **columns):
    with open(os.environ["CALLS"], "a") as stream:
        stream.write(f"{os.getpid()} {len(completions)}\\n")
    if os.getpid() != int(os.environ["LEARNER"]):
        time.sleep(float(os.environ.get("SLOW", "0")))
        if os.environ.get("FAILS"):
            raise KeyError("judge")
    return [float(len(text)) for text in completions]
"""


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Calls of a reward, as lines of "process completions"."""
    (tmp_path / "judge.py").write_text(JUDGE)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("LEARNER", str(os.getpid()))
    return tmp_path / "calls"


def settings(run: Path, *more: str) -> list[str]:
    facts = [f"train.output_dir={run}", f"reward.funcs=[{run.parent}/judge.py:length]", "rollout.overlap=1"]
    facts += ["reward.cache=false"]  # so that every completion is seen
    facts += [f"rollout.prompts_per_collect={SIZE}", f"replay.learning_starts={SIZE}", "train.save_steps=0"]
    facts += [f"replay.updates_per_collect={STEPS}", "train.eval_steps=0", "train.logging_steps=2"]
    return [*facts, f"train.max_scored_completions={BUDGET}", "train.final_eval_prompts=2", *more]


def learner(run: Path, *more: str) -> Any:
    return DQNTrainer.from_recipe(load_recipe("hello_world", settings(run, *more)))


def asked(calls: Path) -> dict[int, list[int]]:
    """Process -> completions of each of its calls."""
    found: dict[int, list[int]] = {}
    for line in calls.read_text().splitlines():
        process, count = map(int, line.split())
        found.setdefault(process, []).append(count)
    return found


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def stopped_at(run: DQNTrainer, step: int) -> None:
    """Trains up to a step in which somebody presses Ctrl-C."""
    update = run.update

    def interrupted(*given: Any) -> None:
        if run.step == step:
            signal.raise_signal(signal.SIGINT)
        update(*given)

    run.update = interrupted
    with pytest.raises(SystemExit) as stopped:
        run.train()
    assert stopped.value.code == 130


def test_the_budget_is_exact_and_a_stopped_run_goes_on_exactly(judge, tmp_path):
    """Also what was written ahead is asked for once. The first collection is the learner's own, as without overlap."""
    report = learner(tmp_path / "whole").train()
    calls = asked(judge)
    own = calls.pop(os.getpid())
    (others,) = calls.values()
    assert own[0] == SIZE and others == [SIZE, SIZE, SIZE, BUDGET - 4 * SIZE]
    lines = metrics(tmp_path / "whole")
    assert lines[-1]["scored_completions"] == BUDGET and lines[-1]["step"] == 5 * STEPS
    assert [line["replay/staleness"] for line in lines if "replay/staleness" in line] == [0, STEPS, STEPS, STEPS, STEPS]
    assert all(0 <= line["train/idle_share"] <= 1 for line in lines)
    assert report["tuned"]["prompts"] == 2 and not (tmp_path / "whole" / "overlap").exists()

    judge.unlink()
    cut = learner(tmp_path / "cut")
    stopped_at(cut, 2 * STEPS + 1)
    assert len(exchange.segments(tmp_path / "cut" / "overlap")) == 1  # it was finished, for the next half
    learner(tmp_path / "cut").train(resume=True)
    calls = asked(judge)
    assert sum(sum(counts) for process, counts in calls.items() if process != os.getpid()) == BUDGET - SIZE
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    for name in ("samples.jsonl", *WEIGHTS):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    last = f"checkpoints/step-{5 * STEPS:06d}"
    assert equal_checkpoints(tmp_path / "cut" / last, tmp_path / "whole" / last)


def test_a_policy_that_has_moved_asks_for_completions_earlier(judge, tmp_path):
    """Where others write, too: their policy is older still. The budget is what it was."""
    run = learner(tmp_path / "run", f"replay.updates_per_collect={3 * STEPS}", "replay.target_kl=1e-9")
    run.train()
    assert (run.step, run.scored_completions) == (5 * LOOK_STEPS, BUDGET)
    ages = [line["replay/staleness"] for line in metrics(tmp_path / "run") if "replay/staleness" in line]
    assert ages == [0, *[LOOK_STEPS] * 4]


RIGHT_OR_WRONG = """
def length(completions, **columns):
    return [float(len(text) % 2) for text in completions]
"""


def test_collectors_are_told_where_to_act_sharply(tmp_path):
    """By the rule that holds without them, as far as the learner knows it when it asks."""
    (tmp_path / "judge.py").write_text(RIGHT_OR_WRONG)
    run, orders = learner(tmp_path / "run", "train.max_scored_completions=160"), []
    place = run.overlap.place
    run.overlap.place = lambda order, tensors: (orders.append(order), place(order, tensors))
    run.train()
    assert run.replay.kinds.right_or_wrong
    # the first is asked for before anything is learned
    assert [order.temperature for order in orders] == [1.0, SHARP, SHARP, SHARP]
    assert [bool(order.failed) for order in orders] == [False, False, False, True]  # 29 prompts: they come again


def test_a_collector_acts_sharply_but_where_that_failed(judge, tmp_path, monkeypatch):
    run = learner(tmp_path / "run", "train.max_scored_completions=32")
    run.train()
    folder, position = tmp_path / "orders", run.parts.stream.state_dict()
    prompts = run.parts.stream.next_batch(12)
    failed = [of_prompt(prompt.ids) for prompt in prompts[::2]]
    online = {name: value for name, value in run.network.checkpoint_state().items() if not name.startswith("target")}
    folder.mkdir()
    exchange.place_order(folder, Order(0, 7, 0.0, position, 12, 12, 0, 1e-6, failed), online)
    found: list[Episode] = []

    def kept(folder: Path, name: str, number: int, scored: int, episodes: list[Episode], *_: Any) -> None:
        found.extend(episodes)
        (folder / exchange.FINISHED).touch()

    monkeypatch.setattr(exchange, "write_segment", kept)
    overlap_worker.work(tmp_path / "run", folder, 0, 1, 0, 1, "cpu")
    likeliest = rollout(run.parts.writer, prompts, greedy(), seed=0)
    same = [one.completion == other.completion for one, other in zip(found, likeliest, strict=True)]
    assert all(same[1::2]) and not all(same[::2])


def test_rewards_are_predicted_of_what_collectors_write_too(judge, tmp_path):
    """Of what the learner imagines itself; a run that was stopped goes on with it exactly."""
    more = ["replay.imagined=1", "rollout.prompts_per_collect=64", "train.max_scored_completions=256"]
    whole = learner(tmp_path / "whole", *more)
    whole.train()
    assert whole.replay.imagined and whole.scored_completions == 256
    stopped_at(learner(tmp_path / "cut", *more), whole.step // 2)
    learner(tmp_path / "cut", *more).train(resume=True)
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")


def test_a_collector_that_fails_ends_the_run_which_is_saved(judge, tmp_path, monkeypatch):
    """With the reward's own message; and one that is killed is named. What was learned so far is whole."""
    monkeypatch.setenv("FAILS", "yes")
    with pytest.raises(StepFailed, match=r"collector 0 of 1 \(rollout.overlap\): the reward 'length' failed.*KeyError"):
        learner(tmp_path / "run").train()
    newest, _ = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None and checkpoint.step_of(newest) == STEPS

    monkeypatch.delenv("FAILS")
    monkeypatch.setenv("SLOW", "60")
    run = learner(tmp_path / "run")
    take = run.overlap.take

    def killing() -> Any:
        (child,) = run.overlap._children
        child.kill()
        return take()

    run.overlap.take = killing
    with pytest.raises(StepFailed, match=r"collector 0 of 1 .* was ended from outside by SIGKILL"):
        run.train(resume=True)
    assert (run.step, run.scored_completions) == (STEPS, SIZE)


def test_collectors_end_with_a_learner_that_is_killed(judge, tmp_path):
    """Even in the middle of a slow reward."""
    environment = {"CALLS": str(judge), "LEARNER": "0", "SLOW": "2"}
    process = start("llm_dqn", "train", "hello_world", *settings(tmp_path / "run"), **environment)
    try:
        wait_for(lambda: judge.is_file() and len(asked(judge)) == 2, process)
        (other,) = (pid for pid in asked(judge) if pid != process.pid)
        assert alive(other)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 10
        while alive(other):
            assert time.monotonic() < deadline, "an orphan"
            time.sleep(0.05)
    finally:
        process.kill()


def test_a_learner_of_two_processes_and_what_others_write_for_it(tmp_path):
    """Collectors of its own, one a process, and one elsewhere: each process holds other episodes, the weights agree."""
    (tmp_path / "judge.py").write_text(JUDGE)
    environment = {"CALLS": str(tmp_path / "calls"), "LEARNER": "0"}
    launch = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.collecting_worker")
    both = start(*launch, str(tmp_path), **environment)
    elsewhere = ("hello_world", "--into", str(tmp_path / "segments"), *two.settings(str(tmp_path), "elsewhere"))
    collector = start("llm_dqn", "collect", *elsewhere, **environment)
    try:
        said = both.communicate(timeout=250)[0]
        assert both.returncode == 0, said[-3000:]
        assert collector.wait(30) == 0
    finally:
        both.kill()
        collector.kill()
    notes = [json.loads((tmp_path / f"notes-{rank}.json").read_text()) for rank in (0, 1)]
    for scene, scored in (("overlap", two.BUDGET), ("elsewhere", 4 * two.SIZE)):  # its segments are whole ones
        first, second = (note[scene] for note in notes)
        assert first["scored"] == second["scored"] == scored and first["weights"] == second["weights"]
        assert first["held"] + second["held"] == scored and min(first["held"], second["held"]) >= two.SIZE
        assert first["texts"] != second["texts"]
    ages = [line["replay/staleness"] for line in metrics(tmp_path / "overlap") if "replay/staleness" in line]
    assert ages == [0, two.STEPS, two.STEPS, two.STEPS]


def test_what_cannot_overlap_is_refused(tiny_llama_path, tmp_path):
    with pytest.raises(UserError, match=r"overlap=1: collectors are processes of their own.*from_recipe"):
        trainer(tiny_llama_path, tmp_path, overlap=1)
    with pytest.raises(RecipeError, match="excludes collectors, which is x"):
        load_recipe("hello_world", ["rollout.overlap=1", "rollout.collectors=x"])
    with pytest.raises(RecipeError, match=r"must be at least overlap x updates_per_collect \(8\)"):
        load_recipe("hello_world", ["rollout.overlap=2", "replay.max_age=7"])
    assert load_recipe("hello_world").rollout.overlap == 0


@pytest.mark.parametrize("key", ["rollout.overlap=1", "rollout.collectors=nowhere"])
def test_a_recipe_whose_completions_others_write_can_be_checked(key, tmp_path):
    """The one rollout of `llm-dqn check` waits for nobody."""
    problems, lines = preflight(load_recipe("hello_world", [key, f"train.output_dir={tmp_path}/run"]))
    assert not problems and any(line.startswith("one rollout of 4 completions took") for line in lines)
