"""Figures over seeds: intervals, completions to a mark, and how many times as many the best peer needs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.learning.protocol import Result, at_mark, is_ours, score

RESAMPLES = 4000


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over seeds."""
    rows = np.asarray(values, dtype=float)
    picks = np.random.default_rng(0).integers(len(rows), size=(RESAMPLES, len(rows)))
    low, high = np.percentile(rows[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def mean_score(results: Sequence[Result], index: int = -1) -> float:
    return float(np.mean([score(result["points"][index]) for result in results]))


def reached(result: Result, threshold: float, along: str = "at") -> float:
    """How far along the run had to go until its score first reached the threshold, straight between two marks; inf if
    it never did.
    """
    before = None
    for point in result["points"]:
        if score(point) >= threshold:
            if before is None:
                return float(point[along])
            share = (threshold - score(before)) / (score(point) - score(before))
            return float(before[along] + share * (point[along] - before[along]))
        before = point
    return math.inf


def peers(methods: dict[str, list[Result]]) -> dict[str, list[Result]]:
    return {name: results for name, results in methods.items() if not is_ours(name)}


def thresholds(methods: dict[str, list[Result]]) -> tuple[float, float] | None:
    """Scores at 50 % and 90 % of the most that a peer gained at any of its marks; None where none gained anything.

    At any of them: some fall apart later, and that is to make nobody else look better.
    """
    base = mean_score(next(iter(methods.values())), 0)
    gains = [
        mean_score(results, index) - base
        for results in peers(methods).values()
        for index in range(len(results[0]["points"]))
    ]
    gain = max(gains, default=0.0)
    return (base + 0.5 * gain, base + 0.9 * gain) if gain > 0 else None


def needed(results: Sequence[Result], threshold: float, along: str = "at") -> float:
    """Median over seeds; inf where half of them or more never got there."""
    return float(np.median([reached(result, threshold, along) for result in results]))


@dataclass(frozen=True)
class Ratio:
    """What the best peer needs over what ours needs, medians over seeds, and its 95 % bootstrap interval.

    bound: "<" where ours never got there, ">" where no peer did: who did not counts with all it was given.
    """

    value: float
    low: float
    high: float
    bound: str = ""

    def __str__(self) -> str:
        return f"{self.bound}{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def spent(results: Sequence[Result], threshold: float, cost: float | None = None) -> tuple[list[float], bool]:
    """(of each seed what it took to the threshold, whether half of them got there): scored completions, or with a cost
    in seconds a call the seconds of CPU and of calls one after the other. A seed that never did counts in full.
    """

    def amount(result: Result) -> float:
        ended = math.isinf(reached(result, threshold))
        last = result["points"][-1]
        calls = float(last["at"]) if ended else reached(result, threshold)
        if cost is None:
            return calls
        return cost * calls + (float(last["seconds"]) if ended else reached(result, threshold, "seconds"))

    missed = sum(math.isinf(reached(result, threshold)) for result in results)
    return [amount(result) for result in results], 2 * missed < len(results)


def ratio(methods: dict[str, list[Result]], ours: str, which: int, cost: float | None = None) -> Ratio | None:
    """To the lower (0) or the upper (1) threshold; None where nobody got there, or no peer gained anything."""
    limits, others = thresholds(methods), peers(methods)
    if limits is None or ours not in methods:
        return None
    mine, here = spent(methods[ours], limits[which], cost)
    theirs = [spent(results, limits[which], cost) for results in others.values()]
    arrived = [each for each, there in theirs if there]
    if not here and not arrived:
        return None
    best = min(arrived or [each for each, _ in theirs], key=np.median)
    rng = np.random.default_rng(0)

    def resampled(each: list[float]) -> np.ndarray:
        return np.median(np.array(each)[rng.integers(len(each), size=(RESAMPLES, len(each)))], axis=1)

    low, high = np.percentile(resampled(best) / np.maximum(resampled(mine), 1e-9), [2.5, 97.5])
    value = float(np.median(best) / max(np.median(mine), 1e-9))
    return Ratio(value, float(low), float(high), "" if here and arrived else ">" if here else "<")


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(float(np.mean(np.log(values))))


def lead(methods: dict[str, list[Result]], ours: str) -> tuple[float, float, float] | None:
    """(score of ours at its last mark minus the best peer's there, 95 % bootstrap interval over the seeds of both)."""
    others = peers(methods)
    if ours not in methods or not others:
        return None

    mark = methods[ours][0]["points"][-1]["at"]

    def scores(results: Sequence[Result]) -> np.ndarray:
        return np.array([score(at_mark(result, mark)) for result in results])

    mine, best = scores(methods[ours]), max((scores(results) for results in others.values()), key=np.mean)
    rng = np.random.default_rng(0)
    some = [each[rng.integers(len(each), size=(RESAMPLES, len(each)))].mean(axis=1) for each in (mine, best)]
    low, high = np.percentile(some[0] - some[1], [2.5, 97.5])
    return float(mine.mean() - best.mean()), float(low), float(high)
