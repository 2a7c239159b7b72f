"""Prefix replay: whole episodes are stored once and every prefix of them is learned from."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from llm_dqn.episode_store import EpisodeStore
from llm_dqn.priority_tree import PriorityTree
from llm_dqn.reward_kinds import IMITATED, RewardKinds
from llm_dqn.types import Episode, PrefixBatch, TokenBatch

SamplingRule = Callable[["PrefixReplay", int, np.random.Generator], np.ndarray]
SUCCESS_SHARE = 0.7  # of a batch, where nothing else is asked for


def uniform() -> SamplingRule:
    """Every stored episode is equally likely. Lin 1992; Mnih et al. 2015."""

    def sample(replay: "PrefixReplay", size: int, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(len(replay), size=size)

    return sample


def recent(half_life: float | None) -> SamplingRule:
    """An episode is half as likely as one that was written `half_life` learner steps later; None: uniform."""
    if half_life is None:
        return uniform()

    def sample(replay: "PrefixReplay", size: int, rng: np.random.Generator) -> np.ndarray:
        return _drawn(replay.faded(half_life), size, rng)

    return sample


def _drawn(running: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count,) places in proportion to weights whose running sum is (n,)."""
    places = np.searchsorted(running, rng.random(count) * running[-1], side="right")
    return places.clip(max=len(running) - 1)  # rounding may reach the end


def success_biased(share: float, odds: float = math.inf, half_life: float | None = None) -> SamplingRule:
    """`share` of a batch are episodes that scored above the buffer's mean reward: the rare good ones.

    odds: how many times likelier than any other each of them may be drawn, on average. While there are few, that lowers
    their share: one lucky episode seen over and over is learned by heart, mistakes included. Never below their share
    of the buffer. half_life: learner steps after which a success is drawn half as often; those of a better policy are
    less a matter of luck. Positive-bias sampling as in https://arxiv.org/abs/2604.08706; both limits are measured in
    `benchmarks/LOG.md`. Uniform while all rewards are equal.
    """

    def sample(replay: "PrefixReplay", size: int, rng: np.random.Generator) -> np.ndarray:
        successes, others = replay.successes()
        if not len(successes):
            return rng.integers(len(replay), size=size)
        there = len(successes) / len(replay)
        limited = 1 / (1 + (1 - there) / (there * odds))
        count = int(size * max(there, min(share, limited)) + rng.random())  # rounded up or down at random: exact mean
        if half_life is None:
            drawn = rng.choice(successes, size=count)
        else:
            drawn = successes[_drawn(replay.faded(half_life, successes=True), count, rng)]
        return np.concatenate([drawn, rng.choice(others, size=size - count)])

    return sample


def by_rewards(odds: float = math.inf, half_life: float | None = None, share: float = SUCCESS_SHARE) -> SamplingRule:
    """`success_biased` where rewards say right or wrong, `recent` where a judge grades (`PrefixReplay.graded`).

    What is right can be imitated token by token. A grade above the mean is still one among many, and those below it
    say as much, see `losses.tapered`.
    """
    checked, graded = success_biased(share, odds, half_life), recent(half_life)

    def sample(replay: "PrefixReplay", size: int, rng: np.random.Generator) -> np.ndarray:
        return (graded if replay.graded else checked)(replay, size, rng)

    return sample


def prioritized(alpha: float = 0.6, half_life: float = 1000.0) -> SamplingRule:
    """Probability ~ (mean |TD error| of the episode)^alpha, halved for every `half_life` learner steps of age.

    Schaul et al. 2016, https://arxiv.org/abs/1511.05952, for whole sequences; the decay keeps stale priorities from
    ruling the buffer, https://arxiv.org/abs/2604.16918.
    """

    def sample(replay: "PrefixReplay", size: int, rng: np.random.Generator) -> np.ndarray:
        return replay.priority_tree(alpha, half_life).draw(size, rng)

    return sample


ENDED = ("eos", "length")
SOURCES = ("online", "logged", "imagined")
_, LOGGED, IMAGINED = range(len(SOURCES))
LOGPROBS = ("ref_logprobs", "behaviour_logprobs")
SMALLEST_TOTAL = 1e-150  # of the weights in a tree, before they are computed anew in a smaller unit


