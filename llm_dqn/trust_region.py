"""How far the policy has moved from the one that wrote the newest completions."""

import torch
from torch import Tensor

from llm_dqn.losses import sampled_kl
from llm_dqn.network import QNetwork
from llm_dqn.replay import PrefixReplay

NEWEST = 64  # completions, at most and for each process, by which it is measured
LOOK_STEPS, MOST_LOOK_STEPS = 4, 16  # learner steps between two looks at it, while it is considerable, and at most


@torch.no_grad()
def behaviour_kl(network: QNetwork, episodes: PrefixReplay, rows: int) -> Tensor:
    """(2,) sum of `losses.sampled_kl` over the tokens of the newest completions, and their number; `rows` at a time."""
    sums = torch.zeros(2)
    for batch in episodes.newest(NEWEST, rows):
        logprobs = network.logprobs(batch.tokens.to(network.device), "online").cpu()
        shifts = sampled_kl(batch.behaviour_logprobs, logprobs, batch.action_mask)
        sums += torch.stack([shifts.sum(), batch.action_mask.sum()])
    return sums
