"""Bad reward functions (12 to 16, 18 to 21): each is named with row and prompt, and nothing of it enters the replay."""

import math
import multiprocessing
import re
import time
from typing import Any

import numpy as np
import pytest
import torch

from llm_dqn import checkpoint
from llm_dqn.errors import RunError
from llm_dqn.rewards import Rewards
from tests.faults.desk import Desk, lines
from tests.test_reward_functions import save_judge
from tests.test_rewards import CALL_FAULTS, ROW_FAULTS, length, returns, totals

RAISES = """
from pathlib import Path
calls = 0
def length(completions, **columns):
    global calls
    calls += 1
    if {when} and not Path("mended").exists():
        raise ConnectionError("no judge today")
    return [float(len(text)) for text in completions]
"""


def stored_rewards(run: Any) -> np.ndarray:
    newest, _ = checkpoint.newest(run / "checkpoints")
    return checkpoint.read_replay(newest)[0]["rewards"]


def test_case_12_raises_and_the_run_stops(desk: Desk) -> None:
    """By default the run is saved and ends with 1, naming function, row, prompt and error; --resume tries again."""
    desk.judge(RAISES.format(when="calls == 2"))
    said = desk.failed()
    assert re.search(r"the reward 'length' failed \(prompt 'the film \d'\): ConnectionError: no judge today", said)
    assert "set on_error to skip or to a number to go on all the same" in said
    newest, _ = checkpoint.newest(desk.home / "runs" / "x" / "checkpoints")
    assert newest is not None and newest.name == "step-000002"
    desk.write("mended", "")
    code, shown, errors = desk.command("train", "r.yaml", "--resume")
    assert code == 0 and "continuing from runs/x/checkpoints/step-000002" in shown + errors


def test_case_12_raises_and_rows_are_skipped(desk: Desk) -> None:
    """With `on_error: skip` the rows are left out, which is told at the first and at the 10th, 100th ... one."""
    desk.judge(RAISES.format(when="calls == 1"))
    run, shown = desk.trained(reward__on_error="skip")
    assert "8 of 8 completions left out: the reward 'length' failed (prompt 'the film " in shown
    assert len(stored_rewards(run)) == 16 and all(value > 0 for value in stored_rewards(run))


def test_case_12_raises_and_a_number_stands_in(desk: Desk) -> None:
    """With a number as `on_error` that is the reward of the rows, which is told."""
    desk.judge(RAISES.format(when="calls == 1"))
    run, shown = desk.trained(reward__on_error=-7.0)
    assert "8 of 8 completions given -7.0: the reward 'length' failed" in shown
    assert stored_rewards(run).tolist()[:8] == [-7.0] * 8 and all(value > 0 for value in stored_rewards(run)[8:])


@pytest.mark.parametrize(("value", "message"), ROW_FAULTS)
def test_case_13_a_row_that_is_no_number(value: Any, message: str) -> None:
    """NaN, infinity and anything else that is no number is an error of that row, by the same rule; None abstains."""
    funcs = [length, returns([1.0, value, None])]
    with pytest.raises(RunError, match=re.escape(message)) as caught:
        totals(funcs)
    assert "the reward 'reward' failed in row 2 of 3 (prompt 'p two')" in str(caught.value)
    assert totals(funcs, on_error="skip") == [2.0, None, 3.0]
    rewards = Rewards(funcs, on_error=0.5)
    results = rewards.score(["p one", "p two", "p three"], ["a", "bb", "ccc"])
    assert [result.total for result in results] == [2.0, 2.5, 3.0]
    assert results[1].each == {"length": 2.0, "reward": 0.5}
    assert rewards.failed == 1


def test_case_13_nothing_that_is_not_finite_is_remembered(desk: Desk) -> None:
    """A run whose reward is NaN or infinite now and then goes on under skip with the rows that are numbers."""
    desk.judge(
        "import math\ndef length(completions, **columns):\n"
        "    return [(math.nan, math.inf, None, 1.0)[i % 4] for i in range(len(completions))]\n"
    )
    run, shown = desk.trained(reward__on_error="skip", replay__learning_starts=2)
    assert "returned nan; expected a finite number or None" in shown
    assert set(stored_rewards(run).tolist()) == {1.0}
    assert all(math.isfinite(line["reward"]) for line in lines(run / "samples.jsonl"))


def test_case_14_nobody_answers(desk: Desk) -> None:
    """A batch on which all abstain is left out; after ten of them the run ends and says so."""
    desk.judge("def length(completions, **columns):\n    return [None] * len(completions)\n")
    said = desk.failed()
    assert "nothing to learn from: 80 completions scored, no reward among them" in said
    assert "every reward function abstained (None)" in said


@pytest.mark.parametrize(("value", "message"), CALL_FAULTS)
def test_case_15_the_wrong_thing(value: Any, message: str) -> None:
    """A wrong length, a scalar, a generator, text, a matrix: refused with what it was and what is expected."""
    with pytest.raises(RunError, match=re.escape(message)) as caught:
        totals([length, returns(value)])
    assert "the reward 'reward' failed (prompt 'p one')" in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        [1, 2.5, None],
        (1, 2.5, None),
        np.array([1.0, 2.5, 3.0], dtype=np.float32),
        torch.tensor([1.0, 2.5, 3.0], dtype=torch.bfloat16),
        [np.float32(1), torch.tensor(2.5), np.int64(3)],
        [True, 2.5, None],  # right or wrong, as TRL's functions often say it
        [np.bool_(True), 2.5, None],
    ],
)
def test_case_15_lists_and_arrays(value: Any) -> None:
    """Lists, tuples, arrays and tensors of shape (n,) are taken."""
    given = totals([returns(value)])
    assert given[:2] == [1.0, 2.5]
    assert given[2] in (None, 3.0)
    assert all(type(total) in (float, type(None)) for total in given)


