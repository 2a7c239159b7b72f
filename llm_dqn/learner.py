"""One learner step: losses, gradient, and what keeps a broken one out of the weights."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llm_dqn.assembly import Parts
from llm_dqn.logbook import Logbook
from llm_dqn.memory import Attempt, RanOutTogether
from llm_dqn.numerics import NonFiniteSteps, all_finite, denormals_are_zero, faulty_rows
from llm_dqn.processes import Processes
from llm_dqn.reduction import sum_gradients
from llm_dqn.sharding import clip_gradients, is_share
from llm_dqn.signals import StopRequest
from llm_dqn.types import PrefixBatch, QOutput, TDTarget


class Learner:
    """Turns batches and their targets into optimizer steps.

    stop: what this process was asked; `stopping` says after each step whether any of them was.
    max_grad_norm: longer gradients are scaled down to this. prioritized: errors become priorities of the replay.
    """

    def __init__(
        self,
        parts: Parts,
        logbook: Logbook,
        processes: Processes,
        nonfinite: NonFiniteSteps,
        stop: StopRequest,
        *,
        max_grad_norm: float,
        prioritized: bool,
    ) -> None:
        self.parts, self.logbook, self.processes, self.nonfinite = parts, logbook, processes, nonfinite
        self.accelerator, self.stop, self.stopping = parts.accelerator, stop, False
        self.clip = clip_gradients if parts.sharded else parts.accelerator.clip_grad_norm_
        self.max_grad_norm, self.prioritized = max_grad_norm, prioritized

    @denormals_are_zero()
    def update(self, step: int, batches: Sequence[PrefixBatch], td_target: Callable[[PrefixBatch], TDTarget]) -> None:
        """One optimizer step on a mean over all action tokens of the batches, on all processes.

        It is left out, on all of them, when a loss or the gradient is not finite anywhere, or nothing is to be learned.
        Raises RanOutTogether on all of several processes when memory ran out on one.
        """
        # Shares are gathered in the middle of a pass: whoever leaves it cannot be waited for.
        attempt = Attempt(alone=self.processes.world == 1 or self.parts.sharded)
        td_targets: list[TDTarget] = attempt.do(lambda: [td_target(batch) for batch in batches], [])
        count, weight = self.parts.totals(
            sum(batch.action_mask.sum() for batch in batches),
            sum(target.weights.clamp(min=0).sum() for target in td_targets),
        )
        nothing: tuple[list[QOutput], Tensor] = [], count > 0
        outputs, usable = attempt.do(lambda: self.backward(batches, td_targets, count, weight), nothing)
        usable = self.summed(attempt, usable)
        norm = self.clip(self.parts.trainable, self.max_grad_norm)
        if usable & norm.isfinite():
            self.parts.optimizer.step()
            self.nonfinite.passed()
            self.learned(batches, td_targets, outputs, norm)
        else:
            self.nonfinite.skipped(step, self.blame(batches, td_targets, outputs))
        self.parts.scheduler.step()
        self.parts.optimizer.zero_grad()

    def backward(
        self, batches: Sequence[PrefixBatch], td_targets: Sequence[TDTarget], count: Tensor, weight: Tensor
    ) -> tuple[list[QOutput], Tensor]:
        """Adds this process's part of the gradient; the outputs, and () bool: whether all losses can be used."""
        losses_here, outputs = [], []
        for batch, target in zip(batches, td_targets, strict=True):
            loss, q = self.parts.objective(self.parts.network, batch, target, count, weight)
            self.accelerator.backward(loss)
            losses_here.append(loss)
            outputs.append(q)
        return outputs, all_finite(losses_here) & (count > 0)

    def summed(self, attempt: Attempt, usable: Tensor) -> Tensor:
        """Sums gradients over processes, and tells how each fared; () bool: whether all can learn from theirs."""
        if self.processes.world == 1:
            return usable
        copies = [
            parameter for parameter in self.parts.trainable if not is_share(parameter)
        ]  # shares are summed already
        here = [~usable, bool(attempt.reason), self.stop.requested is not None]
        told = torch.stack([torch.as_tensor(fact, dtype=torch.float32, device=usable.device) for fact in here])
        unusable, ran_out, asked = sum_gradients(copies, told).tolist()
        self.stopping = asked > 0
        if ran_out:
            reasons = self.processes.gather(attempt.reason)
            rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason)
            raise RanOutTogether(f"on process {rank}: {reason}", bool(attempt.reason))
        return torch.tensor(unusable == 0, device=usable.device)

    def learned(
        self, batches: Sequence[PrefixBatch], td_targets: Sequence[TDTarget], outputs: Sequence[QOutput], norm: Tensor
    ) -> None:
        """Notes what an update saw, and how wrong Q was about each episode."""
        self.logbook.add("train/grad_norm", norm)
        for batch, target, q in zip(batches, td_targets, outputs, strict=True):
            mask = batch.action_mask & batch.scored[:, None]
            self.logbook.updated(q, target, mask)
            if self.prioritized:
                errors = ((q.taken - target.returns).abs() * mask).sum(1)[batch.scored] / mask.sum(1)[batch.scored]
                self.parts.replay.update_priorities(batch.slots[batch.scored], errors.detach())

    def blame(self, batches: Sequence[PrefixBatch], td_targets: Sequence[TDTarget], outputs: Sequence[QOutput]) -> str:
        """Which episodes a step failed on, in words."""
        slots: list[int] = []
        for batch, target, q in zip(batches, td_targets, outputs, strict=True):
            rows = faulty_rows([q.taken, q.logprobs, target.returns], batch.action_mask)
            slots += [int(batch.slots[row]) for row in rows if batch.scored[row]]
        everyone = self.processes.gather(sorted(set(slots)))
        found = [f"{slots[:8]} of process {rank}" for rank, slots in enumerate(everyone) if slots]
        if found:
            return f"Q or its target is not finite for the replay's slots {', '.join(found)}"
        drawn = sorted({int(slot) for batch in batches for slot in batch.slots[batch.scored]})
        return f"loss or gradient is not finite, or no token is left, in a batch of the replay's slots {drawn[:8]} ..."
