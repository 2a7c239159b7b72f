"""Prefix replay: whole episodes are stored once and every prefix of them is learned from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from llm_dqn.types import Episode, PrefixBatch, TokenBatch

SamplingRule = Callable[["PrefixReplay", int, np.random.Generator], np.ndarray]


def uniform() -> SamplingRule:
    """Every stored episode is equally likely. Lin 1992; Mnih et al. 2015."""

    def sample(replay: "PrefixReplay", size: int, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(len(replay), size=size)

    return sample


def success_biased(share: float) -> SamplingRule:
    """At least `share` of a batch are episodes that scored above the buffer's mean reward: the rare good ones.

    Positive-bias sampling as in https://arxiv.org/abs/2604.08706. Uniform while all rewards are equal.
    """

    def sample(replay: "PrefixReplay", size: int, rng: np.random.Generator) -> np.ndarray:
        rewards = replay.rewards
        successes = np.flatnonzero(rewards > rewards.mean() + 1e-9)
        count = round(share * size) if len(successes) else 0
        anywhere = rng.integers(len(replay), size=size - count)
        return np.concatenate([rng.choice(successes, size=count), anywhere]) if count else anywhere

    return sample


def prioritized(alpha: float = 0.6, half_life: float = 1000.0) -> SamplingRule:
    """Probability ~ (mean |TD error| of the episode)^alpha, halved for every `half_life` learner steps of age.

    Schaul et al. 2016, https://arxiv.org/abs/1511.05952, for whole sequences; the decay keeps stale priorities from
    ruling the buffer, https://arxiv.org/abs/2604.16918.
    """

    def sample(replay: "PrefixReplay", size: int, rng: np.random.Generator) -> np.ndarray:
        ages = replay.versions.max() - replay.versions
        weights = (replay.priorities + 1e-6) ** alpha * 0.5 ** (ages / half_life)
        return rng.choice(len(replay), size=size, p=weights / weights.sum())

    return sample


@dataclass
class _Row:
    """One stored episode, as compact arrays."""

    tokens: np.ndarray  # int32 (P + T,)
    prompt_length: int
    ref_logprobs: np.ndarray  # float32 (T,)
    behaviour_logprobs: np.ndarray  # float32 (T,)
    reward: float
    ended: str
    version: int
    source: str
    priority: float


_ENDED = ("eos", "length")
_SOURCE = ("online", "logged")


class PrefixReplay:
    """A ring of finished episodes; the oldest makes room. Capacity counts episodes, not tokens.

    truncated: what reaching the length cap means. "terminal": the reward was for the text as it stands, nothing
    follows. "bootstrap": the text would have gone on, so the value of its last state is added to the target.
    """

    def __init__(
        self, capacity: int, gamma: float = 1.0, truncated: Literal["terminal", "bootstrap"] = "terminal"
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 episode, got {capacity}")
        self.capacity, self.gamma, self.truncated = capacity, gamma, truncated
        self._rows: list[_Row] = []
        self.added = 0  # episodes ever added; the next one goes to slot `added % capacity`

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rewards(self) -> np.ndarray:
        """(n,) rewards of the stored episodes, by slot."""
        return np.array([row.reward for row in self._rows], dtype=np.float64)

    @property
    def priorities(self) -> np.ndarray:
        """(n,) last known mean |TD error|, by slot."""
        return np.array([row.priority for row in self._rows], dtype=np.float64)

    @property
    def versions(self) -> np.ndarray:
        """(n,) learner step that wrote each episode, by slot."""
        return np.array([row.version for row in self._rows], dtype=np.int64)

    def add(self, episodes: Sequence[Episode]) -> None:
        """Remembers scored episodes; a reward that is not finite, or an episode without tokens, is refused."""
        fresh = max((row.priority for row in self._rows), default=1.0)
        for episode in episodes:
            if not np.isfinite(episode.reward):
                raise ValueError(f"replay takes finite rewards only, got {episode.reward} for {episode.completion!r}")
            if len(episode.completion_ids) == 0:
                raise ValueError(f"an episode needs at least one action, got none after {episode.prompt!r}")
            self._put(_row_of(episode, priority=fresh))

    def _put(self, row: _Row) -> None:
        slot = self.added % self.capacity
        if slot < len(self._rows):
            self._rows[slot] = row
        else:
            self._rows.append(row)
        self.added += 1

    def sample(self, size: int, rng: np.random.Generator, rule: SamplingRule) -> PrefixBatch:
        """`size` episodes with all their prefixes, drawn with replacement by `rule`."""
        if not self._rows:
            raise ValueError("the replay buffer is empty: add episodes before sampling")
        return self.batch(rule(self, size, rng))

    def batch(self, slots: np.ndarray) -> PrefixBatch:
        """The episodes in `slots` as one padded batch."""
        rows = [self._rows[int(slot)] for slot in slots]
        tokens = [torch.from_numpy(row.tokens.astype(np.int64)) for row in rows]
        layout = collate_tokens(
            [t[: row.prompt_length] for t, row in zip(tokens, rows, strict=True)],
            [t[row.prompt_length :] for t, row in zip(tokens, rows, strict=True)],
        )
        rewards = torch.zeros(layout.actions.shape)
        ref_logprobs = torch.zeros(layout.actions.shape)
        discounts = self.gamma * layout.action_mask
        for i, row in enumerate(rows):
            last = len(row.ref_logprobs) - 1
            rewards[i, last] = row.reward
            discounts[i, last] = self._final_discount(row)
            ref_logprobs[i, : last + 1] = torch.from_numpy(row.ref_logprobs)
        return PrefixBatch(layout, rewards, discounts, ref_logprobs, torch.from_numpy(np.asarray(slots)))

    def _final_discount(self, row: _Row) -> float:
        """0 where nothing follows the last action: the one place where truncation and termination are told apart."""
        goes_on = row.ended == "length" and self.truncated == "bootstrap"
        return self.gamma if goes_on else 0.0

    def update_priorities(self, slots: Tensor, td_errors: Tensor) -> None:
        """Mean |TD error| of each sampled episode, (B,), becomes its priority."""
        for slot, error in zip(slots.tolist(), td_errors.tolist(), strict=True):
            self._rows[slot].priority = error

    def state_arrays(self) -> dict[str, np.ndarray]:
        """The whole buffer as a few flat arrays for a checkpoint: `load_arrays` gives back an equal buffer."""
        rows = self._rows
        return {
            "added": np.array([self.added], dtype=np.int64),
            "tokens": _joined([row.tokens for row in rows], np.int32),
            "lengths": np.array([len(row.tokens) for row in rows], dtype=np.int64),
            "prompt_lengths": np.array([row.prompt_length for row in rows], dtype=np.int64),
            "ref_logprobs": _joined([row.ref_logprobs for row in rows], np.float32),
            "behaviour_logprobs": _joined([row.behaviour_logprobs for row in rows], np.float32),
            "rewards": self.rewards,
            "ended": np.array([_ENDED.index(row.ended) for row in rows], dtype=np.uint8),
            "versions": self.versions,
            "source": np.array([_SOURCE.index(row.source) for row in rows], dtype=np.uint8),
            "priorities": self.priorities,
        }

    def load_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Replaces the content by what `state_arrays` returned."""
        token_ends = np.cumsum(arrays["lengths"])
        action_ends = np.cumsum(arrays["lengths"] - arrays["prompt_lengths"])
        tokens = np.split(arrays["tokens"], token_ends[:-1])
        ref = np.split(arrays["ref_logprobs"], action_ends[:-1])
        behaviour = np.split(arrays["behaviour_logprobs"], action_ends[:-1])
        self._rows = [
            _Row(
                tokens=tokens[i],
                prompt_length=int(arrays["prompt_lengths"][i]),
                ref_logprobs=ref[i],
                behaviour_logprobs=behaviour[i],
                reward=float(arrays["rewards"][i]),
                ended=_ENDED[int(arrays["ended"][i])],
                version=int(arrays["versions"][i]),
                source=_SOURCE[int(arrays["source"][i])],
                priority=float(arrays["priorities"][i]),
            )
            for i in range(len(arrays["lengths"]))
        ]
        self.added = int(arrays["added"][0])


