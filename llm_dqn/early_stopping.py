"""When learning from a log alone has gone far enough, and which policy on the way is kept."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_dqn import sharding
from llm_dqn.logged import MOST
from llm_dqn.network import QNetwork
from llm_dqn.replay import PrefixReplay
from llm_dqn.sharpening import sharpened

LOOK_STEPS = 25  # learner steps between two looks
PATIENCE = 200  # learner steps to go on after the best look, and as many again as it took to get there
HELD_OUT, PREDICTED = "eval/held_out_probability", "eval/predicted_reward"  # metrics that say when to stop
SHARPER = "eval/held_out_sharper"  # what the first of them would be at least if the policy were sharp
SAID = {
    HELD_OUT: "held-out successes were likeliest after step {step} (a token {value:.3f} on average)",
    PREDICTED: "predicted rewards were surely highest after step {step} (at least {value:.3f})",
}


class HeldOut:
    """Logged episodes that scored well and are not learned from.

    A policy that learns from the same few successes over and over ends up knowing them by heart; others then get less
    likely. mean_reward: of all that was logged; `episodes` are a replay of some that scored better. add_up: (n,) sums
    of n numbers over all processes, which look together.
    """

    def __init__(self, network: QNetwork, mean_reward: float, add_up: Callable[[Tensor], Tensor]) -> None:
        self.network, self.mean_reward, self.add_up = network, mean_reward, add_up
        self.episodes = PrefixReplay(MOST)

    @torch.no_grad()
    def look(self, batch_size: int) -> tuple[float, float]:
        """Mean of pi(a|s) over their tokens, each weighted by how much its episode scored above the mean; and what it
        would be at least if the policy were sharp.

        Not of its logarithm: a few tokens of which the policy was too sure would outweigh all that it has learned.
        """
        sums = torch.zeros(3)
        for start in range(0, len(self.episodes), batch_size):
            batch = self.episodes.batch(np.arange(start, min(start + batch_size, len(self.episodes))))
            logprobs = self.network.logprobs(batch.tokens.to(self.network.device), "online").cpu()
            above = (batch.rewards.sum(1, keepdim=True) - self.mean_reward) * batch.action_mask
            chances = logprobs.exp()
            sums += torch.stack([(above * of).sum() for of in (chances, sharpened(chances), torch.ones_like(chances))])
        total, sharper, weight = self.add_up(sums.to(self.network.device)).tolist()
        return total / weight, sharper / weight


class EarlyStopping:
    """The policy that looked best, by one of the figures in `SAID`, and whether learning has had its chance.

    It is over when nothing better was seen for `PATIENCE` steps and as many again as it took to get to the best.
    Prechelt 1998, https://doi.org/10.1007/3-540-49430-8_3.
    """

    def __init__(self, network: QNetwork) -> None:
        self.network = network
        self.figure: str | None = None
        self.best_step, self.best_value = 0, 0.0
        self.best: dict[str, Tensor] = {}  # whole, in main memory; empty before the first look

    def due(self, step: int, last: bool) -> bool:
        """Whether it is time to look."""
        return step % LOOK_STEPS == 0 or last

    def seen(self, step: int, figure: str, value: float) -> None:
        """Keeps the weights of the policy after `step` if it is the best so far; by another figure all begins anew."""
        if figure != self.figure or value > self.best_value:
            self.figure, self.best_step, self.best_value = figure, step, value
            whole = sharding.gathered(self.network.checkpoint_state())
            self.best = {name: value.detach().to("cpu", copy=True) for name, value in whole.items()}

    def over(self, step: int) -> bool:
        """Whether further learning has been given its chance."""
        return bool(self.best) and step >= 2 * self.best_step + PATIENCE

    def put_back(self) -> str:
        """Makes the network what it was at the best look; says so."""
        assert self.figure is not None
        sharding.restore(self.network.checkpoint_state(), self.best)
        return f"{SAID[self.figure].format(step=self.best_step, value=self.best_value)}: that policy is kept"

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside `best`."""
        return {"figure": self.figure, "best_step": self.best_step, "best_value": self.best_value}

    def load_state(self, state: dict[str, Any], best: dict[str, Tensor]) -> None:
        """The reverse of `state` and `best`."""
        self.figure, self.best_step, self.best_value = state["figure"], state["best_step"], state["best_value"]
        self.best = best
