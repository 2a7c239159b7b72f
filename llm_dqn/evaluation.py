"""How good a policy is on held-out prompts, and how far it went from the base to get there."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from llm_dqn.policy import BehaviourPolicy
from llm_dqn.references import against_references, references_of, what_is_missing
from llm_dqn.replay import collate_tokens
from llm_dqn.rewards import Rewards
from llm_dqn.rollout import Writer, rollout
from llm_dqn.statistics import bootstrap_interval, distinct_n
from llm_dqn.strength import ScaledAdvantage
from llm_dqn.types import Episode, Prompt

T = TypeVar("T")
Pair = tuple[Episode, Episode]  # (base, tuned) of the same prompt and seed
Judge = Callable[[list[Episode]], list[Episode | None]]  # fills in rewards; None where every reward abstained


class Hands:
    """Who does the parts of an evaluation: here, this process, one after the other.

    A part is whole (a policy, a seed) and draws from a stream of its own, so what comes out does not depend on who did
    which.
    """

    def __init__(self, writer: Writer, judge: Judge) -> None:
        self.writer, self._judge = writer, judge

    def do(self, jobs: Sequence[Callable[[Writer], T]]) -> list[T]:
        """What each job returns, in order."""
        return [job(self.writer) for job in jobs]

    def judge(self, batches: Sequence[list[Episode]]) -> list[list[Episode | None]]:
        """Each batch with its rewards."""
        return [self._judge(batch) for batch in batches]


@dataclass(frozen=True)
class Measured:
    """One policy's figures, ready for JSON, and the sampled completions behind them.

    written: seed after seed, the prompts in their order. judged: the same with rewards, None where all abstained.
    """

    figures: dict[str, Any]
    written: list[Episode]
    judged: list[Episode | None]


def measure(
    writer: Writer,
    prompts: Sequence[Prompt],
    judge: Judge,
    seeds: Sequence[int],
    base: bool = False,
    hands: Hands | None = None,
) -> Measured:
    """One sampled completion a prompt and seed, and a greedy one a prompt, by the tuned policy or the untouched base.

    Figures: `reward` (mean of sampled), `reward_ci` (95 %, bootstrap over prompts), `reward_greedy`, `kl` (nats a
    token, exact over the vocabulary, on the sampled completions), `perplexity` (of the sampled completions under the
    base), `length` (tokens), `distinct_1`, `distinct_2` (means over seeds, as both fall with the number of texts),
    `prompts`. With several seeds `reward_by_seed`; where rewards
    abstained `abstained`, sampled completions without any; where the data has references `bleu`, `wer` of the sampled
    and `bleu_greedy`, `wer_greedy` of the greedy completions. None where there is nothing to average.
    hands: who does it; this process unless given.
    """
    return _measured(hands or Hands(writer, judge), prompts, seeds, [base])[0]


def _measured(hands: Hands, prompts: Sequence[Prompt], seeds: Sequence[int], sides: Sequence[bool]) -> list[Measured]:
    """`measure` of several policies at once; of `sides` those that are true are the base."""
    jobs = []
    for base in sides:
        policy = BehaviourPolicy(
            epsilon=1.0 if base else 0.0
        )  # all exploring, over the prior, is the base model itself
        jobs += [partial(rollout, prompts=prompts, policy=policy, seed=seed) for seed in seeds]
        jobs.append(partial(rollout, prompts=prompts, policy=replace(policy, temperature=0.0), seed=seeds[0]))
    rows = hands.do(jobs)
    a_side = len(seeds) + 1
    batches = []
    for start in range(0, len(rows), a_side):
        *sampled, greedy = rows[start : start + a_side]
        batches += [[episode for part in sampled for episode in part], greedy]
    judged = hands.judge(batches)
    return [
        Measured(
            _figures(hands, prompts, seeds, batches[at : at + 2], judged[at : at + 2], base), batches[at], judged[at]
        )
        for at, base in zip(range(0, len(batches), 2), sides, strict=True)
    ]


def _figures(
    hands: Hands,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    batches: Sequence[list[Episode]],
    judgements: Sequence[list[Episode | None]],
    base: bool,
) -> dict[str, Any]:
    """The figures of one policy from its (sampled, greedy) completions, without and with rewards."""
    (written, greedy), (judged, judged_greedy) = batches, judgements
    rewards = _rewards(judged)
    ids = [episode.completion_ids.tolist() for episode in written]
    reward, interval = mean_and_interval(rewards, prompt_numbers(prompts, len(seeds)))
    figures: dict[str, Any] = {
        "reward": reward,
        "reward_ci": interval,
        "reward_greedy": _mean(_rewards(judged_greedy)),
        "kl": 0.0 if base else mean_kl(hands.writer, written, hands=hands),
        "perplexity": perplexity([episode.ref_logprobs for episode in written]),
        "length": _mean([len(row) for row in ids]),
        "distinct_1": _mean([distinct_n(part, 1) for part in _by_seed(ids, prompts)]),
        "distinct_2": _mean([distinct_n(part, 2) for part in _by_seed(ids, prompts)]),
        "prompts": len(prompts),
        **_by_reference(written),
        **{f"{name}_greedy": value for name, value in _by_reference(greedy).items()},
    }
    if len(seeds) > 1:
        figures["reward_by_seed"] = [_mean(part) for part in _by_seed(rewards, prompts)]
    if None in judged:
        figures["abstained"] = judged.count(None)
    return {name: _finite(value) for name, value in figures.items()}


def base_and_tuned(
    writer: Writer,
    prompts: Sequence[Prompt],
    judge: Judge,
    seeds: Sequence[int],
    split: str = "validation",
    scales: Sequence[float] = (),
    scale_prompts: int | None = None,
    hands: Hands | None = None,
) -> tuple[dict[str, Any], list[Pair]]:
    """The contents of `evaluation.json`, and both policies' completions of the same prompts, (base, tuned).

    scales: strengths at which the tuned policy is measured as well, `scale_prompts` prompts at most. hands: who does
    it; this process unless given.
    """
    hands = hands or Hands(writer, judge)
    base, tuned = _measured(hands, prompts, seeds, [True, False])
    pairs = list(zip(base.judged, tuned.judged, strict=True))
    wins = [None if b is None or t is None else win(b, t) for b, t in pairs]
    share, interval = mean_and_interval(wins, prompt_numbers(prompts, len(seeds)))
    report: dict[str, Any] = {
        "base": base.figures,
        "tuned": tuned.figures,
        "win_rate": share,
        "win_rate_ci": interval,
        "seeds": list(seeds),
        "split": split,
    }
    if scales:
        few = len(prompts) if scale_prompts is None else min(scale_prompts, len(prompts))
        known = {0.0: _first_prompts(base, len(prompts), few), 1.0: _first_prompts(tuned, len(prompts), few)}
        report["strength"] = strength_curve(writer, prompts[:few], judge, seeds, scales, known, hands)
    notes = [*what_is_missing([prompt.columns for prompt in prompts]), *_abstentions(base, tuned)]
    if notes:
        report["notes"] = notes
    return report, [(b, t) for b, t in pairs if b is not None and t is not None]


Written = tuple[list[Episode], list[Episode | None]]  # (as written, as judged)


def strength_curve(
    writer: Writer,
    prompts: Sequence[Prompt],
    judge: Judge,
    seeds: Sequence[int],
    scales: Sequence[float],
    known: dict[float, Written],
    hands: Hands | None = None,
) -> list[dict[str, Any]]:
    """Reward against distance from the base: `beta_scale`, `reward`, `reward_ci`, `kl`, `prompts` for each strength.

    known: completions that are there already, of the base model (0) and the tuned one (1); both are always points.
    kl: of the policy at that strength to the base, at the states it visited, nats a token, exact over the vocabulary.
    """
    hands = hands or Hands(writer, judge)
    numbers = prompt_numbers(prompts, len(seeds))
    asked = sorted({*map(float, scales), *known})
    fresh = [scale for scale in asked if scale not in known]
    parts = hands.do([partial(_at_strength, prompts=prompts, scale=s, seed=seed) for s in fresh for seed in seeds])
    written = [
        [episode for part in parts[start : start + len(seeds)] for episode in part]
        for start in range(0, len(parts), len(seeds))
    ]
    known = known | dict(zip(fresh, zip(written, hands.judge(written), strict=True), strict=True))
    points = []
    for scale in asked:
        completions, judged = known[scale]
        reward, interval = mean_and_interval(_rewards(judged), numbers)
        kl = 0.0 if scale == 0 else mean_kl(writer, completions, scale, hands)
        points.append({"beta_scale": scale, "reward": reward, "reward_ci": interval, "kl": kl, "prompts": len(prompts)})
    return points


def _at_strength(writer: Writer, prompts: Sequence[Prompt], scale: float, seed: int) -> list[Episode]:
    return rollout(writer, prompts, BehaviourPolicy(), seed, extra=partial(ScaledAdvantage, writer.network, scale))


def side_by_side(pairs: Sequence[Pair], count: int = 4) -> list[dict[str, Any]]:
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


def judged_in_place(rewards: Rewards, episodes: Sequence[Episode]) -> list[Episode | None]:
    """Episodes with what the rewards say of them, None where every reward abstained."""
    results = rewards.score(
        prompts=[episode.prompt for episode in episodes],
        completions=[episode.completion for episode in episodes],
        columns=[episode.columns for episode in episodes],
        completion_ids=[episode.completion_ids.tolist() for episode in episodes],
    )
    return [
        None if result.total is None else replace(episode, reward=result.total, rewards=result.each)
        for episode, result in zip(episodes, results, strict=True)
    ]


def judged(rewards: Rewards, episodes: Sequence[Episode]) -> list[Episode]:
    """The same without those on which every reward abstained."""
    return [episode for episode in judged_in_place(rewards, episodes) if episode is not None]


def win(b: Episode, t: Episode) -> float:
    """1 where the tuned completion scored higher than the base's, 0 where lower, a half for a tie."""
    return float(t.reward > b.reward) + 0.5 * float(t.reward == b.reward)


