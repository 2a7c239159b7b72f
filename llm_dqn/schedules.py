"""Step -> value."""

from collections.abc import Callable

Schedule = Callable[[int], float]


def linear(start: float, end: float, steps: int) -> Schedule:
    """From `start` to `end` in equal steps, then `end` for ever; epsilon decays like this in Mnih et al. 2015.

    `steps` counts learner updates; 0 means `end` from the beginning.
    """

    def value(step: int) -> float:
        if step >= steps:
            return end
        return start + (end - start) * step / steps

    return value
