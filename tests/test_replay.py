"""Episodes in, padded transitions out: alignment, discounts and sampling on hand-made numbers."""

import numpy as np
import pytest
import torch

from llm_dqn.replay import PrefixReplay, by_rewards, prioritized, recent, success_biased, uniform
from tests.networks import episode


def _filled(capacity: int = 8, rewards=(0.0, 1.0, 0.5), **options) -> PrefixReplay:
    replay = PrefixReplay(capacity, **options)
    for number, reward in enumerate(rewards):
        replay.add([episode([10 + number] * (number + 1), [20 + number, 30 + number, 40][: number + 1], reward)])
    return replay


def test_batch_lays_out_states_actions_and_rewards():
    replay = PrefixReplay(4, gamma=0.9)
    replay.add([episode([5, 6], [7, 8, 2], reward=3.0), episode([9, 9, 9], [4], reward=-1.0, ended="length")])
    batch = replay.batch(np.array([0, 1]))
    assert batch.tokens.input_ids.tolist() == [[5, 6, 7, 8, 2], [9, 9, 9, 4, 0]]
    assert batch.tokens.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.tokens.prompt_lengths.tolist() == [2, 3]
    assert batch.tokens.actions.tolist() == [[7, 8, 2], [4, 0, 0]]
    assert batch.action_mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.rewards.tolist() == [[0, 0, 3.0], [-1.0, 0, 0]]
    assert torch.allclose(batch.discounts, torch.tensor([[0.9, 0.9, 0.0], [0.0, 0, 0]]))
    assert batch.ref_logprobs.tolist() == [[-1, -2, -3], [-1, 0, 0]]


def test_truncation_is_termination_only_when_it_is_said_to_be():
    cut, finished = episode([5], [7, 8], 1.0, ended="length"), episode([5], [7, 2], 1.0, ended="eos")
    for truncated, last in (("terminal", 0.0), ("bootstrap", 0.9)):
        replay = PrefixReplay(4, gamma=0.9, truncated=truncated)
        replay.add([cut, finished])
        discounts = replay.batch(np.array([0, 1])).discounts
        assert torch.allclose(discounts, torch.tensor([[0.9, last], [0.9, 0.0]]))


def test_the_oldest_episode_makes_room():
    replay = _filled(capacity=2, rewards=(1.0, 2.0, 3.0))
    assert len(replay) == 2 and sorted(replay.rewards) == [2.0, 3.0]
    assert replay.rewards.tolist() == [3.0, 2.0]  # the slot of the oldest is taken


def test_the_nats_of_what_came_last_are_told_by_its_writer():
    assert PrefixReplay(4).nats(64).tolist() == []
    replay = PrefixReplay(3)
    for length in (1, 2, 3, 4):
        replay.add([episode([5], [7] * length, behaviour_logprobs=torch.full((length,), -0.5))])
    assert replay.nats(64).tolist() == [1.0, 1.5, 2.0] and replay.nats(2).tolist() == [1.5, 2.0]


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_nothing_that_is_not_finite_enters(reward):
    with pytest.raises(ValueError, match="finite"):
        PrefixReplay(2).add([episode([1], [2], reward)])


def test_empty_buffer_and_empty_completion_are_refused():
    with pytest.raises(ValueError, match="empty"):
        PrefixReplay(2).sample(1, np.random.default_rng(0), uniform())
    with pytest.raises(ValueError, match="at least one action"):
        PrefixReplay(2).add([episode([1], [])])


def test_uniform_sampling_reaches_every_episode_equally():
    replay = _filled(rewards=(0.0, 1.0, 0.5))
    slots = uniform()(replay, 30_000, np.random.default_rng(0))
    assert np.allclose(np.bincount(slots) / 30_000, 1 / 3, atol=0.02)


def test_success_biased_sampling_keeps_its_share():
    replay = _filled(capacity=100, rewards=(0.0,) * 9 + (1.0,))
    slots = success_biased(0.7)(replay, 10_000, np.random.default_rng(0))
    assert np.mean(slots == 9) == pytest.approx(0.7, abs=0.001)
    many = _filled(capacity=100, rewards=(1.0,) * 9 + (0.0,))
    slots = success_biased(0.7)(many, 10_000, np.random.default_rng(0))
    assert np.mean(slots == 9) == pytest.approx(0.1, abs=0.001), "never rarer than in the buffer"
    equal = _filled(rewards=(0.5, 0.5, 0.5))
    assert set(success_biased(0.7)(equal, 300, np.random.default_rng(0))) == {0, 1, 2}


def test_a_single_success_is_drawn_so_many_times_as_often_as_a_failure():
    replay = _filled(capacity=100, rewards=(0.0,) * 19 + (1.0,))
    rng, rule = np.random.default_rng(0), success_biased(0.7, odds=8.0)
    slots = np.concatenate([rule(replay, 16, rng) for _ in range(5_000)])
    times = np.bincount(slots, minlength=20)
    assert times[19] / times[:19].mean() == pytest.approx(8.0, rel=0.05)


def test_an_older_success_is_drawn_less_often():
    replay = PrefixReplay(8)
    replay.add([episode([1], [2], 0.0)] * 2 + [episode([1], [2], 1.0, policy_version=step) for step in (0, 64, 128)])
    slots = success_biased(0.5, half_life=64.0)(replay, 20_000, np.random.default_rng(0))
    shares = np.bincount(slots, minlength=5) / 20_000
    assert shares[:2].sum() == pytest.approx(0.4, abs=0.001), "three of five are there"
    assert shares[4] / shares[3] == pytest.approx(2, rel=0.06) and shares[3] / shares[2] == pytest.approx(2, rel=0.06)
    replay.add([episode([1], [2], 1.0, policy_version=5000)])  # the others are forgotten in time, not lost
    assert set(success_biased(0.5, half_life=1.0)(replay, 99, np.random.default_rng(0))) == {0, 1, 5}


