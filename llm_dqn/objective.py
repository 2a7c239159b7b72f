"""What a learner step makes smaller: the TD error, and the terms beside it that the settings ask for."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_dqn import losses
from llm_dqn.network import QNetwork
from llm_dqn.types import PrefixBatch, QOutput, TDTarget

LossRule = Callable[[QOutput, Tensor, PrefixBatch, Tensor], Tensor]  # (online, td_target, batch, count) -> scalar


@dataclass(frozen=True)
class Objective:
    """td_loss: how an error of Q is counted. advantage_weight, expectile, cql_weight: of the terms beside it, see
    `losses`; 0 or None leaves them out.
    """

    td_loss: LossRule
    advantage_weight: float = 0.0
    expectile: float | None = None
    cql_weight: float = 0.0

    def __call__(
        self, network: QNetwork, batch: PrefixBatch, target: TDTarget, count: Tensor, weight: Tensor
    ) -> tuple[Tensor, QOutput]:
        """() loss of a batch, and the online Q-values behind it.

        count, weight: () action tokens, and sum of positive weights, of all batches of the step on all processes.
        """
        mask = batch.action_mask
        moved = target.weights != 0 if self.advantage_weight > 0 else torch.zeros_like(mask)
        q = network(batch, moved, self.cql_weight > 0)
        scale = network.reward_scale
        loss = self.td_loss(q.in_units_of(scale), target.returns / scale, batch, count)
        if self.advantage_weight > 0:
            weights = losses.tapered(target.weights, batch.behaviour_logprobs, q.logprobs)
            policy_loss = losses.advantage_weighted_nll(q.logprobs, weights, mask, weight)
            loss = loss + self.advantage_weight * policy_loss
        if self.expectile is not None:
            loss = loss + losses.expectile_loss(q.values, target.q_taken, mask, count, self.expectile)
        if q.normalizers is not None:
            loss = loss + self.cql_weight * losses.conservative_loss(q.normalizers, q.taken, mask, count)
        return loss, q
