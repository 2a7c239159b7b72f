"""No request is scored twice by a function that is deterministic, and every one by a function that is not."""

import random
from pathlib import Path

import pytest

from llm_dqn import reward_cache
from llm_dqn.rewards import Rewards
from tests import reward_examples
from tests.test_reward_functions import save_judge

TEXTS = [f"text {n % 8}" for n in range(40)]  # 8 different, 32 repeats: as many as the trial takes


def totals(rewards, completions, columns=None, prompt="p"):
    count = len(completions)
    return [result.total for result in rewards.score([prompt] * count, completions, columns and columns[:count])]


def counting(function):
    """The function, and the completions it was asked about in each call."""
    calls = []

    def counted(completions, **columns):
        calls.append(list(completions))
        return function(completions, **columns)

    return counted, calls


def test_repeats_are_asked_during_the_trial_and_spared_after_it_within_calls_and_across():
    function, calls = counting(
        lambda completions, answer, **_: [len(c) + a for c, a in zip(completions, answer, strict=True)]
    )
    rewards, ones = Rewards([function]), [{"answer": 1}] * 40
    assert totals(rewards, TEXTS, ones) == [7] * 40 and calls.pop() == TEXTS  # the trial
    assert totals(rewards, ["text 1", "new", "new", "text 2"], ones) == [7, 4, 4, 7] and calls.pop() == ["new"]
    assert totals(rewards, ["new", "text 1"], ones) == [4, 7] and not calls  # nobody is called
    assert totals(rewards, ["new", "new"], [{"answer": 1}, {"answer": 2}]) == [4, 5] and calls.pop() == ["new"]
    assert totals(rewards, ["new"], ones, prompt="q") == [4] and calls.pop() == ["new"]
    assert rewards.calls == 49  # the budget counts what was judged, not what was asked
    assert rewards.cached_share() == pytest.approx(6 / 49) and rewards.cached_share() == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda completions, **_: [random.random() for _ in completions],
        lambda completions, **_: [float(place) for place, _ in enumerate(completions)],  # looks at the batch
    ],
)
def test_a_function_that_contradicts_itself_is_asked_everything(function):
    counted, calls = counting(function)
    rewards = Rewards([counted])
    for _ in range(3):
        totals(rewards, TEXTS)
    assert calls == [TEXTS] * 3 and rewards.cached_share() == 0


def test_abstentions_faults_and_what_is_no_json_are_asked_again():
    def choosy(completions, **_):
        return [None if c == "silent" else float("nan") if c == "broken" else 1.0 for c in completions]

    function, calls = counting(choosy)
    rewards = Rewards([function], on_error=-1.0)
    totals(rewards, TEXTS)
    for _ in range(2):
        assert totals(rewards, ["text 1", "broken", "silent"]) == [1.0, -1.0, None]
        assert calls[-1] == ["broken", "silent"]
    for _ in range(2):
        assert totals(rewards, ["text 1"], [{"image": object()}]) == [1.0] and calls[-1] == ["text 1"]


def test_async_functions_and_those_in_a_process_of_their_own_are_spared_too(tmp_path):
    asked = []

    async def later(completions, **_):
        asked.append(len(completions))
        return [2.0] * len(completions)

    log = [{"log": str(tmp_path / "asked")}] * 40
    rewards = Rewards([later, reward_examples.count_into_log], timeout=30)
    try:
        for completions in (TEXTS, ["text 1", "new"], ["new"]):
            assert set(totals(rewards, completions, log)) == {3.0}
    finally:
        rewards.close()
    assert asked == [40, 1] and Path(tmp_path / "asked").read_text() == "40 1 "


def test_a_reward_model_is_spared_repeats_within_a_call_only(tmp_path, monkeypatch):
    rewards = Rewards([save_judge(tmp_path, num_labels=1)])
    model, rows = rewards.functions[0].function, []
    logits = model._logits
    monkeypatch.setattr(model, "_logits", lambda encoded: rows.append(len(encoded)) or logits(encoded))
    once = totals(rewards, ["a joy", "dull", "a joy", "a joy"])
    assert rows == [2] and once[0] == once[2] == once[3] != once[1]
    assert totals(rewards, ["a joy", "dull"]) == once[:2] and rows == [2, 2]


def test_it_can_be_switched_off_and_is_bounded(monkeypatch):
    function, calls = counting(reward_examples.length)
    rewards = Rewards([function], cache=False)
    totals(rewards, TEXTS)
    assert totals(rewards, ["text 1"] * 3) == [6] * 3 and calls[-1] == ["text 1"] * 3
    monkeypatch.setattr(reward_cache, "CAPACITY", 8)
    function, calls = counting(reward_examples.length)
    rewards = Rewards([function])
    totals(rewards, TEXTS)
    totals(rewards, ["text 0", "new"])  # text 1 is now the longest unused
    totals(rewards, ["text 0", "text 1", "new"])
    assert calls[-1] == ["text 1"]