def test_case_15_the_cure_is_said(desk: Desk) -> None:
    """What is nearly a number is told with its cure, by `check` already."""
    desk.judge("def length(completions, **columns):\n    return [str(len(text)) for text in completions]\n")
    code, _, errors = desk.command("check", "r.yaml")
    assert code == 2 and errors.startswith("r.yaml:9: reward.funcs: the reward 'length' failed (prompt ")
    assert "(str); expected a number or None; write float(...) around it" in errors


def test_case_16_hangs(desk: Desk) -> None:
    """`reward.timeout` ends the call, async or not, and the process it runs in; the rule of `on_error` follows."""
    desk.judge("import time\ndef length(completions, **columns):\n    time.sleep(600)\n")
    started = time.monotonic()
    said = desk.failed(reward__timeout=0.5)
    assert "the reward 'length' failed (prompt " in said and "TimeoutError: no answer within 0.5 s" in said
    assert time.monotonic() - started < 20
    assert not [child for child in multiprocessing.active_children() if child.name == "reward"]
    desk.judge("import asyncio\nasync def length(completions, **columns):\n    await asyncio.sleep(600)\n")
    assert "TimeoutError: no answer within 0.5 s" in desk.failed()


def test_case_18_prints_mutates_and_reseeds(desk: Desk) -> None:
    """Seeding, mutating, changing folder, gradients or dtype: the run is the same bit for bit. Prints are shown."""
    polite = "def length(prompts, completions, answer):\n    return [float(len(text)) for text in completions]\n"
    rude = (
        "import os, random, numpy, torch\ntorch.set_grad_enabled(False)\n"
        "def length(prompts, completions, answer):\n"
        "    values = [float(len(text)) for text in completions]\n"
        "    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)\n"
        "    os.chdir('/'), torch.set_grad_enabled(False), torch.set_default_dtype(torch.float16)\n"
        "    print('noise'), prompts.clear(), completions.clear(), answer.clear()\n"
        "    return values\n"
    )
    files = {}
    for name, source in (("polite", polite), ("rude", rude)):
        desk.judge(source)
        run, shown = desk.trained(train__output_dir=f"runs/{name}")
        assert ("noise" in shown) == (name == "rude")
        files[name] = [(run / path).read_bytes() for path in ("samples.jsonl", "adapter/adapter_model.safetensors")]
    assert files["polite"] == files["rude"]


WRONG_NAMES = {
    "jugde.py:length": "reward 'jugde.py:length': no file 'jugde.py'; did you mean judge.py?",
    "judge.py:lenght": "judge.py has no 'lenght'; did you mean length?",
    "judge.py:LIMIT": "'LIMIT' is int, not a function",
    "judge.py": "which function? write 'judge.py:length'",
    "judge.py:asks": "the reward 'asks' needs 'answers', which is no column of prompts.jsonl; did you mean answer?",
    "broken.py:f": "importing broken.py failed: ModuleNotFoundError: No module named 'nothing_like_it'",
    "leaving.py:f": "importing leaving.py failed: SystemExit: 3",
    "no_such_package.f": "no module 'no_such_package' can be imported; a function is written 'file.py:function'",
}


@pytest.mark.parametrize("spec", WRONG_NAMES)
def test_case_19_cannot_be_called(desk: Desk, spec: str) -> None:
    """A path, name or argument that is not there: found by `check` and at the start, with what there is."""
    desk.judge(
        "LIMIT = 3\ndef length(completions, **columns):\n    return [0.0] * len(completions)\n"
        "def asks(completions, answers):\n    return answers\n"
    )
    desk.write("broken.py", "import nothing_like_it\n")
    desk.write("leaving.py", "import sys; sys.exit(3)\n")
    said = desk.refused("reward.funcs", reward__funcs=[spec]).replace(f"{desk.home}/", "")
    assert WRONG_NAMES[spec] in said


def test_case_19_columns_of_held_out_rows(desk: Desk) -> None:
    """Held-out rows must have the columns too, or the evaluation after hours of training would fail."""
    desk.judge("def length(completions, answer):\n    return [0.0] * len(completions)\n")
    said = desk.refused("reward.funcs", data__eval=desk.rows("eval.jsonl", [{"prompt": "a"}]))
    assert "the reward 'length' needs 'answer', which is no column of eval.jsonl" in said


def test_case_20_constant(desk: Desk) -> None:
    """A warning after ten batches in which every completion was worth the same, and every fifty from then on."""
    desk.judge("def length(completions, **columns):\n    return [1.0] * len(completions)\n")
    _, shown = desk.trained(replay__updates_per_collect=1, train__max_steps=10)
    assert "the reward was the same (1) for every completion in each of the last 10 batches" in shown


def test_case_21_reward_models(desk: Desk, tiny_llama_path: str) -> None:
    """One of several labels must be named, missing weights are refused; a judge has its own tokenizer and padding."""
    save_judge(desk.home / "several", num_labels=3)
    said = desk.refused("reward.funcs", reward__funcs=["several"])
    assert "tells 3 labels apart (LABEL_0, LABEL_1, LABEL_2); name the one to reward, like " in said
    assert "no label 'LABLE_2'; did you mean LABEL_2?" in desk.refused(
        "reward.funcs", reward__funcs=["several#LABLE_2"]
    )
    said = desk.refused("reward.funcs", reward__funcs=["models/tiny#LABEL_1"])
    assert "lack 1 weights that would start at random: score.weight" in said
    save_judge(desk.home / "bare", decoder=True, pad=False, num_labels=1)
    desk.trained(reward__funcs=["bare"])
