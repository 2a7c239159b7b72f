"""The replay buffer against a plain list that is kept the slow way, under every sequence of what can be done to it."""

import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.numpy import load, save

from llm_dqn import episode_store
from llm_dqn.errors import RunError, UserError
from llm_dqn.priority_tree import PriorityTree
from llm_dqn.replay import PrefixReplay, prioritized, success_biased, uniform
from llm_dqn.types import Episode
from tests.networks import episode

GAMMA = 0.9
RULES = {"uniform": uniform(), "success": success_biased(0.5), "prioritized": prioritized(half_life=3)}


@st.composite
def episodes(draw: st.DrawFn) -> Episode:
    ids = st.integers(0, 300)
    completion = draw(st.lists(ids, min_size=1, max_size=5))
    facts = {"ended": draw(st.sampled_from(["eos", "length"])), "policy_version": draw(st.integers(0, 9))}
    reward = draw(st.floats(-5, 5, width=32, allow_subnormal=False))
    return episode(draw(st.lists(ids, max_size=4)), completion, reward, source="online", **facts)


class AgainstAList(RuleBasedStateMachine):
    """`self.kept`: what the buffer should hold, the oldest first, as [episode, priority, slot]."""

    @initialize(
        capacity=st.integers(1, 9),
        segment_size=st.integers(1, 5),
        truncated=st.sampled_from(["t", "b"]),
        disk=st.booleans(),
    )
    def begin(self, capacity: int, segment_size: int, truncated: str, disk: bool) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.options = {
            "scratch": Path(self.folder.name, "run", "segment") if disk else None,
            "gamma": GAMMA,
            "truncated": {"t": "terminal", "b": "bootstrap"}[truncated],
            "segment_size": segment_size,
        }
        self.replay = PrefixReplay(capacity, **self.options)
        self.kept: list[list] = []
        self.count = 0

    def teardown(self) -> None:
        self.folder.cleanup()

    def by_slot(self) -> list[list]:
        return sorted(self.kept, key=lambda row: row[2])

    @rule(several=st.lists(episodes(), max_size=6))
    def add(self, several: list[Episode]) -> None:
        fresh = max((row[1] for row in self.kept), default=1.0)
        self.replay.add(several)
        for one in several:
            self.kept.append([one, fresh, self.count % self.replay.capacity])
            self.kept = self.kept[-self.replay.capacity :]
            self.count += 1

    @rule(good=episodes(), bad=st.sampled_from([float("nan"), float("inf")]))
    def refuse_the_whole_call(self, good: Episode, bad: float) -> None:
        with pytest.raises(ValueError, match="finite"):
            self.replay.add([good, episode([1], [2], bad)])

    @precondition(lambda self: self.kept)
    @rule(data=st.data(), name=st.sampled_from(sorted(RULES)), size=st.integers(1, 12), seed=st.integers(0, 99))
    def sample(self, data: st.DataObject, name: str, size: int, seed: int) -> None:
        batch = self.replay.sample(size, np.random.default_rng(seed), RULES[name])
        rows = self.by_slot()
        for i, slot in enumerate(batch.slots.tolist()):
            one = rows[slot][0]
            prompt, length = one.prompt_ids.tolist(), len(one.completion_ids)
            ids = prompt + one.completion_ids.tolist()
            tokens = batch.tokens
            assert tokens.input_ids[i].tolist() == ids + [0] * (tokens.input_ids.shape[1] - len(ids))
            assert tokens.attention_mask[i].sum() == len(ids) and tokens.prompt_lengths[i] == len(prompt)
            assert tokens.actions[i, :length].tolist() == ids[len(prompt) :] and tokens.action_mask[i].sum() == length
            assert torch.equal(batch.ref_logprobs[i, :length], one.ref_logprobs)
            assert batch.rewards[i].tolist() == [0] * (length - 1) + [one.reward] + [0] * (
                batch.rewards.shape[1] - length
            )
            goes_on = one.ended == "length" and self.replay.truncated == "bootstrap"
            discounts = [GAMMA] * (length - 1) + [GAMMA if goes_on else 0]
            assert batch.discounts[i, :length].tolist() == pytest.approx(discounts)

    @precondition(lambda self: self.kept)
    @rule(
        data=st.data(),
        errors=st.lists(
            st.floats(0, 9, width=32, allow_subnormal=False) | st.sampled_from([float("nan"), float("inf")]), max_size=5
        ),
    )
    def update_priorities(self, data: st.DataObject, errors: list[float]) -> None:
        slots = [data.draw(st.integers(0, len(self.kept) - 1)) for _ in errors]
        drawn_at = data.draw(st.none() | st.integers(0, self.count))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.replay.update_priorities(torch.tensor(slots).long(), torch.tensor(errors).double(), drawn_at)
        assert bool(caught) == (not np.isfinite(errors).all())
        rows, oldest = self.by_slot(), self.count - len(self.kept)
        for slot, error in zip(slots, errors, strict=True):
            number = oldest + next(i for i, row in enumerate(self.kept) if row is rows[slot])
            if np.isfinite(error) and (drawn_at is None or number < drawn_at):
                rows[slot][1] = error

    @rule(way=st.sampled_from(["flat", "segments"]), vocabulary=st.sampled_from([b"", b"v" * 32]))
    def save_and_load(self, way: str, vocabulary: bytes) -> None:
        again = PrefixReplay(self.replay.capacity, vocabulary=vocabulary, **self.options)
        if way == "flat":
            again.load_arrays(load(save(self.replay.state_arrays())))
        else:
            again.restore(load(save(self.replay.snapshot())))
        self.replay = again

    @rule(capacity=st.integers(1, 9), way=st.sampled_from(["flat", "segments"]), segment_size=st.integers(1, 5))
    def change_capacity(self, capacity: int, way: str, segment_size: int) -> None:
        """The newest that fit are kept; priorities go with their episodes."""
        self.options["segment_size"] = segment_size
        again = PrefixReplay(capacity, **self.options)
        again.load_arrays(self.replay.state_arrays()) if way == "flat" else again.restore(self.replay.snapshot())
        self.kept = self.kept[-capacity:]
        self.count, self.replay = again.added, again
        for number, row in enumerate(self.kept, start=self.count - len(self.kept)):
            row[2] = number % capacity

    @precondition(lambda self: len(self.kept) > self.options["segment_size"])
    @rule()
    def lose_a_segment(self) -> None:
        arrays = self.replay.snapshot()
        lost = min(name.partition("/")[0] for name in arrays if name.startswith("segment-"))
        end = (int(lost.partition("-")[2]) + 1) * self.options["segment_size"]  # first number behind it
        first = self.count - len(self.kept)
        self.replay.restore({name: array for name, array in arrays.items() if not name.startswith(lost)})
        self.kept = self.kept[end - first :]
        self.count = len(self.kept)
        for number, row in enumerate(self.kept):
            row[2] = number

    @invariant()
    def says_what_the_list_says(self) -> None:
        rows = self.by_slot()
        assert len(self.replay) == len(rows) and self.replay.added == self.count
        assert self.replay.rewards.tolist() == [row[0].reward for row in rows]
        assert self.replay.versions.tolist() == [row[0].policy_version for row in rows]
        assert self.replay.priorities.tolist() == [row[1] for row in rows]
        stored = sum(array.size for name, array in self.replay.snapshot().items() if name.endswith("/tokens"))
        most = len(rows) + self.options["segment_size"]
        assert stored <= most * 9  # what was overwritten does not stay
        assert not list(Path(self.folder.name).glob("run/*"))  # nothing would be left after a kill

    @precondition(lambda self: self.kept)
    @invariant()
    def successes_are_those_of_now(self) -> None:
        rewards = np.array([row[0].reward for row in self.by_slot()])
        good, others = self.replay.successes()
        assert good.tolist() == np.flatnonzero(rewards > rewards.mean() + 1e-9).tolist()
        assert sorted([*good, *others]) == list(range(len(rewards)))

    @invariant()
    def trees_are_those_that_a_resumed_run_builds(self) -> None:
        for (alpha, half_life), tree in self.replay._trees.items():
            again = PriorityTree(self.replay.priorities, self.replay.versions, alpha, half_life)
            drawn, expected = (each.draw(64, np.random.default_rng(self.count)) for each in (tree, again))
            assert drawn.tolist() == expected.tolist()


