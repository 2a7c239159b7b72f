"""How wrong a network is: pure functions from tensors to a scalar.

(B, T) tensors with a mask of action tokens; `count` is the number of action tokens to divide by, over all processes
when there are several, so that an episode weighs the same in whichever batch it sits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

ErrorFunction = Callable[[Tensor], Tensor]


def squared_error(error: Tensor) -> Tensor:
    """error^2: regresses on the mean, which for a 0/1 reward is the probability of success."""
    return error.square()


def huber_error(error: Tensor) -> Tensor:
    """error^2 within 1, 2|error| - 1 beyond, so that it equals `squared_error` near 0. Mnih et al. 2015 clip like this.

    Regresses between mean and median: biased where rewards are far apart.
    """
    size = error.abs()
    return torch.where(size <= 1, error.square(), 2 * size - 1)


def masked_mean(values: Tensor, mask: Tensor, count: Tensor | float) -> Tensor:
    """Sum of `values` where `mask`, divided by `count`; 0 for an empty mask."""
    return torch.where(mask, values, 0.0).sum() / torch.as_tensor(count).clamp(min=1)


def td_loss(
    q_taken: Tensor, td_target: Tensor, mask: Tensor, count: Tensor | float, error_fn: ErrorFunction = squared_error
) -> Tensor:
    """Mean error of Q(s, a) against its target. Mnih et al. 2015, eq. 2."""
    return masked_mean(error_fn(q_taken - td_target.detach()), mask, count)


def dueling_td_loss(
    values: Tensor,
    advantages: Tensor,
    td_target: Tensor,
    mask: Tensor,
    count: Tensor | float,
    beta: float,
    error_fn: ErrorFunction = squared_error,
    weights: Tensor | None = None,
) -> Tensor:
    """`td_loss` of Q = V + A, its gradient parted so that V cannot drown the policy.

    A = beta log(pi / pi_ref) moves beta times slower than V for the same step of its logits; dividing its part by beta
    makes both move alike. Both parts are the same error, so the optimum is that of `td_loss`. weights: (B, T) of the
    errors in the policy's part, see `truncated_ratios`; None: 1 each.
    """
    policy_error = error_fn(values.detach() + advantages - td_target.detach())
    policy_part = masked_mean(policy_error if weights is None else weights * policy_error, mask, count) / beta
    value_part = td_loss(values + advantages.detach(), td_target, mask, count, error_fn)
    return policy_part + value_part


def truncated_ratios(written: Tensor, now: Tensor, cap: float) -> Tensor:
    """min(cap, pi / mu) of each action: what an error at it counts for pi where mu wrote it. No gradient.

    written, now: (B, T) log mu(a|s) and log pi(a|s). An action that pi has all but given up is no longer pushed down:
    pushed without end it would move its probability to tokens that nobody has tried. Espeholt et al. 2018, eq. 1
    (rho), https://arxiv.org/abs/1802.01561.
    """
    return (now.detach() - written).exp().clamp(max=cap)


def agreeing(advantages: Tensor) -> Tensor:
    """(B, T) advantages of the sign that their whole completion's has, the first one's; 0 instead of the others.

    Where V knows little, what it makes of a token in the middle is mostly noise; that a completion scored well is not.
    """
    return torch.where(advantages * advantages[:, :1] > 0, advantages, 0.0)


def unsure(weights: Tensor, written: Tensor) -> Tensor:
    """(B, T) those below 0 times 1 - mu. written: (B, T) log mu(a|s).

    Most tokens of a bad completion are right, and the policy was sure of them; where it might as well have written
    something else it may have gone wrong. A gradient of uncertain tokens alone, Wang et al. 2025,
    https://arxiv.org/abs/2506.01939, in degrees and of what is lowered alone: `benchmarks/LOG.md`, 2026-11-30.
    """
    return torch.where(weights < 0, -weights * torch.expm1(written), weights)


def signed_weights(advantages: Tensor, negative: float) -> Tensor:
    """(B, T) positive advantages as they are, negative ones times `negative`, but in sum no more than the positive.

    Once nearly everything scores well, the few failures would otherwise shape the policy alone: it fell apart.
    """
    up, down = advantages.clamp(min=0), advantages.clamp(max=0)
    balance = (up.sum() / (-down.sum()).clamp(min=1e-9)).clamp(max=1)
    return up + negative * balance * down


def tapered(weights: Tensor, written: Tensor, now: Tensor) -> Tensor:
    """The weights, (B, T), those below 0 times min(1, pi / mu). No gradient.

    written, now: (B, T) log mu(a|s) and log pi(a|s). What is lowered counts less the rarer it has become; what is
    raised counts whole, however rare: tapered off-policy REINFORCE, Le Roux et al. 2025, https://arxiv.org/abs/2503.14286,
    here for single tokens.
    """
    return torch.where(weights < 0, weights * truncated_ratios(written, now, 1.0), weights)


def advantage_weighted_nll(logprobs: Tensor, weights: Tensor, mask: Tensor, total_weight: Tensor | float) -> Tensor:
    """-sum w log pi(a|s) / total: raises what turned out better than expected, lowers what has a weight below 0.

    With w = max(0, advantage), and their sum as the total, this is self-imitation, Oh et al. 2018, eq. 2,
    https://arxiv.org/abs/1806.05635. Exactly 0 when no weight is other than 0.
    """
    weighted = torch.where(mask, weights.detach() * logprobs, 0.0).sum()
    return -weighted / torch.as_tensor(total_weight).clamp(min=1e-8)


def expectile_loss(values: Tensor, q_taken: Tensor, mask: Tensor, count: Tensor | float, expectile: float) -> Tensor:
    """V as the upper expectile of Q over the data's actions: mean |expectile - 1(Q < V)| (Q - V)^2.

    Kostrikov et al. 2022, eq. 5, https://arxiv.org/abs/2110.06169, as ILQL uses it on tokens,
    https://arxiv.org/abs/2206.11871.
    """
    error = q_taken.detach() - values
    weight = torch.where(error < 0, 1 - expectile, expectile)
    return masked_mean(weight * error.square(), mask, count)


def conservative_loss(logsumexp_q: Tensor, q_taken: Tensor, mask: Tensor, count: Tensor | float) -> Tensor:
    """Mean of log sum_a exp Q(s, a) - Q(s, a_taken): keeps untried tokens below tried ones.

    CQL(H), Kumar et al. 2020, eq. 4, https://arxiv.org/abs/2006.04779.
    """
    return masked_mean(logsumexp_q - q_taken, mask, count)


def sampled_kl(written: Tensor, now: Tensor, mask: Tensor) -> Tensor:
    """(B, T) estimate of KL(mu || pi) at each state from the one action that mu took: r - 1 - log r, r = pi / mu.

    written, now: (B, T) log mu(a|s) and log pi(a|s). Never negative, and of little variance where the two are close:
    Schulman 2020, http://joschu.net/blog/kl-approx.html (k3). 0 where masked.
    """
    ratio = torch.where(mask, now - written, 0.0)
    return ratio.exp() - 1 - ratio
