"""One learner step: losses, gradient, and what keeps a broken one out of the weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llm_dqn import losses
from llm_dqn.assembly import Parts
from llm_dqn.logbook import Logbook
from llm_dqn.numerics import NonFiniteSteps, all_finite, faulty_rows
from llm_dqn.processes import Processes
from llm_dqn.types import PrefixBatch, QOutput, TDTarget


class Learner:
    """Turns batches and their targets into optimizer steps.

    max_grad_norm: longer gradients are scaled down to this. prioritized: errors become priorities of the replay.
    advantage_weight, expectile, cql_weight: terms beside the TD error, see `losses`; 0 or None leaves them out.
    """

    def __init__(
        self,
        parts: Parts,
        logbook: Logbook,
        processes: Processes,
        nonfinite: NonFiniteSteps,
        *,
        max_grad_norm: float,
        prioritized: bool,
        advantage_weight: float,
        expectile: float | None,
        cql_weight: float,
    ) -> None:
        self.parts, self.logbook, self.processes, self.nonfinite = parts, logbook, processes, nonfinite
        self.accelerator = parts.accelerator
        self.max_grad_norm, self.prioritized = max_grad_norm, prioritized
        self.advantage_weight, self.expectile, self.cql_weight = advantage_weight, expectile, cql_weight

    def update(self, step: int, batches: Sequence[PrefixBatch], td_targets: Sequence[TDTarget]) -> None:
        """One optimizer step on a mean over all action tokens of the batches, on all processes.

        It is left out, on all of them, when a loss or the gradient is not finite anywhere, or nothing is to be learned.
        """
        count = self.parts.total(sum(batch.action_mask.sum() for batch in batches))
        weight = self.parts.total(sum(target.advantages.clamp(min=0).sum() for target in td_targets))
        checked, outputs = [], []
        for batch, target in zip(batches, td_targets, strict=True):
            loss, q = self.loss(batch, target, count, weight)
            self.accelerator.backward(loss * self.accelerator.num_processes)  # gradients are averaged
            checked.append(loss)
            outputs.append(q)
        norm = self.accelerator.clip_grad_norm_(self.parts.trainable, self.max_grad_norm)
        unusable = ~all_finite([norm, *checked]) | (count == 0)
        if self.parts.total(unusable) == 0:
            self.parts.optimizer.step()
            self.nonfinite.passed()
            self.learned(batches, td_targets, outputs, norm)
        else:
            self.nonfinite.skipped(step, self.blame(batches, td_targets, outputs))
        self.parts.scheduler.step()
        self.parts.optimizer.zero_grad()

    def learned(
        self, batches: Sequence[PrefixBatch], td_targets: Sequence[TDTarget], outputs: Sequence[QOutput], norm: Tensor
    ) -> None:
        """Notes what an update saw, and how wrong Q was about each episode."""
        self.logbook.add("train/grad_norm", norm)
        for batch, target, q in zip(batches, td_targets, outputs, strict=True):
            mask = batch.action_mask
            self.logbook.updated(q, target, mask)
            if self.prioritized:
                errors = ((q.taken - target.returns).abs() * mask).sum(1) / mask.sum(1)
                self.parts.replay.update_priorities(batch.slots, errors.detach())

    def blame(self, batches: Sequence[PrefixBatch], td_targets: Sequence[TDTarget], outputs: Sequence[QOutput]) -> str:
        """Which episodes a step failed on, in words."""
        slots: list[int] = []
        for batch, target, q in zip(batches, td_targets, outputs, strict=True):
            rows = faulty_rows([q.taken, q.logprobs, target.returns], batch.action_mask)
            slots += [int(batch.slots[row]) for row in rows]
        everyone = self.processes.gather(sorted(set(slots)))
        found = [f"{slots[:8]} of process {rank}" for rank, slots in enumerate(everyone) if slots]
        if found:
            return f"Q or its target is not finite for the replay's slots {', '.join(found)}"
        drawn = sorted({int(slot) for batch in batches for slot in batch.slots})
        return f"loss or gradient is not finite, or no token is left, in a batch of the replay's slots {drawn[:8]} ..."

    def loss(self, batch: PrefixBatch, target: TDTarget, count: Tensor, weight: Tensor) -> tuple[Tensor, QOutput]:
        """The TD loss with the terms beside it that the settings ask for, and the online Q-values behind it."""
        mask = batch.action_mask
        raised = target.advantages > 0 if self.advantage_weight > 0 else torch.zeros_like(mask)
        q = self.parts.model(batch, raised, self.cql_weight > 0)
        loss = self.parts.td_loss(q, target.returns, mask, count)
        if self.advantage_weight > 0:
            raised = losses.advantage_weighted_nll(q.logprobs, target.advantages.clamp(min=0), mask, weight)
            loss = loss + self.advantage_weight * raised
        if self.expectile is not None:
            loss = loss + losses.expectile_loss(q.values, target.q_taken, mask, count, self.expectile)
        if q.normalizers is not None:
            loss = loss + self.cql_weight * losses.conservative_loss(q.normalizers, q.taken, mask, count)
        return loss, q
