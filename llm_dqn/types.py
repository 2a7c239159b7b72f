"""The records that travel between the parts. B episodes, L padded length, T longest completion, V vocabulary.

A state is a prompt plus the completion tokens written so far, an action is the next token. Action `t` of an episode
with a prompt of P tokens is token `P + t`, chosen in the state whose last token is `P + t - 1`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

Message = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One row of the data set, ready to be continued."""

    prompt: str | list[Message]  # as the data set has it; what reward functions see
    text: str  # as the model sees it: the same string, or the rendered chat template
    ids: list[int]  # token ids of `text`
    columns: dict[str, Any] = field(default_factory=dict)  # every other column, handed to reward functions


@dataclass(frozen=True)
class Episode:
    """One completed sequence with everything that learning from any of its prefixes needs."""

    prompt: str | list[Message]
    completion: str  # decoded text without special tokens
    prompt_ids: Tensor  # (P,) int64
    completion_ids: Tensor  # (T,) int64, the end-of-sequence token included when it was written
    ref_logprobs: Tensor  # (T,) float32, log pi_ref(a_t | s_t) of the untouched base model
    behaviour_logprobs: Tensor  # (T,) float32, log pi_theta(a_t | s_t) at the moment of writing
    ended: Literal["eos", "length"]  # the model stopped, or the length cap did
    reward: float = float("nan")  # total; NaN until it is scored
    rewards: dict[str, float | None] = field(default_factory=dict)  # each reward function; None = abstained
    policy_version: int = 0  # learner step that wrote it
    source: Literal["online", "logged", "imagined"] = "online"  # imagined: its reward is predicted
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenBatch:
    """Prompts with completions, padded on the right, where padding can never be seen by a causal model."""

    input_ids: Tensor  # (B, L) int64
    attention_mask: Tensor  # (B, L) 1 on real tokens
    prompt_lengths: Tensor  # (B,)
    actions: Tensor  # (B, T) completion token ids, 0 where masked
    action_mask: Tensor  # (B, T) bool, true on completion tokens

    def to(self, device: Any) -> "TokenBatch":
        """The same batch on another device."""
        return TokenBatch(**{name: value.to(device) for name, value in vars(self).items()})

    def __getitem__(self, rows: slice) -> "TokenBatch":
        """Some of the episodes."""
        return TokenBatch(**{name: value[rows] for name, value in vars(self).items()})


@dataclass(frozen=True)
class PrefixBatch:
    """Whole episodes; every completion token is one (state, action, reward, next state) transition."""

    tokens: TokenBatch
    rewards: Tensor  # (B, T) zero but at the last action, which carries the episode's reward
    discounts: Tensor  # (B, T) gamma; 0 at the action that ended the episode
    ref_logprobs: Tensor  # (B, T) stored log pi_ref of the actions
    behaviour_logprobs: Tensor  # (B, T) stored log pi of the actions by the policy as it was when they were written
    slots: Tensor  # (B,) places in the replay buffer, for priorities
    scored: Tensor  # (B,) bool, false where nobody said what the episode is worth

    @property
    def action_mask(self) -> Tensor:
        """(B, T) bool, true on completion tokens."""
        return self.tokens.action_mask

    def to(self, device: Any) -> "PrefixBatch":
        """The same batch on another device."""
        return PrefixBatch(**{name: value.to(device) for name, value in vars(self).items()})

    def split(self, rows: int) -> list["PrefixBatch"]:
        """The same episodes, at most `rows` of them at a time, those of like length together and padded no further."""
        if rows >= len(self.slots):
            return [self]
        order = self.tokens.attention_mask.sum(1).argsort(stable=True)
        return [self._only(chosen) for chosen in order.split(rows)]

    def _only(self, chosen: Tensor) -> "PrefixBatch":
        """The episodes in these rows, (n,)."""
        mask = self.tokens.attention_mask[chosen]
        length, actions = int(mask.sum(1).max()), int(self.action_mask[chosen].sum(1).max())
        tokens = TokenBatch(
            input_ids=self.tokens.input_ids[chosen, :length],
            attention_mask=mask[:, :length],
            prompt_lengths=self.tokens.prompt_lengths[chosen],
            actions=self.tokens.actions[chosen, :actions],
            action_mask=self.action_mask[chosen, :actions],
        )
        names = ("rewards", "discounts", "ref_logprobs", "behaviour_logprobs")
        of_actions = {name: getattr(self, name)[chosen, :actions] for name in names}
        return PrefixBatch(tokens, slots=self.slots[chosen], scored=self.scored[chosen], **of_actions)


def joined(batches: Sequence[PrefixBatch]) -> PrefixBatch:
    """The episodes of several batches as one, padded to the longest; a single batch as it is."""
    if len(batches) == 1:
        return batches[0]
    tokens = TokenBatch(*map(_stacked, zip(*(vars(batch.tokens).values() for batch in batches), strict=True)))
    others = [list(vars(batch).values())[1:] for batch in batches]  # all but the tokens
    return PrefixBatch(tokens, *map(_stacked, zip(*others, strict=True)))


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """(n, ...) rows of all parts, those of matrices padded with zeros on the right."""
    if parts[0].ndim == 1:
        return torch.cat(list(parts))
    width = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (0, width - part.shape[1])) for part in parts])


@dataclass(frozen=True)
class QOutput:
    """What a network says of a batch: (B, T) each, zero where `action_mask` is false."""

    taken: Tensor  # Q(s_t, a_t)
    values: Tensor  # V(s_t) under the backup rule
    next_values: Tensor  # V(s_{t+1}); at the last action that of the finished text, which discounts switch off
    logprobs: Tensor  # log pi(a_t | s_t) of the acting policy, where it was asked for
    normalizers: Tensor | None = None  # log sum_a exp Q(s_t, a), where it was asked for

    @property
    def advantages(self) -> Tensor:
        """Q(s_t, a_t) - V(s_t), (B, T)."""
        return self.taken - self.values

    def in_units_of(self, scale: float) -> "QOutput":
        """Q and V of the taken actions as shares of `scale`."""
        return replace(self, taken=self.taken / scale, values=self.values / scale)


@dataclass(frozen=True)
class TokenLook:
    """What a network says of N completion tokens, and of the K tokens that the base model found likeliest instead."""

    q_values: Tensor  # (N,) Q(s, a) of the taken token
    values: Tensor  # (N,) V(s)
    ranks: Tensor  # (N,) place of the taken token among all under the tuned policy, 1 = likeliest
    base_ranks: Tensor  # (N,) the same under the base model
    top_ids: Tensor  # (N, K) the base model's likeliest tokens in order
    top_q_values: Tensor  # (N, K) Q(s, a) of these
    top_base_probs: Tensor  # (N, K) their probability under the base model
    top_probs: Tensor  # (N, K) their probability under the tuned policy


@dataclass(frozen=True)
class TDTarget:
    """What the online network should have said: (B, T) each, without gradient, zero where masked."""

    returns: Tensor  # what Q(s_t, a_t) should have been
    advantages: Tensor  # by how much that beats the target network's V(s_t)
    weights: Tensor  # what the advantage term makes of the action: likelier above 0, less likely below
    q_taken: Tensor  # the target network's own Q(s_t, a_t)
