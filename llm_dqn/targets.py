"""What Q(s, a) should have been: Bellman targets as pure functions of tensors.

Two questions, answered apart. *What is a state worth, given its Q-values?* (`hard_value`, `double_value`,
`soft_value`). *How far ahead do we look?* (one step, `n_step_return`, `lambda_return`). Everything is detached and in
the dtype that comes in; callers pass float32.

N states, V vocabulary, B episodes, T actions. `discounts` are gamma, or 0 at the action that ended the episode, so no
target ever asks whether an episode is done.
"""

import torch
from torch import Tensor

# --- what a state is worth ------------------------------------------------------------------------------------------


def support_mask(log_prior: Tensor, top_k: int) -> Tensor:
    """The `top_k` tokens that the prior finds likeliest: where a max may look. (N, V) -> bool (N, V).

    A max over a whole vocabulary picks noise: with error sigma it adds about 4.5 sigma at 150,000 tokens. Restricting
    it to the prior's support is the discrete form of Fujimoto et al. 2019 (BCQ), https://arxiv.org/abs/1910.01708.
    `top_k = 0` allows every token that has any probability.
    """
    if top_k == 0 or top_k >= log_prior.shape[-1]:
        return torch.isfinite(log_prior)
    threshold = log_prior.topk(top_k, dim=-1).values[..., -1:]
    return log_prior >= threshold


def _within(q_values: Tensor, support: Tensor | None) -> Tensor:
    return q_values if support is None else q_values.masked_fill(~support, float("-inf"))


def hard_value(q_values: Tensor, support: Tensor | None = None) -> Tensor:
    """V(s) = max_a Q(s, a). (N, V) -> (N,). Mnih et al. 2015, https://doi.org/10.1038/nature14236."""
    return _within(q_values, support).max(dim=-1).values.detach()


def double_value(q_target: Tensor, q_online: Tensor, support: Tensor | None = None) -> Tensor:
    """V(s) = Q_target(s, argmax_a Q_online(s, a)). (N, V), (N, V) -> (N,).

    van Hasselt et al. 2016, eq. 4, https://arxiv.org/abs/1509.06461.
    """
    best = _within(q_online, support).argmax(dim=-1, keepdim=True)
    return q_target.gather(-1, best).squeeze(-1).detach()


def soft_value(q_values: Tensor, log_prior: Tensor, beta: float) -> Tensor:
    """V(s) = beta log sum_a prior(a|s) exp(Q(s, a) / beta). (N, V), (N, V) -> (N,).

    Haarnoja et al. 2017, eq. 3, https://arxiv.org/abs/1702.08165, with a prior as in Fox et al. 2016. Tends to the
    prior's mean of Q as beta grows and to the max over its support as beta goes to 0.
    """
    return (beta * torch.logsumexp(log_prior + q_values / beta, dim=-1)).detach()


# --- one step ahead -------------------------------------------------------------------------------------------------


def q_learning_target(rewards: Tensor, discounts: Tensor, next_q: Tensor, support: Tensor | None = None) -> Tensor:
    """R + discount * max_a Q_target(s', a). (N,), (N,), (N, V) -> (N,). Mnih et al. 2015, eq. 2."""
    return (rewards + discounts * hard_value(next_q, support)).detach()


def double_q_target(
    rewards: Tensor, discounts: Tensor, next_q_target: Tensor, next_q_online: Tensor, support: Tensor | None = None
) -> Tensor:
    """R + discount * Q_target(s', argmax_a Q_online(s', a)). (N,), (N,), (N, V), (N, V) -> (N,)."""
    return (rewards + discounts * double_value(next_q_target, next_q_online, support)).detach()


def soft_target(rewards: Tensor, discounts: Tensor, next_q: Tensor, log_prior: Tensor, beta: float) -> Tensor:
    """R + discount * beta log sum_a prior(a|s') exp(Q_target(s', a) / beta). (N,), (N,), (N, V), (N, V) -> (N,)."""
    return (rewards + discounts * soft_value(next_q, log_prior, beta)).detach()


# --- many steps ahead -----------------------------------------------------------------------------------------------


def n_step_return(
    rewards: Tensor, discounts: Tensor, next_values: Tensor, advantages: Tensor, action_mask: Tensor, n: int
) -> Tensor:
    """G_t = r_t + d_t (r_{t+1} - A_{t+1} + d_{t+1} (... V(s_{t+n}))): n rewards, then the target network. (B, T) each.

    `advantages` are Q(s, a) - V(s) of the actions that were taken. At the optimum r - A + d V(s') = V(s) for *every*
    action, so the return is right whatever policy wrote the data (path consistency: Nachum et al. 2017, eq. 14,
    https://arxiv.org/abs/1702.08892). Zeros instead of advantages give the uncorrected n-step return of Rainbow, which
    is right for the greedy policy's own data only. `next_values[t]` is V(s_{t+1}).
    """
    returns = rewards + discounts * next_values
    for _ in range(n - 1):
        returns = rewards + discounts * _continuation(returns, next_values, advantages, action_mask)
    return returns.detach()


def lambda_return(
    rewards: Tensor, discounts: Tensor, next_values: Tensor, advantages: Tensor, action_mask: Tensor, lam: float
) -> Tensor:
    """G_t = r_t + d_t [(1 - lam) V(s_{t+1}) + lam (G_{t+1} - A_{t+1})]. (B, T) each.

    The lambda mixture of all `n_step_return`s: lam = 0 is one-step, lam = 1 goes to the end of the episode without
    any target network. DQO, https://arxiv.org/abs/2410.09302, eq. 12, with the off-policy correction above.
    """
    returns = torch.zeros_like(rewards)
    length = rewards.shape[1]
    following = next_values[:, -1]
    for t in reversed(range(length)):
        if t + 1 < length:
            following = torch.where(action_mask[:, t + 1], returns[:, t + 1] - advantages[:, t + 1], next_values[:, t])
        returns[:, t] = rewards[:, t] + discounts[:, t] * ((1 - lam) * next_values[:, t] + lam * following)
    return returns.detach()


def lam_for(length: int) -> float:
    """The lambda by which an error at the last of `length` actions is heard at the first with 1/e of its weight; at
    least 0.95. With that throughout, the first of 100 tokens would learn from V alone, which knows little early on.
    """
    return max(0.95, 1 - 1 / length)


def beta_for(length: int) -> float:
    """The price of a nat, in the unit of rewards, of completions of at most `length` actions.

    A policy that moves by so much at every token pays it at every token: at 0.4 of that unit in all it still gains
    where it moves by a nat each. At most 0.03, which is cheap for short ones.
    """
    return min(0.03, 0.4 / length)


def _continuation(returns: Tensor, next_values: Tensor, advantages: Tensor, action_mask: Tensor) -> Tensor:
    """Corrected return from s_{t+1}; after the last action only V(s_{t+1}) is left. (B, T)"""
    shifted = torch.cat([(returns - advantages)[:, 1:], next_values[:, -1:]], dim=1)
    goes_on = torch.cat([action_mask[:, 1:], torch.zeros_like(action_mask[:, :1])], dim=1)
    return torch.where(goes_on, shifted, next_values)
