"""Targets on hand-made numbers that make the likely mistake loud, and against exact value iteration."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from llm_dqn import DQNConfig, targets
from llm_dqn.assembly import price, returns_rule
from llm_dqn.losses import squared_error, td_loss
from llm_dqn.types import QOutput

NEVER = float("-inf")


# --- hand-made numbers ----------------------------------------------------------------------------------------------


def test_q_learning_target_takes_the_best_next_action_and_stops_at_the_end():
    next_q = torch.tensor([[1.0, 5.0, 2.0], [99.0, 98.0, 97.0]])  # the second row ends: its next values must not count
    got = targets.q_learning_target(torch.tensor([10.0, 7.0]), torch.tensor([0.5, 0.0]), next_q)
    assert got.tolist() == [12.5, 7.0]


def test_double_q_target_lets_online_choose_and_target_judge():
    next_q_target = torch.tensor([[91.0, 2.0, 66.0]])
    next_q_online = torch.tensor([[11.0, 20.0, 1.0]])
    got = targets.double_q_target(torch.tensor([0.0]), torch.tensor([1.0]), next_q_target, next_q_online)
    assert got.tolist() == [2.0]  # roles swapped: 91


def test_a_max_looks_only_where_the_prior_does():
    log_prior = torch.tensor([[0.6, 0.3, 0.1, 0.0]]).log()
    q_values = torch.tensor([[1.0, 2.0, 50.0, 100.0]])
    assert targets.hard_value(q_values, targets.support_mask(log_prior, 2)).tolist() == [2.0]
    assert targets.hard_value(q_values, targets.support_mask(log_prior, 0)).tolist() == [
        50.0
    ]  # never the impossible one


def test_soft_value_lies_between_mean_and_max_and_tends_to_both():
    log_prior = torch.tensor([[0.25, 0.75]]).log()
    q_values = torch.tensor([[4.0, 0.0]])
    assert targets.soft_value(q_values, log_prior, 1e4).item() == pytest.approx(1.0, abs=1e-2)
    assert targets.soft_value(q_values, log_prior, 1e-2).item() == pytest.approx(4.0, abs=2e-2)
    exact = 0.5 * torch.tensor(0.25 * torch.e**8 + 0.75).log()
    assert targets.soft_value(q_values, log_prior, 0.5).item() == pytest.approx(exact.item(), abs=1e-6)


ROWS = {  # one episode of three actions, one of two, padded
    "rewards": torch.tensor([[0.0, 0.0, 8.0], [0.0, 4.0, 0.0]]),
    "discounts": torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.0, 0.0]]),
    "next_values": torch.tensor([[100.0, 40.0, 999.0], [20.0, 999.0, 0.0]]),
    "advantages": torch.tensor([[7.0, 2.0, 1.0], [5.0, 3.0, 0.0]]),
    "action_mask": torch.tensor([[True, True, True], [True, True, False]]),
}


def test_one_step_return_bootstraps_everywhere_but_at_the_end():
    assert targets.n_step_return(**ROWS, n=1).tolist() == [[50.0, 20.0, 8.0], [10.0, 4.0, 0.0]]
    assert targets.lambda_return(**ROWS, lam=0.0).tolist() == [[50.0, 20.0, 8.0], [10.0, 4.0, 0.0]]


def test_two_step_return_pays_for_the_second_action_and_not_for_the_first():
    # first row, t = 0: 0 + 0.5 * ((0 - 2) + 0.5 * 40); t = 1: 0 + 0.5 * (8 - 1)
    assert targets.n_step_return(**ROWS, n=2).tolist() == [[9.0, 3.5, 8.0], [0.5, 4.0, 0.0]]


def test_full_return_needs_no_target_network():
    far = targets.n_step_return(**ROWS, n=10)
    assert torch.equal(far, targets.lambda_return(**ROWS, lam=1.0))
    assert far.tolist() == [[0.5 * (-2 + 0.5 * (8 - 1)), 3.5, 8.0], [0.5, 4.0, 0.0]]
    blind = targets.n_step_return(**(ROWS | {"next_values": torch.full((2, 3), 1e6)}), n=10)
    assert torch.equal(far, blind)


def test_lambda_return_is_the_mixture_of_n_step_returns():
    lam = 0.3
    steps = [targets.n_step_return(**ROWS, n=n) for n in (1, 2, 3)]
    mixture = (1 - lam) * (steps[0] + lam * steps[1]) + lam**2 * steps[2]
    assert torch.allclose(targets.lambda_return(**ROWS, lam=lam), mixture)


@pytest.mark.parametrize(("length", "per_token"), [(1, 0.03), (13, 0.03), (40, 0.01), (400, 0.001)])
def test_a_whole_completion_may_move_however_long_it_is(length, per_token):
    """A nat at each of its tokens costs less than half a unit of reward; a price that is given holds."""
    assert targets.beta_for(length) == pytest.approx(per_token)
    assert price(DQNConfig(output_dir="-", max_completion_length=length)) == pytest.approx(per_token)
    assert price(DQNConfig(output_dir="-", max_completion_length=length, beta=0.2)) == 0.2


@pytest.mark.parametrize("length", [40, 100, 1000])
def test_a_reward_at_the_end_is_heard_at_the_first_action(length):
    """Where V knows nothing yet: 1/e of it, however long completions are; of short ones more."""
    zeros = torch.zeros(1, length)
    rewards = zeros.clone()
    rewards[0, -1] = 1.0
    mask, discounts = torch.ones(1, length, dtype=torch.bool), torch.ones(1, length)
    returns = targets.lambda_return(rewards, discounts, zeros, zeros, mask, targets.lam_for(length))
    assert returns[0, 0].item() == pytest.approx(math.exp(-1), rel=0.02)
    assert targets.lam_for(20) == targets.lam_for(5) == 0.95
    batch = SimpleNamespace(rewards=rewards, discounts=discounts, action_mask=mask)
    q = QOutput(zeros, zeros, zeros, zeros)
    by_rule = returns_rule(DQNConfig(output_dir="-", max_completion_length=length))
    given = returns_rule(DQNConfig(output_dir="-", max_completion_length=length, lam=0.5))
    assert torch.equal(by_rule(batch, q), returns) and given(batch, q)[0, 0] < 1e-6


def test_a_truncated_episode_bootstraps_after_its_last_action():
    going_on = ROWS | {"discounts": torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.5, 0.0]])}
    expected = [8 + 0.5 * 999.0, 4 + 0.5 * 999.0]
    for got in (targets.n_step_return(**going_on, n=9), targets.lambda_return(**going_on, lam=1.0)):
        assert [got[0, 2].item(), got[1, 1].item()] == expected


# --- the 3 x 3 grid world -------------------------------------------------------------------------------------------

MOVES = [(-1, 0), (1, 0), (0, -1), (0, 1)]  # up, down, left, right
GOAL = 8  # a corner; the start is the centre


def _grid_step(cell: int, action: int) -> tuple[int, float]:
    row, column = divmod(cell, 3)
    row, column = min(2, max(0, row + MOVES[action][0])), min(2, max(0, column + MOVES[action][1]))
    arrived = 3 * row + column
    return arrived, 0.0 if arrived == GOAL else -1.0


def _grid() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    pairs = [(cell, action) for cell in range(9) if cell != GOAL for action in range(4)]
    steps = [_grid_step(cell, action) for cell, action in pairs]
    cells, actions = torch.tensor(pairs).T
    arrived = torch.tensor([cell for cell, _ in steps])
    rewards = torch.tensor([reward for _, reward in steps])
    return cells, actions, arrived, rewards, (arrived != GOAL).float()


def _distance(cell: int) -> int:
    row, column = divmod(cell, 3)
    return 2 - row + 2 - column


@pytest.mark.parametrize("double", [False, True])
def test_grid_world_from_the_textbook(double):
    """-1 a step, 0 at the goal: Q(s, a) = -(steps still to go after a). Learned by gradient on a target table."""
    cells, actions, arrived, rewards, discounts = _grid()
    table = torch.zeros(9, 4, requires_grad=True)
    target_table = torch.zeros(9, 4)
    optimizer = torch.optim.SGD([table], lr=0.5)
    everything = torch.ones(len(cells), dtype=torch.bool)
    for step in range(200):
        if step % 10 == 0:
            target_table = table.detach().clone()
        if double:
            td_target = targets.double_q_target(rewards, discounts, target_table[arrived], table.detach()[arrived])
        else:
            td_target = targets.q_learning_target(rewards, discounts, target_table[arrived])
        loss = td_loss(table[cells, actions], td_target, everything, 1.0, squared_error)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    exact = torch.tensor(
        [0.0 if there == GOAL else -1.0 - max(0, _distance(int(there)) - 1) for there in arrived.tolist()]
    )
    assert torch.allclose(table.detach()[cells, actions], exact, atol=1e-5)
    walk = [4]
    while walk[-1] != GOAL:
        walk.append(_grid_step(walk[-1], int(table[walk[-1]].argmax()))[0])
        assert len(walk) <= 3
    assert len(walk) == 3


# --- an exhaustive tree of tokens -----------------------------------------------------------------------------------

V, DEPTH, BETA = 4, 3, 0.5


class Tree:
    """All token sequences of DEPTH tokens over V tokens; a state is a prefix, and every leaf has a reward."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.prefixes = [p for n in range(DEPTH) for p in itertools.product(range(V), repeat=n)]
        self.index = {prefix: i for i, prefix in enumerate(self.prefixes)}
        self.log_prior = torch.randn(len(self.prefixes), V, generator=generator).log_softmax(-1)
        self.leaves = list(itertools.product(range(V), repeat=DEPTH))
        self.reward = torch.rand(len(self.leaves), generator=generator)

    def exact(self, value_of) -> tuple[Tensor, Tensor]:
        """Q (states, V) and V (states,) by dynamic programming from the leaves."""
        q, v = torch.zeros(len(self.prefixes), V), torch.zeros(len(self.prefixes))
        for prefix in sorted(self.prefixes, key=len, reverse=True):
            i = self.index[prefix]
            for token in range(V):
                child = (*prefix, token)
                q[i, token] = self.reward[self.leaves.index(child)] if len(child) == DEPTH else v[self.index[child]]
            v[i] = value_of(q[i : i + 1], self.log_prior[i : i + 1])[0]
        return q, v

    def episodes(self, on_policy: bool, policy: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """(count, DEPTH) leaves, from `policy` (states, V) or uniformly."""
        chosen = []
        for _ in range(count):
            prefix: tuple[int, ...] = ()
            while len(prefix) < DEPTH:
                weights = policy[self.index[prefix]] if on_policy else torch.ones(V)
                prefix = (*prefix, int(torch.multinomial(weights, 1, generator=generator)))
            chosen.append(prefix)
        return torch.tensor(chosen)


def _soft(q: Tensor, log_prior: Tensor) -> Tensor:
    return targets.soft_value(q, log_prior, BETA)


def _hard(q: Tensor, log_prior: Tensor) -> Tensor:
    return targets.hard_value(q)


RULES = {
    "one step": lambda facts: targets.n_step_return(*facts, 1),
    "two steps": lambda facts: targets.n_step_return(*facts, 2),
    "to the end": lambda facts: targets.n_step_return(*facts, DEPTH),
    "lambda": lambda facts: targets.lambda_return(*facts, 0.7),
}


@pytest.mark.parametrize("on_policy", [True, False], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("value_of", [_soft, _hard], ids=["soft", "hard"])
@pytest.mark.parametrize("rule", RULES, ids=RULES.keys())
def test_every_target_rule_converges_to_dynamic_programming(rule, value_of, on_policy):
    tree = Tree()
    exact_q, exact_v = tree.exact(value_of)
    q = torch.zeros(len(tree.prefixes), V)
    generator = torch.Generator().manual_seed(1)
    for sweep in range(60):
        target_q, values = q.clone(), value_of(q, tree.log_prior)
        # A behaviour policy on the side of Q with every action possible, or the uniform one.
        policy = 0.5 * (tree.log_prior + q / BETA).softmax(-1) + 0.5 / V
        sequences = tree.episodes(on_policy, policy, 400, generator) if sweep else torch.tensor(tree.leaves)
        states = torch.tensor([[tree.index[tuple(row[:t])] for t in range(DEPTH)] for row in sequences.tolist()])
        following = torch.cat([states[:, 1:], states[:, :1]], dim=1)
        rewards = torch.zeros(len(sequences), DEPTH)
        rewards[:, -1] = tree.reward[[tree.leaves.index(tuple(row)) for row in sequences.tolist()]]
        discounts = torch.ones(len(sequences), DEPTH)
        discounts[:, -1] = 0.0
        advantages = target_q[states, sequences] - values[states]
        mask = torch.ones_like(rewards, dtype=torch.bool)
        returns = RULES[rule]((rewards, discounts, values[following], advantages, mask))
        # The exact minimiser of the squared TD error over these episodes: the mean target of every (state, action).
        totals, counts = torch.zeros_like(q), torch.zeros_like(q)
        totals.index_put_((states, sequences), returns, accumulate=True)
        counts.index_put_((states, sequences), torch.ones_like(returns), accumulate=True)
        q = torch.where(counts > 0, totals / counts.clamp(min=1), q)
    assert torch.allclose(q, exact_q, atol=1e-5)
    assert torch.allclose(value_of(q, tree.log_prior), exact_v, atol=1e-5)


def test_without_the_correction_old_episodes_mislead():
    """The switch `corrected: false` is a real one: uncorrected long returns learn the behaviour policy's values."""
    tree = Tree()
    exact_q, _ = tree.exact(_hard)
    sequences = torch.tensor(tree.leaves)
    rewards = torch.zeros(len(sequences), DEPTH)
    rewards[:, -1] = tree.reward
    discounts = torch.ones(len(sequences), DEPTH)
    discounts[:, -1] = 0.0
    zeros = torch.zeros_like(rewards)
    returns = targets.n_step_return(rewards, discounts, zeros, zeros, zeros.bool() | True, DEPTH)
    first = torch.stack([returns[sequences[:, 0] == token, 0].mean() for token in range(V)])
    assert (exact_q[0] - first > 0.05).all()
