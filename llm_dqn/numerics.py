"""Keeps what is not finite out of the weights, and says when Q leaves what rewards can reach."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from llm_dqn.errors import RunError


class NonFiniteSteps:
    """Counts learner steps that were left out because their loss or gradient was NaN or infinite.

    patience: how many in a row are borne. say: where a line for people goes. fallback: what is left when they are not.
    """

    def __init__(self, patience: int, say: Callable[[str], None], fallback: Callable[[], str]) -> None:
        self.patience, self.say, self.fallback = patience, say, fallback
        self.total = 0
        self.in_a_row = 0

    def passed(self) -> None:
        """A step was good."""
        self.in_a_row = 0

    def skipped(self, step: int, blame: str) -> None:
        """A step was left out; raises RunError when there were too many in a row."""
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        self.say(f"step {step}: {blame}; the step is left out ({self.in_a_row} in a row)")
        if self.in_a_row >= self.patience:
            raise RunError(
                f"{self.in_a_row} steps in a row could not be learned from; the last, step {step}: {blame}; the "
                f"weights are those before them, and {self.fallback()}; perhaps --resume with a lower "
                "train.learning_rate gets past this"
            )


@contextmanager
def denormals_are_zero() -> Iterator[None]:
    """Within it this thread takes numbers below 1e-38 for zero: a processor is up to a hundred times slower by them.

    The gradient of an output layer has them for every token that nobody would write, and its square in AdamW sooner.
    """
    already = bool(torch.tensor(1e-39) * 1.0 == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(already)


def all_finite(values: Sequence[Tensor]) -> Tensor:
    """() bool over any number of tensors of one device, without waiting for them."""
    return torch.stack([value.detach().isfinite().all() for value in values]).all()


def faulty_rows(values: Sequence[Tensor], mask: Tensor) -> list[int]:
    """Rows of (B, T) tensors that hold something not finite where `mask`."""
    fine = torch.stack([torch.where(mask, value.detach(), 0.0).isfinite().all(dim=1) for value in values]).all(dim=0)
    return (~fine).nonzero().flatten().tolist()


class QAlarm:
    """Warns when |Q| is beyond what the rewards can be: learning has come apart, although all numbers are finite.

    A completion is paid once, at its end, and gamma <= 1, so that Q* lies between the lowest and the highest reward
    and 0. The margin is that much again, and 10 beta, since A = beta log(pi / pi_ref) of a rare token runs ahead.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.highest = 0.0  # |reward| seen
        self._last = 0.0  # |Q| of the last alarm; the next one needs twice that

    def seen(self, rewards: np.ndarray) -> None:
        """Rewards (n,) that were paid."""
        self.highest = max(self.highest, float(np.abs(rewards).max(initial=0.0)))

    def look(self, step: int, q_max: float | None, beta: float) -> None:
        """Says a line when `q_max`, the largest |Q| of late, is out of reach; again only when it doubles."""
        reach = 2 * self.highest + 10 * beta
        if q_max is None or not q_max > max(reach, 2 * self._last):
            return
        self._last = q_max
        self.say(
            f"step {step}: ALARM |Q| reached {q_max:.3g}, and no reward was larger than {self.highest:.3g}: Q-values "
            "run away; lower train.learning_rate or train.value_learning_rate, or sync the target more rarely"
        )
