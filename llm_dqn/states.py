"""Which hidden states of a padded batch are states of the decision process, and the way back to (B, T).

B episodes, L padded length, T actions, N action positions, H hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llm_dqn.types import TokenBatch


def action_states(hidden: Tensor, tokens: TokenBatch) -> Tensor:
    """States in which the completion's tokens were chosen: (B, L, H) -> (N, H); state t ends with token P + t - 1."""
    return _pick(hidden, tokens.prompt_lengths - 1, tokens.action_mask)


def visited_states(hidden: Tensor, tokens: TokenBatch) -> Tensor:
    """`action_states` and, for each episode, the state after its last action: (B, L, H) -> (N + B, H)."""
    return _pick(hidden, tokens.prompt_lengths - 1, _visited_mask(tokens))


def _visited_mask(tokens: TokenBatch) -> Tensor:
    """(B, T + 1): an action mask with one more position an episode."""
    return torch.cat([torch.ones_like(tokens.action_mask[:, :1]), tokens.action_mask], dim=1)


def _pick(hidden: Tensor, first: Tensor, mask: Tensor) -> Tensor:
    positions = first.unsqueeze(1) + torch.arange(mask.shape[1], device=hidden.device)
    rows = torch.arange(len(hidden), device=hidden.device).unsqueeze(1).expand_as(positions)
    return hidden[rows[mask], positions[mask]]


def spread(flat: Tensor, mask: Tensor) -> Tensor:
    """(N,) -> (B, T), zero where masked."""
    return torch.zeros(mask.shape, dtype=torch.float32, device=flat.device).masked_scatter(mask, flat.float())


def split_values(flat: Tensor, tokens: TokenBatch) -> tuple[Tensor, Tensor]:
    """Values of the visited states -> V(s_t) and V(s_{t+1}), (B, T) each, zero where masked."""
    values = spread(flat, _visited_mask(tokens))
    return values[:, :-1] * tokens.action_mask, values[:, 1:] * tokens.action_mask


def completion_means(hidden: Sequence[Tensor], tokens: TokenBatch) -> Tensor:
    """(B, L, H) of several layers -> (B, (layers + 1) H): each one's mean over the completion, and the last one's state
    after the last token.
    """
    places = torch.arange(tokens.input_ids.shape[1], device=tokens.input_ids.device)
    ends = tokens.prompt_lengths + tokens.action_mask.sum(1)
    inside = (places >= tokens.prompt_lengths.unsqueeze(1)) & (places < ends.unsqueeze(1))
    shares = inside.float() / tokens.action_mask.sum(1, keepdim=True)
    means = [(states.float() * shares.unsqueeze(-1)).sum(1) for states in hidden]
    final = hidden[-1][torch.arange(len(ends), device=ends.device), ends - 1].float()
    return torch.cat([*means, final], dim=1)
