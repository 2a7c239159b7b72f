import math
import random
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from llm_dqn.errors import RunError, UserError
from llm_dqn.rewards import RewardResult, Rewards

PROMPTS = ["p one", "p two", "p three"]
COMPLETIONS = ["a", "bb", "ccc"]


def length(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def returns(value: Any) -> Callable[..., Any]:
    def reward(completions: list[str], **columns: Any) -> Any:
        return value

    return reward


def totals(funcs: list[Any], **options: Any) -> list[float | None]:
    return [result.total for result in Rewards(funcs, **options).score(PROMPTS, COMPLETIONS)]


# --- what a function gets ---------------------------------------------------------------------------------------------


def test_arguments_are_those_of_trl() -> None:
    seen: dict[str, Any] = {}

    def reward(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **kwargs):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, answer=answer, rest=kwargs)
        log_extra("column", answer)
        log_metric("mean", 1.0)
        assert trainer_state is None
        return [0] * len(prompts)

    columns = [{"answer": 1, "level": "x", "prompt": "hidden"}, {"answer": 2}, {"answer": 3}]
    Rewards([reward]).score(PROMPTS, COMPLETIONS, columns, [[1], [2], [3]])
    assert seen == {
        "prompts": PROMPTS,
        "completions": COMPLETIONS,
        "ids": [[1], [2], [3]],
        "answer": [1, 2, 3],
        "rest": {"level": ["x", None, None]},
    }


def test_functions_without_kwargs_get_what_they_name() -> None:
    def reward(completions, answer, weight=2.0):
        return [weight * value for value in answer]

    results = Rewards([reward]).score(PROMPTS, COMPLETIONS, [{"answer": n, "other": 0} for n in (1, 2, 3)])
    assert [result.total for result in results] == [2.0, 4.0, 6.0]


def test_completions_of_conversations_are_messages() -> None:
    def reward(prompts, completions, **kwargs):
        assert completions == [[{"role": "assistant", "content": "yes"}]]
        return [len(completions[0][0]["content"])]

    prompt = [{"role": "user", "content": "hello"}]
    assert Rewards([reward]).score([prompt], ["yes"])[0].total == 3.0


def test_missing_column_is_the_users_to_mend_whatever_on_error_says() -> None:
    def reward(completions, answer):
        return answer

    rewards = Rewards([reward], on_error="skip")
    message = r"the reward 'reward' needs 'answer', which is no column of the data; did you mean answers\?"
    with pytest.raises(UserError, match=message):
        rewards.score(PROMPTS, COMPLETIONS, [{"answers": 1}] * 3)
    with pytest.raises(UserError, match=message):
        rewards.check_columns(["answers", "level"])
    rewards.check_columns(["answer"])
    with pytest.raises(UserError, match="needs 'answer'"):
        rewards.check_columns(["completion"])


def test_inputs_are_copies() -> None:
    prompts = [[{"role": "user", "content": "hello"}]]
    columns = [{"facts": {"a": 1}}]
    ids = [[1, 2]]

    def spoil(prompts, completions, completion_ids, facts, **kwargs):
        prompts[0][0]["content"] = "spoiled"
        prompts.clear()
        completions[0][0]["content"] = "spoiled"
        facts[0]["a"] = 2
        completion_ids[0].append(3)
        return [0.0]

    def check(prompts, completions, completion_ids, facts, **kwargs):
        assert prompts[0][0]["content"] == "hello"
        assert completions[0][0]["content"] == "yes"
        assert completion_ids == [[1, 2]]
        return [float(facts[0]["a"])]

    assert Rewards([spoil, check]).score(prompts, ["yes"], columns, ids)[0].total == 1.0
    assert (prompts, columns, ids) == ([[{"role": "user", "content": "hello"}]], [{"facts": {"a": 1}}], [[1, 2]])


@pytest.mark.parametrize("is_async", [False, True])
def test_random_streams_are_put_back(is_async: bool) -> None:
    def disturb(completions: list[str], **kwargs: Any) -> list[float]:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        return [random.random() + torch.rand(()).item() + np.random.rand() for _ in completions]

    async def disturb_async(completions: list[str], **kwargs: Any) -> list[float]:
        return disturb(completions)

    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), torch.rand(()).item()]

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = draws()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    totals([disturb_async if is_async else disturb])
    assert draws() == expected


def test_printing_is_let_through(capsys: pytest.CaptureFixture[str]) -> None:
    totals([lambda completions, **kwargs: [print("judged")] * len(completions)])
    assert "judged" in capsys.readouterr().out


# --- how several are combined -----------------------------------------------------------------------------------------


