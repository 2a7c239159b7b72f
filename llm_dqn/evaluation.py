"""How good a policy is on held-out prompts, and how far it went from the base to get there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_dqn.policy import BehaviourPolicy
from llm_dqn.replay import collate_tokens
from llm_dqn.rewards import Rewards
from llm_dqn.rollout import Writer, rollout
from llm_dqn.statistics import bootstrap_interval, distinct_n
from llm_dqn.types import Episode, Prompt

Score = Callable[[list[Episode]], list[Episode]]  # fills in rewards; drops episodes on which every reward abstained


@dataclass(frozen=True)
class Measured:
    """One policy's figures and the sampled completions behind them."""

    figures: dict[str, Any]
    episodes: list[Episode]


def measure(writer: Writer, prompts: Sequence[Prompt], score: Score, seed: int, base: bool = False) -> Measured:
    """One sampled and one greedy completion a prompt by the tuned policy, or by the untouched base model.

    Figures: `reward` (mean of sampled), `reward_ci` (95 %, bootstrap over prompts), `reward_greedy`, `kl` (nats a
    token, exact over the vocabulary, on the sampled completions), `perplexity` (of the sampled completions under the
    base), `length` (tokens), `distinct_2`, `prompts`.
    """
    exploring = 1.0 if base else 0.0  # an epsilon of 1 over the prior is the base model itself
    episodes = score(rollout(writer, prompts, BehaviourPolicy(epsilon=exploring), seed))
    greedy = score(rollout(writer, prompts, BehaviourPolicy(epsilon=exploring, temperature=0.0), seed))
    rewards = np.array([episode.reward for episode in episodes])
    figures = {
        "reward": _mean(rewards),
        "reward_ci": bootstrap_interval(rewards),
        "reward_greedy": _mean(np.array([episode.reward for episode in greedy])),
        "kl": 0.0 if base else mean_kl(writer, episodes),
        "perplexity": perplexity([episode.ref_logprobs for episode in episodes]),
        "length": _mean(np.array([len(episode.completion_ids) for episode in episodes])),
        "distinct_2": distinct_n([episode.completion_ids.tolist() for episode in episodes], 2),
        "prompts": len(prompts),
    }
    return Measured(figures, episodes)


def base_and_tuned(
    writer: Writer, prompts: Sequence[Prompt], score: Score, seed: int
) -> tuple[dict[str, Any], list[tuple[Episode, Episode]]]:
    """The contents of `evaluation.json`, and both policies' completions of the same prompts, (base, tuned)."""
    base = measure(writer, prompts, score, seed, base=True)
    tuned = measure(writer, prompts, score, seed)
    of_base = {str(episode.prompt): episode for episode in base.episodes}
    pairs = [(of_base[str(e.prompt)], e) for e in tuned.episodes if str(e.prompt) in of_base]
    return {"base": base.figures, "tuned": tuned.figures, "win_rate": win_rate(pairs)}, pairs


def side_by_side(pairs: Sequence[tuple[Episode, Episode]], count: int = 4) -> list[dict[str, Any]]:
    """The first `count` (base, tuned) pairs as `prompt`, `base`, `base_reward`, `tuned`, `tuned_reward`."""
    return [
        {
            "prompt": base.prompt if isinstance(base.prompt, str) else str(base.prompt[-1]["content"]),
            "base": base.completion,
            "base_reward": base.reward,
            "tuned": tuned.completion,
            "tuned_reward": tuned.reward,
        }
        for base, tuned in pairs[:count]
    ]


def judged(rewards: Rewards, episodes: Sequence[Episode]) -> list[Episode]:
    """Episodes with what the rewards say of them; those on which every reward abstained are left out."""
    results = rewards.score(
        prompts=[episode.prompt for episode in episodes],
        completions=[episode.completion for episode in episodes],
        columns=[episode.columns for episode in episodes],
        completion_ids=[episode.completion_ids.tolist() for episode in episodes],
    )
    return [
        replace(episode, reward=result.total, rewards=result.each)
        for episode, result in zip(episodes, results, strict=True)
        if result.total is not None
    ]


def win_rate(pairs: Sequence[tuple[Episode, Episode]]) -> float:
    """Share of (base, tuned) pairs in which the tuned completion scored higher; ties count half."""
    return _mean(np.array([float(t.reward > b.reward) + 0.5 * float(t.reward == b.reward) for b, t in pairs]))


def perplexity(logprobs: Sequence[Tensor]) -> float:
    """Exp of the mean negative log-probability a token, over all completions together."""
    return float(torch.cat(list(logprobs)).double().mean().neg().exp()) if logprobs else float("nan")


def mean_kl(writer: Writer, episodes: Sequence[Episode]) -> float:
    """Mean over tokens of KL(pi || pi_ref) at the states visited, nats."""
    total, count = 0.0, 0
    for start in range(0, len(episodes), writer.batch_size):
        part = episodes[start : start + writer.batch_size]
        tokens = collate_tokens([e.prompt_ids for e in part], [e.completion_ids for e in part])
        tokens = tokens.to(writer.network.device)
        total += float(writer.network.kl(tokens).sum())
        count += int(tokens.action_mask.sum())
    return total / max(count, 1)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
