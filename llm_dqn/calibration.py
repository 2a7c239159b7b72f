"""Does V mean what it says? Predictions at every token of held-out completions against what then came.

N predictions, one a completion token; `prompts` (N,) numbers the prompt of each, over which intervals are drawn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_dqn.statistics import bootstrap_interval

FIFTHS = 5
THIRDS = ("first third", "middle third", "last third")
MIN_IN_A_BIN = 10  # predictions


@dataclass(frozen=True)
class Predictions:
    """V(s_t) before each token, and the return that followed. (N,) each."""

    predicted: np.ndarray
    realised: np.ndarray
    position: np.ndarray  # of the token in its completion, 0 to 1
    prompts: np.ndarray

    def __len__(self) -> int:
        return len(self.predicted)

    def where(self, mask: np.ndarray) -> "Predictions":
        """Those of a mask (N,)."""
        return Predictions(*(values[mask] for values in vars(self).values()))

    @property
    def error(self) -> float:
        """Root of the mean squared difference, in units of the reward."""
        return float(np.sqrt(np.mean((self.predicted - self.realised) ** 2)))

    @property
    def blind_error(self) -> float:
        """The error of somebody who always says the mean of what came."""
        return float(self.realised.std())

    @property
    def bias(self) -> float:
        """By how much the predictions are too high on average."""
        return float(np.mean(self.predicted - self.realised))


def predictions(lines: Sequence[Mapping[str, Any]], soft: bool, gamma: float) -> Predictions:
    """All tokens of score lines that have a reward.

    soft: V is a soft value, which expects the reward less the price of leaving the base from here on. The advantages
    of what was written are that price, so the return realised at t is R - A_t - A_{t+1} - ... (the path consistency of
    Nachum et al. 2017, https://arxiv.org/abs/1702.08892); otherwise it is R alone, discounted by `gamma` a token.
    """
    columns: list[list[float]] = [[], [], [], []]
    numbers: dict[str, int] = {}
    for line in lines:
        if line.get("reward") is None:
            continue
        number, count = numbers.setdefault(str(line["prompt"]), len(numbers)), len(line["values"])
        following = line["reward"]
        for t in reversed(range(count)):
            discount = 1.0 if t == count - 1 else gamma
            following = discount * following - (line["advantages"][t] if soft else 0.0)
            row = (line["values"][t], following, (t + 0.5) / count, number)
            for column, value in zip(columns, row, strict=True):
                column.append(value)
    predicted, realised, position, prompts = (np.array(column, dtype=float) for column in columns)
    found = Predictions(predicted, realised, position, prompts)
    return found.where(np.isfinite(predicted) & np.isfinite(realised))


def by_fifth(found: Predictions) -> list[Predictions]:
    """From the first to the last fifth of the completions."""
    fifth = np.minimum((found.position * FIFTHS).astype(int), FIFTHS - 1)
    return [found.where(fifth == i) for i in range(FIFTHS)]


def by_third(found: Predictions) -> list[tuple[str, Predictions]]:
    """The beginnings, middles and ends of the completions, by name."""
    third = np.minimum((found.position * len(THIRDS)).astype(int), len(THIRDS) - 1)
    return [(name, found.where(third == i)) for i, name in enumerate(THIRDS)]


def reliability(found: Predictions, bins: int = 8) -> list[tuple[float, float, list[float]]]:
    """(mean prediction, mean return, its 95 % interval) of bins with equally many predictions, from low to high."""
    if len(found) < MIN_IN_A_BIN:
        return []
    order = np.argsort(found.predicted, kind="stable")
    points = []
    for rows in np.array_split(order, min(bins, len(found) // MIN_IN_A_BIN)):
        interval = bootstrap_interval(found.realised[rows], found.prompts[rows].tolist(), resamples=500)
        points.append((float(found.predicted[rows].mean()), float(found.realised[rows].mean()), interval or []))
    return points