def test_weighted_sum_over_those_that_answer() -> None:
    funcs = [length, returns([10, None, None]), returns([None, 1.0, None])]
    results = Rewards(funcs, weights=[1.0, 0.5, -2.0]).score(PROMPTS, COMPLETIONS)
    assert [result.total for result in results] == [1 + 5, 2 - 2, 3]
    assert results[0] == RewardResult(6.0, {"length": 1.0, "reward": 10.0, "reward_2": None})


def test_nobody_answers() -> None:
    assert totals([returns([None, 1, None]), returns([None, None, 2])]) == [None, 1.0, 2.0]


def test_no_completions_no_calls() -> None:
    rewards = Rewards([length])
    assert rewards.score([], []) == []
    rewards.score(PROMPTS, COMPLETIONS)
    rewards.score(PROMPTS[:1], COMPLETIONS[:1])
    assert rewards.calls == 4


# --- faults -----------------------------------------------------------------------------------------------------------

CALL_FAULTS = [
    ([1.0, 2.0], "returned 2 rewards for 3 completions"),
    (1.0, "returned float; expected a list"),
    (None, "returned NoneType; expected a list"),
    ({"a": 1}, "returned dict; expected a list"),
    ("abc", "returned str; expected a list"),
    ((value for value in [1, 2, 3]), "returned generator; expected a list"),
    (np.ones((3, 1)), r"returned an array of shape (3, 1); expected (n,)"),
    (torch.tensor(1.0), "returned an array of shape (); expected (n,)"),
]
ROW_FAULTS = [
    (math.nan, "returned nan; expected a finite number or None"),
    (math.inf, "returned inf; expected a finite number or None"),
    (-math.inf, "returned -inf; expected a finite number or None"),
    (10**400, "expected a finite number or None"),
    ("1.0", "returned '1.0' (str); expected a number or None"),
    (Decimal(1), "returned Decimal('1') (Decimal); expected a number or None"),
    (Fraction(1), "returned Fraction(1, 1) (Fraction); expected a number or None"),
    ([1.0], "returned [1.0] (list); expected a number or None"),
    (1j, "returned 1j (complex); expected a number or None"),
]


@pytest.mark.parametrize(("value", "message"), CALL_FAULTS[:-3])
def test_faults_of_the_call_skip_or_stand_in(value: Any, message: str) -> None:
    assert totals([length, returns(value)], on_error="skip") == [None] * 3
    assert totals([length, returns(value)], on_error=-1) == [0.0, 1.0, 2.0]


def test_exception_is_chained_and_named() -> None:
    def broken(completions, **kwargs):
        raise KeyError("no such judge")

    with pytest.raises(RunError, match=r"the reward 'broken' failed .*KeyError: 'no such judge'") as caught:
        totals([broken])
    assert isinstance(caught.value.__cause__, KeyError)


def test_function_that_calls_exit_does_not_end_the_run() -> None:
    def leaves(completions, **kwargs):
        raise SystemExit(3)

    assert totals([leaves], on_error="skip") == [None] * 3
    with pytest.raises(RunError, match="ended by SystemExit: 3"):
        totals([leaves])


def test_ctrl_c_is_not_an_error_of_the_function() -> None:
    def interrupted(completions, **kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        totals([interrupted], on_error="skip")


def test_sum_that_overflows_is_an_error() -> None:
    funcs = [returns([1e308] * 3), returns([1e308] * 3)]
    with pytest.raises(RunError, match="the weighted sum of rewards is inf in row 1"):
        totals(funcs)
    assert totals(funcs, on_error="skip") == [None] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0, 2.0]}, "2 weights for 1 functions"),
        ({"weights": [math.nan]}, "must be finite"),
        ({"on_error": "ignore"}, "'ignore' is not 'fail', 'skip' or a finite number"),
        ({"on_error": True}, "True is not 'fail'"),
        ({"on_error": math.inf}, "inf is not 'fail'"),
        ({"timeout": 0}, "timeout: 0 must be a positive number"),
    ],
)
def test_wrong_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Rewards([length], **options)


def test_no_functions_or_no_function() -> None:
    with pytest.raises(UserError, match="no reward function given"):
        Rewards([])
    with pytest.raises(UserError, match="3 is int, not a function"):
        Rewards([3])


def test_constant_rewards_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    rewards = Rewards([returns([1.0, 1.0, 1.0])])
    reported = []
    for batch in range(1, 112):
        rewards.score(PROMPTS, COMPLETIONS)
        if caplog.records:
            reported.append(batch)
            assert f"each of the last {batch} batches" in caplog.text
            caplog.clear()
    assert reported == [10, 60, 110]


def test_changing_rewards_are_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    rewards = Rewards([length])
    for batch in range(30):
        rewards.score(PROMPTS, COMPLETIONS if batch % 9 == 0 else ["a"] * 3)
        rewards.score(PROMPTS[:1], COMPLETIONS[:1])  # one completion says nothing about spread
    assert not caplog.records