class PrefixReplay:
    """A ring of finished episodes; the oldest makes room. Capacity counts episodes, not tokens.

    truncated: what reaching the length cap means. "terminal": the reward was for the text as it stands, nothing
    follows. "bootstrap": the text would have gone on, so the value of its last state is added to the target.
    vocabulary: identifies the tokenizer; what comes back from a checkpoint must have the same. scratch: see
    `EpisodeStore`.
    """

    def __init__(
        self,
        capacity: int,
        gamma: float = 1.0,
        truncated: Literal["terminal", "bootstrap"] = "terminal",
        vocabulary: bytes = b"",
        segment_size: int = 1024,
        scratch: Path | None = None,
    ) -> None:
        self.store = EpisodeStore(capacity, segment_size, vocabulary, scratch)
        self.capacity, self.gamma, self.truncated = capacity, gamma, truncated
        self.least_logged: float | None = None  # reward that a logged episode must have to be imitated
        self.imitated_share = IMITATED  # where rewards are counted, of what was scored
        self.graded = self.best_alone = False  # what kind of rewards the first ones are, see `RewardKinds`
        self._forget_what_follows()

    def _forget_what_follows(self) -> None:
        """What sampling rules derived from the content."""
        self._trees: dict[tuple[float, float], PriorityTree] = {}  # by alpha and half-life
        self._successes: tuple[np.ndarray, np.ndarray] | None = None
        self._kinds: RewardKinds | None = None
        self._faded: dict[tuple[float, bool], np.ndarray] = {}  # by half-life, and whether of successes alone

    def __len__(self) -> int:
        return len(self.store)

    @property
    def added(self) -> int:
        """Episodes ever added; the next one goes to slot `added % capacity`."""
        return self.store.added

    @property
    def rewards(self) -> np.ndarray:
        """(n,) rewards of the stored episodes, by slot; a view that cannot be written to."""
        return self._view("rewards")

    @property
    def priorities(self) -> np.ndarray:
        """(n,) last known mean |TD error|, by slot; a view that cannot be written to."""
        return self._view("priorities")

    @property
    def versions(self) -> np.ndarray:
        """(n,) learner step that wrote each episode, by slot; a view that cannot be written to."""
        return self._view("versions")

    @property
    def kinds(self) -> RewardKinds:
        """What the stored rewards are, predicted ones aside; found once until episodes are added."""
        if self._kinds is None:
            self._kinds = RewardKinds.of(self.rewards[self._view("source") != IMAGINED])
        return self._kinds

    @property
    def imagined(self) -> bool:
        """Whether rewards of stored episodes are predicted."""
        return len(self) > self.kinds.counts.sum()

    def _view(self, name: str) -> np.ndarray:
        view = self.store.column(name)
        view.flags.writeable = False
        return view

    def successes(self) -> tuple[np.ndarray, np.ndarray]:
        """Slots whose reward is above the mean and that are `imitable`, and all others; found once for all draws until
        episodes are added.
        """
        if self._successes is None:
            good = (self.rewards > self.rewards.mean() + 1e-9) & self.imitable(np.arange(len(self)))
            self._successes = np.flatnonzero(good), np.flatnonzero(~good)
        return self._successes

    def imitable(self, slots: np.ndarray) -> np.ndarray:
        """(n,) bool: false for episodes that teach Q alone, as others are far better."""
        if self.least_logged is not None:
            return (self.rewards[slots] >= self.least_logged) | (self.store.column("source")[slots] != LOGGED)
        if self.holds_to_the_best:
            return self.rewards[slots] >= self.kinds.best(self.imitated_share)
        return np.ones(len(slots), dtype=bool)

    @property
    def holds_to_the_best(self) -> bool:
        """Whether only the best of what is scored is imitated, see `RewardKinds.best_alone`."""
        return self.best_alone and not self.graded and not self.kinds.right_or_wrong

    def faded(self, half_life: float, successes: bool = False) -> np.ndarray:
        """(k,) running sum of 2^-(age / half_life) over all episodes, or the successes; kept like them."""
        if (half_life, successes) not in self._faded:
            slots = self.successes()[0] if successes else np.arange(len(self))
            ages = self.versions.max() - self.versions[slots]
            if self.least_logged is not None:  # nothing newer is scored
                ages[self.store.column("source")[slots] == LOGGED] = 0
            self._faded[half_life, successes] = np.exp2(-ages / half_life).cumsum()
        return self._faded[half_life, successes]

    def priority_tree(self, alpha: float, half_life: float) -> PriorityTree:
        """What `prioritized` draws from; kept up to date from its first use on."""
        tree = self._trees.get((alpha, half_life))
        if tree is None or tree.total < SMALLEST_TOTAL:
            tree = PriorityTree(self.priorities, self.versions, alpha, half_life)
            self._trees[alpha, half_life] = tree
        return tree

    def _weights_changed(self, slots: np.ndarray) -> None:
        for tree in self._trees.values():
            tree.set(slots, self.priorities[slots], self.versions[slots])

    def add(self, episodes: Sequence[Episode]) -> None:
        """Remembers scored episodes. One whose reward is not finite, or that has no tokens, is refused together with
        all others of the call.
        """
        for episode in episodes:
            if not np.isfinite(episode.reward):
                raise ValueError(f"replay takes finite rewards only, got {episode.reward} for {episode.completion!r}")
            if len(episode.completion_ids) == 0:
                raise ValueError(f"an episode needs at least one action, got none after {episode.prompt!r}")
        if not episodes:
            return
        self._successes, self._kinds, self._faded = None, None, {}
        fresh, first = self.priorities.max() if len(self) else 1.0, self.added
        facts = {
            "lengths": [len(episode.prompt_ids) + len(episode.completion_ids) for episode in episodes],
            "prompt_lengths": [len(episode.prompt_ids) for episode in episodes],
            "rewards": [episode.reward for episode in episodes],
            "ended": [ENDED.index(episode.ended) for episode in episodes],
            "versions": [episode.policy_version for episode in episodes],
            "source": [SOURCES.index(episode.source) for episode in episodes],
            "priorities": [fresh] * len(episodes),
        }
        flat = {
            "tokens": [ids for episode in episodes for ids in (episode.prompt_ids, episode.completion_ids)],
            "ref_logprobs": [episode.ref_logprobs for episode in episodes],
            "behaviour_logprobs": [episode.behaviour_logprobs for episode in episodes],
        }
        self.store.put(
            {name: np.array(values) for name, values in facts.items()},
            {name: np.concatenate([part.numpy() for part in parts]) for name, parts in flat.items()},
        )
        self._weights_changed(np.arange(max(first, self.added - self.capacity), self.added) % self.capacity)

    def sample(self, size: int, rng: np.random.Generator, rule: SamplingRule) -> PrefixBatch:
        """`size` episodes with all their prefixes, drawn by `rule` with replacement: there may be fewer in store."""
        if size < 1:
            raise ValueError(f"a batch needs at least one episode, got size {size}")
        if len(self) == 0:
            raise ValueError("the replay buffer is empty: add episodes before sampling")
        return self.batch(rule(self, size, rng))

    def batch(self, slots: np.ndarray) -> PrefixBatch:
        """The episodes in `slots` as one padded batch."""
        slots = np.asarray(slots, dtype=np.int64)
        facts, flat = self.store.rows(slots), self.store.flat(slots, ("tokens", *LOGPROBS))
        layout = _lay_out(flat["tokens"], facts["prompt_lengths"], facts["lengths"])
        mask = layout.action_mask.numpy()
        rewards, *logprobs = (np.zeros(mask.shape, np.float32) for _ in range(1 + len(LOGPROBS)))
        discounts = np.where(mask, np.float32(self.gamma), np.float32(0))
        last = np.arange(len(slots)), facts["lengths"] - facts["prompt_lengths"] - 1
        rewards[last] = facts["rewards"]
        discounts[last] = self._final_discounts(facts["ended"])
        for name, values in zip(LOGPROBS, logprobs, strict=True):
            values[mask] = flat[name]
        scored = np.ones(len(slots), bool)
        return PrefixBatch(layout, *map(torch.from_numpy, (rewards, discounts, *logprobs, slots, scored)))

    def newest(self, count: int, rows: int) -> Iterator[PrefixBatch]:
        """Those of the `count` episodes added last that are by the newest policy, `rows` at a time."""
        latest = self._latest(count)
        latest = latest[self.versions[latest] == self.versions[latest[-1]]]
        for start in range(0, len(latest), rows):
            yield self.batch(latest[start : start + rows])

    def nats(self, count: int) -> np.ndarray:
        """(k,) -log pi of the `count` completions added last, or of fewer, by the policy that wrote them."""
        latest = self._latest(count)
        return -self.batch(latest).behaviour_logprobs.sum(1).numpy() if len(latest) else np.zeros(0, np.float32)

    def _latest(self, count: int) -> np.ndarray:
        """(k,) slots of the `count` episodes added last, or of fewer, the oldest first."""
        return np.arange(max(self.added - count, self.added - len(self)), self.added) % self.capacity

    def _final_discounts(self, ended: np.ndarray) -> np.ndarray:
        """0 where nothing follows the last action: the one place where truncation and termination are told apart."""
        goes_on = (ended == ENDED.index("length")) & (self.truncated == "bootstrap")
        return np.where(goes_on, self.gamma, 0.0)

    def update_priorities(self, slots: Tensor, td_errors: Tensor, drawn_at: int | None = None) -> None:
        """Mean |TD error| of each sampled episode, (B,), becomes its priority.

        drawn_at: what `added` was when the batch was drawn; episodes that made room since then are left out. An error
        that is not finite changes nothing, with a warning.
        """
        places, errors = slots.cpu().numpy(), td_errors.double().cpu().numpy()
        if len(places) and (places.min() < 0 or places.max() >= len(self)):
            raise ValueError(f"slots must lie in 0 to {len(self) - 1}, got {places.tolist()}")
        usable = np.isfinite(errors) & (errors >= 0)
        if not usable.all():
            warnings.warn(
                f"{(~usable).sum()} of {len(errors)} TD errors cannot be priorities: {errors[~usable][:3].tolist()}; "
                "their episodes keep those they had",
                stacklevel=2,
            )
        if drawn_at is not None:
            usable &= self.store.numbers(places) < drawn_at
        self.store.column("priorities")[places[usable]] = errors[usable]
        self._weights_changed(places[usable])

    def snapshot(self) -> dict[str, np.ndarray]:
        """Everything as named arrays for a checkpoint, which stay as they are while the buffer goes on."""
        return self.store.snapshot()

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Replaces the content by what `snapshot` returned; see `EpisodeStore.restore`."""
        self._forget_what_follows()
        self.store.restore(arrays)

    def state_arrays(self) -> dict[str, np.ndarray]:
        """The whole buffer as a few flat arrays by slot: `load_arrays` gives back an equal buffer.

        (n,) lengths, prompt_lengths, rewards, ended, versions, source, priorities; (sum of lengths,) tokens; (sum of
        actions,) ref_logprobs, behaviour_logprobs; (1,) added.
        """
        return self.store.flat_arrays()

    def load_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Replaces the content by what `state_arrays` returned; the newest that fit where the capacity is another."""
        self._forget_what_follows()
        self.store.load_flat(arrays)