def _joined(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=dtype)


def _row_of(episode: Episode, priority: float) -> _Row:
    return _Row(
        tokens=torch.cat([episode.prompt_ids, episode.completion_ids]).numpy().astype(np.int32),
        prompt_length=len(episode.prompt_ids),
        ref_logprobs=episode.ref_logprobs.numpy().astype(np.float32),
        behaviour_logprobs=episode.behaviour_logprobs.numpy().astype(np.float32),
        reward=float(episode.reward),
        ended=episode.ended,
        version=episode.policy_version,
        source=episode.source,
        priority=priority,
    )


def collate_tokens(prompts: Sequence[Tensor], completions: Sequence[Tensor]) -> TokenBatch:
    """Pads prompts (P,) with completions (T,) on the right and lays the actions out as (B, T)."""
    size = len(prompts)
    lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
    longest = max(len(completion) for completion in completions)
    input_ids = torch.zeros(size, max(lengths), dtype=torch.int64)
    attention_mask = torch.zeros(size, max(lengths), dtype=torch.int64)
    actions = torch.zeros(size, longest, dtype=torch.int64)
    action_mask = torch.zeros(size, longest, dtype=torch.bool)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        input_ids[i, : lengths[i]] = torch.cat([prompt, completion])
        attention_mask[i, : lengths[i]] = 1
        actions[i, : len(completion)] = completion
        action_mask[i, : len(completion)] = True
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
    return TokenBatch(input_ids, attention_mask, prompt_lengths, actions, action_mask)
