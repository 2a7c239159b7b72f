"""Right or wrong, counted or graded: what a number of rewards is taken for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_dqn.reward_kinds import RewardKinds

RNG = np.random.default_rng(0)
RIGHT = (RNG.random(64) < 0.25).astype(float)
GRADES = RNG.beta(0.5, 0.5, 64)  # most of them near 0 or 1, as those of a sure judge


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        (RIGHT, "right or wrong"),
        (RIGHT * 100 - 3, "right or wrong"),
        (RIGHT + RNG.normal(0, 0.05, 64), "right or wrong"),  # an unsure judge
        (RIGHT + 0.1 * RNG.random(64), "right or wrong"),  # a bonus for something else
        (np.where(RIGHT > 0, 1.2, RNG.choice([0.0, 0.2], 64)), "right or wrong"),  # a little for the form
        (RNG.integers(0, 6, 64) / 5, "counted"),  # parts of an answer
        (-np.abs(RNG.integers(-20, 20, 64)).astype(float), "counted"),  # a distance
        (np.r_[-100.0, RNG.integers(0, 6, 63)], "counted"),  # with a penalty once
        (GRADES, "grades"),
        (RNG.normal(0, 1, 64), "grades"),
        (RIGHT + RNG.normal(0, 0.5, 64), "grades"),
        (np.r_[-10.0, -10.0, GRADES], "grades"),
    ],
)
def test_kinds(rewards, expected):
    kinds = RewardKinds.of(rewards)
    told = "right or wrong" if kinds.right_or_wrong else "grades" if kinds.grades else "counted"
    assert told == expected and kinds.repeat == (len(kinds.values) < 0.9 * len(rewards))


@pytest.mark.parametrize("rewards", [[], [0.5], [0.5] * 9])
def test_nothing_is_said_of_rewards_that_do_not_differ(rewards):
    kinds = RewardKinds.of(rewards)
    assert not kinds.right_or_wrong and not kinds.grades


@pytest.mark.parametrize(
    ("rewards", "alone"),
    [
        ([0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 1.0], True),
        ([-3.0, -2.0, -1.0, 0.0, 0.0, 0.0, 0.0], True),
        ([0.0] * 7 + [0.3, 0.5, 1.0], False),  # most get nothing
        ([0.0] * 7 + [1.0] * 3, False),
        (GRADES, False),
        ([0.5] * 9, False),
        ([], False),
    ],
)
def test_the_best_alone_counts_where_most_completions_get_some_of_the_reward(rewards, alone):
    assert RewardKinds.of(rewards).best_alone is alone


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 7.0]), min_size=3, max_size=12))
def test_the_best_split_is_that_of_all_splits(rewards):
    kinds = RewardKinds.of(rewards)
    if len(kinds.values) < 2:
        return
    whole = np.var(rewards)
    found = []
    for value in kinds.values[1:]:
        low, high = [r for r in rewards if r < value], [r for r in rewards if r >= value]
        within = (len(low) * np.var(low) + len(high) * np.var(high)) / len(rewards)
        found.append((len(low) / len(rewards), 1 - within / whole))
    below, explained = kinds._best_split()
    assert explained == pytest.approx(max(each for _, each in found))
    assert any(below == pytest.approx(share) and explained == pytest.approx(each) for share, each in found)


@given(st.lists(st.integers(-3, 9).map(float), min_size=1, max_size=40), st.floats(0.01, 1.0))
def test_the_best_share_is_above_the_mean_and_no_larger_than_ties_make_it(rewards, share):
    least = RewardKinds.of(rewards).best(share)
    best = [reward for reward in rewards if reward >= least]
    if len(set(rewards)) == 1:
        assert least == rewards[0]
        return
    assert best and least > np.mean(rewards)
    above = [reward for reward in rewards if reward > np.mean(rewards) + 1e-9]
    assert len([reward for reward in rewards if reward > least]) <= share * (len(rewards) - 1) + 1
    assert least == max(np.quantile(rewards, 1 - share, method="lower"), min(above))


@pytest.mark.parametrize("unit", [1e-12, 1e300])
def test_the_unit_of_rewards_does_not_matter(unit):
    kinds = RewardKinds.of((RIGHT + 0.1 * GRADES) * unit)
    assert kinds.right_or_wrong and not RewardKinds.of(GRADES * unit).right_or_wrong
