"""Learning from what the policy itself writes sharply, once a log of scored completions has taught it something.

What a policy finds likeliest is right more often than what it samples. Nobody need score it: imitated, it moves the
whole policy there, as acting greedily by Q does in the textbook; held-out successes say whether that is any good. Huang
et al. 2024, https://arxiv.org/abs/2412.01951, who name it sharpening.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from llm_dqn.policy import SHARP
from llm_dqn.replay import PrefixReplay
from llm_dqn.types import Episode, PrefixBatch, QOutput, TDTarget, joined

KEPT = 256  # own completions, the newest


def sharpened(chances: Tensor) -> Tensor:
    """At least the probability of an action at temperature `SHARP` whose probability is this, of any shape: as if all
    others together were a single one.

    Of held-out successes it is below what it was as long as the policy finds likeliest what the base model always did,
    and where there are many ways to be right; then its own completions are not worth learning from.
    """
    of, others = chances.clamp(0, 1) ** (1 / SHARP), (1 - chances).clamp(0, 1) ** (1 / SHARP)
    return of / (of + others)


class Sharpening:
    """Remembers own completions, the same on every process, and puts them into batches.

    beside: how many for each that was scored. best: the largest reward of the log, over all processes. `helps`: whether
    held-out successes were likelier at the last look if the policy were sharp.
    """

    def __init__(self, beside: int, best: float) -> None:
        self.beside, self.best = beside, best
        self.own = PrefixReplay(KEPT)
        self.helps = False

    def add(self, episodes: Sequence[Episode]) -> None:
        """Remembers completions that the policy has just written on all processes; no reward is looked at."""
        self.own.add([replace(episode, reward=0.0, source="imagined") for episode in episodes])

    def with_own(self, batch: PrefixBatch, rng: np.random.Generator) -> PrefixBatch:
        """The batch with `beside` own completions for each of its rows, as rows that are not `scored`."""
        if len(self.own) == 0:
            return batch
        own = self.own.batch(rng.integers(len(self.own), size=self.beside * len(batch.slots)))
        nowhere = torch.full_like(own.slots, -1)  # in the replay that everything else is in
        return joined([batch, replace(own, slots=nowhere, scored=torch.zeros_like(nowhere, dtype=torch.bool))])

    def as_if_right(self, target: TDTarget, q: QOutput, batch: PrefixBatch) -> TDTarget:
        """The target where rows are scored; others weigh as if they had got the best reward of the log, and Q is not to
        believe it: it should have been what the target network, `q`, says.
        """
        scored = batch.scored[:, None]
        hoped = (self.best - q.values).clamp(min=0) * batch.action_mask
        return TDTarget(
            returns=torch.where(scored, target.returns, q.taken),
            advantages=torch.where(scored, target.advantages, hoped),
            weights=torch.where(scored, target.weights, hoped),
            q_taken=q.taken,
        )
