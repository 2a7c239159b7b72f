"""When learning from a log alone has gone far enough, and which policy on the way is kept."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_dqn import sharding
from llm_dqn.data import LoggedRow
from llm_dqn.network import QNetwork
from llm_dqn.replay import PrefixReplay

LOOK_STEPS = 25  # learner steps between two looks
PATIENCE = 200  # learner steps to go on after the best look, and as many again as it took to get there
FEWEST = 8  # episodes that scored above the mean, held out at least
SPARED = 4  # times as many such episodes must there be that prompts are added to find those
MOST = 128  # such episodes that are looked at, by all processes together
HELD_OUT, PREDICTED = "eval/held_out_probability", "eval/predicted_reward"  # metrics that say when to stop
SAID = {
    HELD_OUT: "held-out successes were likeliest after step {step} (a token {value:.3f} on average)",
    PREDICTED: "predicted rewards were surely highest after step {step} (at least {value:.3f})",
}


def mean_reward(logged: Sequence[LoggedRow]) -> float:
    """Of completions scored elsewhere."""
    return float(np.mean([row.reward for row in logged]))


def kept_apart(logged: Sequence[LoggedRow], share: float, seed: int) -> tuple[Sequence[LoggedRow], Sequence[LoggedRow]]:
    """(rows to learn from, rows above the mean reward that say when to stop), which have no prompt in common.

    share: of the prompts that are kept apart; fewer where `MOST` good rows are found sooner, more where it takes more
    to find `FEWEST` and these are no more than a quarter of the good ones. Else all rows are learned from.
    """
    mean = mean_reward(logged) if logged else 0.0
    good = Counter(row.prompt.text for row in logged if row.reward > mean)
    texts = sorted({row.prompt.text for row in logged})
    order = [texts[index] for index in np.random.default_rng(seed).permutation(len(texts))]
    found = np.cumsum([good[text] for text in order])
    fewest, most = (int(np.searchsorted(found, wanted)) + 1 for wanted in (FEWEST, MOST))
    count = min(int(len(texts) * share), most)
    if share and sum(good.values()) >= FEWEST * SPARED:
        count = max(count, fewest)
    if count in (0, len(texts)) or found[count - 1] < FEWEST:
        return logged, ()
    apart = set(order[:count])
    kept = [row for row in logged if row.prompt.text in apart and row.reward > mean]
    return [row for row in logged if row.prompt.text not in apart], kept


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
    def probability(self, batch_size: int) -> float:
        """Mean of pi(a|s) over their tokens, each weighted by how much its episode scored above the mean.

        Not of its logarithm: a few tokens of which the policy was too sure would outweigh all that it has learned.
        """
        sums = torch.zeros(2)
        for start in range(0, len(self.episodes), batch_size):
            batch = self.episodes.batch(np.arange(start, min(start + batch_size, len(self.episodes))))
            logprobs = self.network.logprobs(batch.tokens.to(self.network.device), "online").cpu()
            above = (batch.rewards.sum(1, keepdim=True) - self.mean_reward) * batch.action_mask
            sums += torch.stack([(above * logprobs.exp()).sum(), above.sum()])
        total, weight = self.add_up(sums.to(self.network.device))
        return float(total / weight)


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
