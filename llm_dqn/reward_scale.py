"""In which unit rewards are learned from: a judge that gives 0 to 100 is to teach what one that gives 0 to 1 does."""

import math
from collections.abc import Sequence

import numpy as np

TAIL = 0.05  # share of the rewards at either end that say nothing about their spread: a penalty may be huge


def reward_scale(rewards: Sequence[float]) -> float | None:
    """The power of two nearest to how far rewards are apart; None where all are the same.

    Between their 5 % and 95 % quantiles, both of them rewards that were paid, or between the ends where these are one.
    A power of two, because dividing by it is exact.
    """
    if len(rewards) == 0:
        return None
    low, high = np.quantile(rewards, TAIL, method="lower"), np.quantile(rewards, 1 - TAIL, method="higher")
    spread = float(high - low) or float(np.ptp(rewards))
    return 2.0 ** round(math.log2(spread)) if spread > 0 else None