def test_where_a_judge_grades_newer_episodes_are_drawn_more_often_whatever_their_grade():
    replay, facts = PrefixReplay(8), zip((0.1, 0.9, 0.4, 0.6), (0, 0, 64, 64), strict=True)
    replay.add([episode([1], [2], reward, policy_version=step) for reward, step in facts])
    rule = by_rewards(half_life=64.0)
    replay.graded = True
    counts = np.bincount(rule(replay, 30_000, np.random.default_rng(0)), minlength=4) / 30_000
    assert counts == pytest.approx([1 / 6, 1 / 6, 1 / 3, 1 / 3], abs=0.02)
    replay.graded = False
    same = [some(replay, 99, np.random.default_rng(0)).tolist() for some in (rule, success_biased(0.7, half_life=64.0))]
    assert same[0] == same[1]
    assert set(recent(None)(replay, 99, np.random.default_rng(0))) == {0, 1, 2, 3}
    replay.graded = True
    rule(replay, 9, np.random.default_rng(0))  # what it derived from the four
    replay.add([episode([1], [2], 0.5, policy_version=64 * 20)])
    assert (rule(replay, 999, np.random.default_rng(0)) == 4).mean() > 0.99


def test_predicted_rewards_are_none_of_those_that_repeat_or_differ():
    replay = PrefixReplay(32)
    replay.add([episode([1], [2], reward) for reward in (0.0, 1.0, 1.0)])
    assert replay.kinds.right_or_wrong and replay.kinds.repeat and not replay.imagined
    replay.add([episode([1], [2], 0.1 * number, source="imagined") for number in range(9)])
    assert replay.kinds.right_or_wrong and replay.kinds.repeat and replay.imagined
    grades = PrefixReplay(32)
    grades.add([episode([1], [2], 0.05 * number) for number in range(20)])
    assert len(grades.kinds.values) == 20 and not grades.kinds.repeat
    grades.add([episode([1], [2], 0.5)])  # a judge finds the same text as good as before
    assert len(grades.kinds.values) == 20 and not grades.kinds.repeat
    grades.add([episode([1], [2], 0.5) for _ in range(3)])
    assert grades.kinds.repeat


def test_where_only_the_best_is_imitated_it_is_a_quarter():
    replay = PrefixReplay(32)
    replay.best_alone = True
    replay.add([episode([1], [2], reward) for reward in (0.0, 1.0) * 4])
    assert replay.imitable(np.arange(8)).all()  # what is wrong is nothing to imitate, whoever asks
    replay.add([episode([1], [2], reward) for reward in (0.25, 0.5, 0.75, 1.0) * 2])
    rewards = replay.rewards.copy()
    assert list(replay.imitable(np.arange(16))) == list(rewards == 1)
    assert list(replay.successes()[0]) == list(np.flatnonzero(rewards == 1))
    replay.imitated_share = 0.5
    assert list(replay.imitable(np.arange(16))) == list(rewards > rewards.mean())
    replay.graded = True
    assert replay.imitable(np.arange(16)).all()  # these are learned from in both directions
    replay.graded, replay.best_alone = False, False
    assert replay.imitable(np.arange(16)).all()


def test_prioritized_sampling_prefers_large_and_recent_errors():
    replay = PrefixReplay(4)
    replay.add([episode([1], [2], 0.0, policy_version=version) for version in (0, 0, 1000)])
    replay.update_priorities(torch.tensor([0, 1, 2]), torch.tensor([0.0, 1.0, 1.0]))
    slots = prioritized(alpha=1.0, half_life=1000)(replay, 10_000, np.random.default_rng(0))
    shares = np.bincount(slots, minlength=3) / 10_000
    assert shares[0] < 0.01 and shares[2] / shares[1] == pytest.approx(2.0, rel=0.1)


def test_a_saved_buffer_comes_back_equal():
    replay = _filled(capacity=3, rewards=(1.0, 2.0, 3.0, 4.0))
    replay.update_priorities(torch.tensor([1]), torch.tensor([0.25]))
    again = PrefixReplay(3)
    again.load_arrays(replay.state_arrays())
    first, second = (r.sample(5, np.random.default_rng(3), uniform()) for r in (replay, again))
    assert torch.equal(first.tokens.input_ids, second.tokens.input_ids)
    assert torch.equal(first.ref_logprobs, second.ref_logprobs) and torch.equal(first.rewards, second.rewards)
    assert again.added == replay.added and again.priorities.tolist() == replay.priorities.tolist()
    for buffer in (replay, again):  # both go on in the same slot
        buffer.add([episode([1], [2], 9.0)])
    assert replay.rewards.tolist() == again.rewards.tolist()


def test_an_empty_buffer_can_be_saved():
    again = PrefixReplay(3)
    again.load_arrays(PrefixReplay(3).state_arrays())
    assert len(again) == 0


def test_the_newest_episodes_come_with_what_their_writer_thought_of_them():
    replay = PrefixReplay(3)
    written = [episode([1], [2, 3], behaviour_logprobs=torch.tensor([-float(n), -0.5])) for n in range(5)]
    replay.add(written)
    [batch] = replay.newest(2, rows=2)
    assert batch.behaviour_logprobs.tolist() == [[-3.0, -0.5], [-4.0, -0.5]]
    assert batch.slots.tolist() == [0, 1]
    assert [batch.slots.tolist() for batch in replay.newest(10, rows=2)] == [[2, 0], [1]], "no more than there are"
    replay.add([episode([1], [2, 3], policy_version=4)])
    assert [batch.slots.tolist() for batch in replay.newest(10, rows=2)] == [[2]], "none by an older policy"
