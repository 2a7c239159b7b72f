"""What rewards are: right or wrong, counted from a text, or a judge's grades."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

FEWEST_GRADES = 8  # different rewards of the first collection, and half of all, that make them grades
REPEATING = 0.9  # share of different rewards below which they repeat; a judge hardly gives the same grade twice
# Two groups of rewards are right and wrong where they explain so much of the variance, and wrong is no exception: a
# rare penalty explains nearly all of it, and tells nothing of the others.
TWO_GROUPS, FEWEST_WRONG = 0.92, 0.05
# Nats of a completion below which there are few ways to write it, some 150: what scored best of a few dozen is about
# the best there is, and can be imitated whatever its grade.
FEW_NATS = 5.0
IMITATED = 0.25  # share of counted rewards
MARGIN = 0.5  # standard deviations of the rewards


@dataclass(frozen=True)
class RewardKinds:
    """What is known of a number of rewards. values: (k,) the different ones, ascending. counts: (k,) of each."""

    values: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, rewards: Sequence[float] | np.ndarray) -> "RewardKinds":
        return cls(*np.unique(np.asarray(rewards, np.float64), return_counts=True))

    @property
    def repeat(self) -> bool:
        """Whether the same rewards come again: they are counted from a text (parts, points, a distance)."""
        return len(self.values) < REPEATING * int(self.counts.sum())

    @cached_property
    def right_or_wrong(self) -> bool:
        """Whether there are two different ones, or two groups with little to tell apart within them.

        The second is what right and wrong are with a small bonus for something else, or with a little noise.
        """
        if len(self.values) <= 2:
            return len(self.values) == 2
        below, explained = self._best_split()
        return explained >= TWO_GROUPS and below >= FEWEST_WRONG

    @property
    def grades(self) -> bool:
        """Whether too many are different for anything else."""
        many = max(FEWEST_GRADES, int(self.counts.sum()) / 2)
        return len(self.values) >= many and not self.right_or_wrong

    @property
    def best_alone(self) -> bool:
        """Whether rewards are counted, and most completions get some of it: then what is above the mean may be half
        wrong. Where most get nothing, something is rare, and worth imitating.
        """
        mostly_nothing = len(self.counts) > 0 and self.counts[0] >= self.counts.sum() / 2
        return len(self.values) > 2 and not (mostly_nothing or self.right_or_wrong or self.grades)

    def best(self, share: float) -> float:
        """The least reward above the mean that is also among the best `share`; of 0 and 1 it is 1."""
        total = self.counts.sum()
        above = self.values[self.values > (self.values * self.counts).sum() / total + 1e-9]
        rank = int((total - 1) * (1 - min(share, 1.0)))
        among_best = self.values[np.searchsorted(self.counts.cumsum(), rank, side="right")]
        return float(max(among_best, above.min(initial=self.values[-1])))

    def _best_split(self) -> tuple[float, float]:
        """(share of the rewards in the lower of two groups, share of the variance that lies between them), for the two
        groups that explain most. Otsu 1979, eq. 12, https://doi.org/10.1109/TSMC.1979.4310076.
        """
        places = (self.values - self.values[0]) / (self.values[-1] - self.values[0])
        below = (self.counts / self.counts.sum()).cumsum()[:-1]
        sums = (places * self.counts / self.counts.sum()).cumsum()
        mean = sums[-1]
        between = (mean * below - sums[:-1]) ** 2 / (below * (1 - below))
        split = int(between.argmax())
        variance = ((places - mean) ** 2 * self.counts).sum() / self.counts.sum()
        return float(below[split]), float(between[split] / variance)