def prompt_numbers(prompts: Sequence[Prompt], seeds: int) -> list[int]:
    """For each completion, seed after seed, the number of its prompt; equal texts have one number."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(prompt.text, len(numbers)) for prompt in prompts] * seeds


def mean_and_interval(
    values: Sequence[float | None], numbers: Sequence[int]
) -> tuple[float | None, list[float] | None]:
    """Mean and 95 % interval over prompts of the values that are there; `numbers` as of `prompt_numbers`."""
    there = [(value, number) for value, number in zip(values, numbers, strict=True) if value is not None]
    known = np.array([value for value, _ in there])
    return _mean(list(known)), bootstrap_interval(known, [number for _, number in there])


def perplexity(logprobs: Sequence[Tensor]) -> float:
    """Exp of the mean negative log-probability a token, over all completions together."""
    return float(torch.cat(list(logprobs)).double().mean().neg().exp()) if logprobs else float("nan")


def mean_kl(writer: Writer, episodes: Sequence[Episode], scale: float = 1.0, hands: Hands | None = None) -> float:
    """Mean over tokens of KL(pi || pi_ref) at the states visited, nats; pi at the strength `scale`."""
    size = writer.batch_size
    parts = [episodes[start : start + size] for start in range(0, len(episodes), size)]
    jobs = [partial(_summed_kl, episodes=part, scale=scale) for part in parts]
    sums = [job(writer) for job in jobs] if hands is None else hands.do(jobs)
    return sum(total for total, _ in sums) / max(sum(count for _, count in sums), 1)


def _summed_kl(writer: Writer, episodes: Sequence[Episode], scale: float) -> tuple[float, int]:
    """(sum of the KL over tokens, tokens)."""
    total, count = 0.0, 0
    for start in range(0, len(episodes), writer.batch_size):
        part = episodes[start : start + writer.batch_size]
        tokens = collate_tokens([e.prompt_ids for e in part], [e.completion_ids for e in part])
        tokens = tokens.to(writer.network.device)
        total += float(writer.network.kl(tokens, scale).sum())
        count += int(tokens.action_mask.sum())
    return total, count


def _first_prompts(measured: Measured, prompts: int, few: int) -> Written:
    """The completions of the first `few` of so many prompts, for every seed."""
    chosen = [index for index in range(len(measured.written)) if index % prompts < few]
    return [measured.written[index] for index in chosen], [measured.judged[index] for index in chosen]


def _by_seed(values: Sequence[Any], prompts: Sequence[Prompt]) -> list[Sequence[Any]]:
    """What stands seed after seed, apart."""
    return [values[start : start + len(prompts)] for start in range(0, len(values), len(prompts))]


def _by_reference(episodes: Sequence[Episode]) -> dict[str, float]:
    references = references_of([episode.columns for episode in episodes])
    return against_references([episode.completion for episode in episodes], references)


def _abstentions(base: Measured, tuned: Measured) -> list[str]:
    """A sentence for each side on which rewards had nothing to say."""
    notes = []
    for name, side in (("base", base), ("tuned", tuned)):
        count, total = side.figures.get("abstained", 0), len(side.written)
        if count == total:
            notes.append(f"every reward abstained on all {total} completions of the {name} model: nothing to compare")
        elif count:
            notes.append(f"every reward abstained on {count} of {total} completions of the {name} model: left out")
    return notes


def _rewards(episodes: Sequence[Episode | None]) -> list[float | None]:
    return [None if episode is None else episode.reward for episode in episodes]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _finite(value: Any) -> Any:
    """NaN and infinity are no JSON."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
