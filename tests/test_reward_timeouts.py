import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_dqn.errors import RunError, UserError
from llm_dqn.rewards import RewardResult, Rewards, load_reward
from tests import reward_examples

PROMPTS = ["p one", "p two", "p three"]
COMPLETIONS = ["a", "bb", "ccc"]


def totals(funcs: list[Any], **options: Any) -> list[float | None]:
    return [result.total for result in Rewards(funcs, **options).score(PROMPTS, COMPLETIONS)]


def closure(value: Any) -> Callable[..., Any]:
    return lambda completions, **columns: value


def test_async_functions_wait_together_on_one_lasting_loop() -> None:
    loops = []

    async def slow(completions, **kwargs):
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0.3)
        return [1.0] * len(completions)

    rewards = Rewards([slow, slow, slow])
    start = time.monotonic()
    assert rewards.score(PROMPTS, COMPLETIONS)[0].total == 3.0
    assert time.monotonic() - start < 0.8
    rewards.score(PROMPTS, COMPLETIONS)
    assert len(set(map(id, loops))) == 1


def test_async_inside_a_running_loop() -> None:
    async def judge(completions, **kwargs):
        return [1.0] * len(completions)

    async def notebook() -> list[float | None]:
        return totals([judge])

    assert asyncio.run(notebook()) == [1.0] * 3


def test_async_failure_and_timeout() -> None:
    async def broken(completions, **kwargs):
        raise ValueError("bad judge")

    async def sleepy(completions, **kwargs):
        await asyncio.sleep(60)

    async def stubborn(completions, **kwargs):
        time.sleep(5)

    async def fine(completions, **kwargs):
        return [1.0] * len(completions)

    with pytest.raises(RunError, match="ValueError: bad judge"):
        totals([fine, broken])
    for reward in (sleepy, stubborn):
        start = time.monotonic()
        with pytest.raises(RunError, match=r"TimeoutError: no answer within 0\.2 s"):
            totals([reward], timeout=0.2)
        assert 0.2 <= time.monotonic() - start < 2
    assert totals([fine], timeout=1) == [1.0] * 3
    rewards = Rewards([stubborn, fine], timeout=0.1, on_error=0)
    assert rewards.score(PROMPTS, COMPLETIONS)[0].total in (0.0, 1.0)


def test_sync_timeout_ends_the_process_and_starts_another() -> None:
    rewards = Rewards([reward_examples.sleep_on_x, reward_examples.length], timeout=1.0, on_error="skip")
    assert [result.total for result in rewards.score(PROMPTS, COMPLETIONS)] == [2.0, 3.0, 4.0]
    hung = rewards._callers[0]._process
    pid = hung.pid
    start = time.monotonic()
    results = rewards.score(["p"], ["x"])
    assert 1.0 <= time.monotonic() - start < 3.0
    assert results[0] == RewardResult(None, {"sleep_on_x": None, "length": 1.0})
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert rewards.score(PROMPTS, COMPLETIONS)[0].total == 2.0
    rewards.close()
    assert rewards.score(PROMPTS, COMPLETIONS)[0].total == 2.0
    rewards.close()


def test_timeout_under_the_other_rules() -> None:
    rewards = Rewards([reward_examples.sleep_on_x], timeout=0.5, on_error=-1)
    assert rewards.score(["p"], ["x"])[0].total == -1.0
    rewards.on_error = "fail"
    with pytest.raises(RunError, match=r"'sleep_on_x' failed .*TimeoutError: no answer within 0\.5 s"):
        rewards.score(["p"], ["x"])
    rewards.close()


def test_functions_in_a_process_fail_like_others() -> None:
    def total(function: Any, completion: str) -> float | None:
        rewards = Rewards([function], timeout=30)
        try:
            return rewards.score(["p"], [completion])[0].total
        finally:
            rewards.close()

    with pytest.raises(RunError, match="KeyError: 'no such judge'") as caught:
        total(reward_examples.raise_on_x, "x")
    assert "raise KeyError" in str(caught.value.__cause__.__cause__)  # where it happened
    with pytest.raises(RunError, match="its process ended in the middle of a call"):
        total(reward_examples.leave_on_x, "x")
    with pytest.raises(RunError, match="returned dict; expected a list"):
        total(reward_examples.not_a_list, "a")
    assert total(reward_examples.array, "a") == 0.0
    assert total(reward_examples.process_id, "a") not in (None, os.getpid())


def test_worker_goes_on_after_an_exception() -> None:
    rewards = Rewards([reward_examples.raise_on_x], timeout=30, on_error="skip")
    seen = [rewards.score(["p"], [completion])[0].total for completion in ("a", "x", "b")]
    assert seen == [2.0, None, 2.0]
    rewards.close()


def test_functions_without_address_know_no_timeout() -> None:
    for function in (lambda completions, **kwargs: [0.0], closure([0.0])):
        with pytest.raises(UserError, match=r"cannot be stopped.*name it 'file\.py:function'.*or set no timeout"):
            Rewards([function], timeout=1)


def test_file_function_in_a_process(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from helper import worth\ndef judge(completions, **kw):\n    return [worth] * len(completions)\n"
    )
    (tmp_path / "helper.py").write_text("worth = 7\n")
    rewards = Rewards([load_reward("mine.py:judge", [tmp_path])], timeout=30)
    assert rewards.score(["p"], ["a"])[0].total == 7.0
    rewards.close()
