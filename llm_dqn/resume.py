"""Going on from a checkpoint: what is more than loading a tensor."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

DEALT = (
    "the checkpoint is one of {then} processes, and {now} run: its episodes are dealt out anew, a learner step sees "
    "{now}/{then} as many as before, and the run is not the one it would have been"
)
# (entry of `PrefixReplay.state_arrays`) -> what it has one value of; all others have one an episode
_UNITS = {"tokens": "lengths", "ref_logprobs": "actions", "behaviour_logprobs": "actions"}


def restore_schedule(scheduler: torch.optim.lr_scheduler.LRScheduler, state: dict[str, Any]) -> None:
    """Goes to the step at which `state` was taken, with the learning rates of now.

    A scheduler writes its rates into the optimizer only when it steps, so the first update would use those of step 0.
    """
    rates = list(scheduler.base_lrs)
    scheduler.load_state_dict({**state, "base_lrs": rates})
    factors = [rule(scheduler.last_epoch) for rule in scheduler.lr_lambdas]  # type: ignore[attr-defined]
    for group, rate, factor in zip(scheduler.optimizer.param_groups, rates, factors, strict=True):
        group["lr"] = rate * factor


def dealt(shards: Sequence[dict[str, np.ndarray]], rank: int, world: int) -> dict[str, np.ndarray]:
    """One process's share when the replays of some processes are dealt to another number of them.

    shards: what `PrefixReplay.state_arrays` gave on each of them. Episodes go round in order of their age, so that all
    shares are alike and each stays in order; none is lost. With as many processes as before each has what it had.
    """
    if len(shards) == world:
        return shards[rank]
    joined = {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0] if name != "added"}
    counts = {"lengths": joined["lengths"], "actions": joined["lengths"] - joined["prompt_lengths"]}
    mine = np.argsort(joined["versions"], kind="stable")[rank::world]
    share = {"added": np.array([len(mine)], dtype=np.int64)}
    for name, values in joined.items():
        if name in _UNITS:
            ends = np.cumsum(counts[_UNITS[name]])
            pieces = np.split(values, ends[:-1])
            share[name] = np.concatenate([values[:0], *(pieces[row] for row in mine)])
        else:
            share[name] = values[mine]
    return share