AgainstAList.TestCase.settings = settings(
    max_examples=200, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAgainstAList = AgainstAList.TestCase


def test_episodes_of_another_tokenizer_are_refused():
    replay = PrefixReplay(4, vocabulary=b"a" * 32)
    replay.add([episode([1], [2])])
    with pytest.raises(UserError, match="another tokenizer"):
        PrefixReplay(4, vocabulary=b"b" * 32).restore(replay.snapshot())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("rewards", lambda a: a * np.nan, "not finite"),
        ("priorities", lambda a: a * np.inf, "not finite"),
        ("rewards", lambda a: a[:-1], "columns of"),
        ("prompt_lengths", lambda a: a + 10, "lengths that cannot be"),
        ("token_starts", lambda a: a - 1, "lengths that cannot be"),
        ("segment-000000/tokens", lambda a: a[:-1], "fewer tokens"),
        ("segment-000000/ref_logprobs", lambda a: a[:-1], "fewer ref_logprobs"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(name, change, message):
    replay = PrefixReplay(4)
    replay.add([episode([1, 3], [2]), episode([1], [2, 5])])
    arrays = replay.snapshot()
    with pytest.raises(RunError, match=message):
        PrefixReplay(4).restore(arrays | {name: change(arrays[name])})


def test_equal_priorities_of_zero_are_drawn_evenly_and_slots_out_of_reach_are_refused():
    replay = PrefixReplay(4)
    replay.add([episode([1], [2]) for _ in range(3)])
    replay.update_priorities(torch.tensor([0, 1, 2]), torch.zeros(3))
    drawn = prioritized()(replay, 30_000, np.random.default_rng(0))
    assert np.allclose(np.bincount(drawn) / 30_000, 1 / 3, atol=0.02)
    with pytest.raises(ValueError, match="slots must lie in 0 to 2"):
        replay.update_priorities(torch.tensor([3]), torch.zeros(1))


@pytest.mark.parametrize("half_life", [0.01, 3.0, 1000.0])
def test_shares_of_draws_are_those_of_the_formula(half_life):
    """By brute force after many changes, some of them so late that all older weights are nothing beside the new."""
    rng, alpha = np.random.default_rng(0), 0.6
    priorities, versions = rng.exponential(size=5), np.sort(rng.integers(0, 9, 5))
    tree = PriorityTree(priorities, versions, alpha, half_life)
    for step in [*range(0, 40, 7), 1_000_000]:
        slots = np.unique(rng.integers(0, len(priorities) + 3, 4))
        new = np.arange(len(priorities), max(len(priorities), slots.max() + 1))
        slots = np.union1d(slots, new)
        priorities, versions = (np.concatenate([values, np.zeros(len(new))]) for values in (priorities, versions))
        priorities[slots], versions[slots] = rng.exponential(size=len(slots)), step
        tree.set(slots, priorities[slots], versions[slots])
        with np.errstate(under="ignore"):
            weights = (priorities + 1e-6) ** alpha * 0.5 ** ((step - versions) / half_life)
        drawn = np.bincount(tree.draw(20_000, rng), minlength=len(weights)) / 20_000
        assert np.allclose(drawn, weights / weights.sum(), atol=0.02)
        again = PriorityTree(priorities, versions, alpha, half_life)
        drawn, expected = (each.draw(500, np.random.default_rng(step)) for each in (tree, again))
        assert drawn.tolist() == expected.tolist()


def test_old_episodes_are_drawn_when_all_newer_ones_are_gone():
    replay, rule = PrefixReplay(2), prioritized(half_life=0.01)
    replay.add([episode([1], [2], policy_version=version) for version in (0, 900)])
    assert set(rule(replay, 50, np.random.default_rng(0))) == {1}
    replay.add([episode([1], [2], policy_version=0), episode([1], [2], policy_version=0)])  # of a slow collector
    assert set(rule(replay, 50, np.random.default_rng(0))) == {0, 1}


def test_a_disk_that_is_full_is_told_with_the_cure(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(episode_store, "save_file", full)
    replay = PrefixReplay(9, segment_size=2, scratch=tmp_path / "segment")
    with pytest.raises(RunError, match=r"could not be written to .*No space left.*replay\.storage: memory"):
        replay.add([episode([1], [2]) for _ in range(3)])


def test_what_the_buffer_shows_cannot_be_written_to():
    replay = PrefixReplay(4)
    replay.add([episode([1], [2])])
    with pytest.raises(ValueError, match="read-only"):
        replay.rewards[0] = 7.0


def test_a_snapshot_stays_as_it_was_while_the_buffer_goes_on():
    replay = PrefixReplay(5, segment_size=3)
    replay.add([episode([1], [i, 2]) for i in range(4)])
    arrays = replay.snapshot()
    before = {name: array.tobytes() for name, array in arrays.items()}
    replay.add([episode([7], [9, 9, 9]) for _ in range(9)])
    replay.update_priorities(torch.tensor([0, 1]), torch.tensor([5.0, 6.0]))
    assert {name: array.tobytes() for name, array in arrays.items()} == before
