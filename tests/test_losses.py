"""Losses on hand-made numbers; constants are chosen so that a flipped sign or mask shouts."""

import pytest
import torch

from llm_dqn import losses

MASK = torch.tensor([[True, True], [True, False]])


def test_td_loss_counts_action_tokens_only():
    taken = torch.tensor([[1.0, 2.0], [4.0, 1e6]])
    target = torch.tensor([[0.0, 4.0], [1.0, -1e6]])
    assert losses.td_loss(taken, target, MASK, 3).item() == pytest.approx((1 + 4 + 9) / 3)
    assert losses.td_loss(taken, target, MASK, 6).item() == pytest.approx((1 + 4 + 9) / 6)  # tokens of other processes


def test_targets_get_no_gradient():
    taken = torch.tensor([[1.0]], requires_grad=True)
    target = torch.tensor([[3.0]], requires_grad=True)
    losses.td_loss(taken, target, torch.tensor([[True]]), 1).backward()
    assert taken.grad.item() == -4.0 and target.grad is None


def test_huber_error_is_square_near_zero_and_linear_beyond():
    assert losses.huber_error(torch.tensor([0.5, -0.5, 1.0, -4.0])).tolist() == [0.25, 0.25, 1.0, 7.0]


def test_dueling_loss_has_the_td_gradient_for_v_and_a_beta_fold_one_for_the_policy():
    beta = 0.25
    values = torch.tensor([[1.0]], requires_grad=True)
    advantages = torch.tensor([[0.5]], requires_grad=True)
    one = torch.tensor([[True]])
    loss = losses.dueling_td_loss(values, advantages, torch.tensor([[3.0]]), one, 1, beta)
    loss.backward()
    assert loss.item() == pytest.approx(1.5**2 * (1 + 1 / beta))
    assert values.grad.item() == pytest.approx(-3.0)
    assert advantages.grad.item() == pytest.approx(-3.0 / beta)


def test_an_action_that_the_policy_gave_up_weighs_less_for_the_policy_and_as_much_for_v():
    half, written = torch.tensor([[0.5, 3.0]]).log(), torch.zeros(1, 2)
    now = half.requires_grad_()
    ratios = losses.truncated_ratios(written, now, cap=1.0)
    assert ratios.tolist() == [[pytest.approx(0.5), 1.0]] and not ratios.requires_grad
    assert losses.truncated_ratios(written, now, cap=2.0)[0, 1] == 2.0
    values, advantages = (torch.zeros(1, 2, requires_grad=True) for _ in range(2))
    target, mask = torch.full((1, 2), -2.0), torch.ones(1, 2, dtype=torch.bool)
    losses.dueling_td_loss(values, advantages, target, mask, 2, beta=0.5, weights=ratios).backward()
    assert values.grad.tolist() == [[2.0, 2.0]]
    assert advantages.grad.flatten().tolist() == pytest.approx([0.5 * 4.0, 4.0])


def test_advantage_weighting_raises_good_tokens_in_proportion():
    logprobs = torch.tensor([[-1.0, -2.0], [-5.0, -9.0]], requires_grad=True)
    weights = torch.tensor([[3.0, 1.0], [0.0, 100.0]])
    loss = losses.advantage_weighted_nll(logprobs, weights, MASK, 4.0)
    loss.backward()
    assert loss.item() == pytest.approx((3 * 1 + 1 * 2) / 4)
    assert logprobs.grad.tolist() == [[-0.75, -0.25], [0.0, 0.0]]
    assert losses.advantage_weighted_nll(logprobs, torch.zeros(2, 2), MASK, 0.0).item() == 0.0


def test_all_that_is_lowered_is_no_more_than_all_that_is_raised():
    assert losses.signed_weights(torch.tensor([[3.0, -1.0], [1.0, -1.0]]), 0.5).tolist() == [[3.0, -0.5], [1.0, -0.5]]
    assert losses.signed_weights(torch.tensor([[1.0, -3.0], [1.0, -1.0]]), 1.0).tolist() == [[1.0, -1.5], [1.0, -0.5]]
    for few in ([[1.0, 2.0]], [[0.0, 0.0]]):
        assert losses.signed_weights(torch.tensor(few), 1.0).tolist() == few
    assert losses.signed_weights(torch.tensor([[-1.0]]), 1.0).tolist() == [[0.0]]


def test_advantages_against_the_sign_of_their_completion_count_nothing():
    advantages = torch.tensor([[1.0, -2.0, 3.0], [-1.0, 2.0, -3.0], [0.0, 5.0, -5.0]])
    assert losses.agreeing(advantages).tolist() == [[1.0, 0.0, 3.0], [-1.0, 0.0, -3.0], [0.0, 0.0, 0.0]]


def test_what_is_lowered_counts_less_the_surer_it_was_written():
    weights, written = torch.tensor([[2.0, -2.0, -2.0, -2.0]]), torch.tensor([[0.25, 0.25, 0.75, 1.0]]).log()
    assert losses.unsure(weights, written).flatten().tolist() == pytest.approx([2.0, -1.5, -0.5, 0.0])


def test_what_is_lowered_counts_less_the_rarer_it_became():
    weights, now = torch.tensor([[2.0, -2.0, -2.0]]), torch.tensor([[0.25, 0.25, 4.0]]).log().requires_grad_()
    tapered = losses.tapered(weights, torch.zeros(1, 3), now)
    assert tapered.tolist() == [[2.0, pytest.approx(-0.5), -2.0]] and not tapered.requires_grad


def test_expectile_above_half_leans_upwards():
    q_taken = torch.tensor([[0.0, 1.0]])
    everything = torch.ones(1, 2, dtype=torch.bool)
    for expectile in (0.5, 0.9):
        grid = torch.linspace(0, 1, 1001)
        totals = [losses.expectile_loss(v.expand(1, 2), q_taken, everything, 2, expectile) for v in grid]
        assert grid[torch.stack(totals).argmin()].item() == pytest.approx(expectile, abs=2e-3)


def test_conservative_loss_is_zero_only_when_the_taken_token_holds_everything():
    q_values = torch.tensor([[0.0, 30.0, 0.0]])
    held = losses.conservative_loss(torch.logsumexp(q_values, -1), q_values[:, 1], torch.tensor([True]), 1)
    missed = losses.conservative_loss(torch.logsumexp(q_values, -1), q_values[:, 0], torch.tensor([True]), 1)
    assert held.item() == pytest.approx(0.0, abs=1e-5) and missed.item() == pytest.approx(30.0, abs=1e-4)


def test_an_empty_mask_is_zero_and_not_a_nan():
    nothing = torch.zeros(1, 2, dtype=torch.bool)
    assert losses.td_loss(torch.ones(1, 2), torch.zeros(1, 2), nothing, 0).item() == 0.0


def test_sampled_kl_is_the_divergence_on_average_and_never_negative():
    generator = torch.Generator().manual_seed(0)
    written, now = (torch.randn(1, 6, generator=generator).log_softmax(-1) for _ in range(2))
    actions = torch.multinomial(written.exp(), 200_000, replacement=True, generator=generator)
    taken = [policy.expand(1, -1).gather(1, actions) for policy in (written, now)]
    estimates = losses.sampled_kl(*taken, torch.ones_like(actions, dtype=torch.bool))
    exact = (written.exp() * (written - now)).sum()
    assert estimates.min() >= 0 and float(estimates.mean()) == pytest.approx(float(exact), rel=0.02)
    masked = losses.sampled_kl(taken[0], taken[1], torch.zeros_like(actions, dtype=torch.bool))
    assert masked.abs().sum() == 0