def collate_tokens(prompts: Sequence[Tensor], completions: Sequence[Tensor]) -> TokenBatch:
    """Pads prompts (P,) with completions (T,) on the right and lays the actions out as (B, T)."""
    pairs = list(zip(prompts, completions, strict=True))
    tokens = torch.cat([part for pair in pairs for part in pair]).numpy()
    prompt_lengths = np.array([len(prompt) for prompt, _ in pairs])
    return _lay_out(tokens, prompt_lengths, prompt_lengths + np.array([len(completion) for _, completion in pairs]))


def _lay_out(tokens: np.ndarray, prompt_lengths: np.ndarray, lengths: np.ndarray) -> TokenBatch:
    """One padded batch of episodes whose `tokens` lie one behind the other."""
    places = np.arange(lengths.max())
    real = places < lengths[:, None]
    input_ids = np.zeros(real.shape, np.int64)
    input_ids[real] = tokens
    action_lengths = lengths - prompt_lengths
    action_mask = places[: action_lengths.max()] < action_lengths[:, None]
    actions = np.zeros(action_mask.shape, np.int64)
    actions[action_mask] = input_ids[real & (places >= prompt_lengths[:, None])]
    as_tensor = torch.from_numpy
    return TokenBatch(
        input_ids=as_tensor(input_ids),
        attention_mask=as_tensor(real.astype(np.int64)),
        prompt_lengths=as_tensor(prompt_lengths.astype(np.int64)),
        actions=as_tensor(actions),
        action_mask=as_tensor(action_mask),
    )
