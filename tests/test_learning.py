"""Training a real transformer by the real loss ends at the exact solution of a small problem."""

import itertools

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llm_dqn import losses, targets
from llm_dqn.heads import HeadSettings
from llm_dqn.network import QNetwork
from llm_dqn.replay import PrefixReplay
from llm_dqn.rollout import collate_tokens
from tests.networks import episode

V, DEPTH, BETA = 4, 2, 0.5
PROMPT = [0, 1]
LEAVES = list(itertools.product(range(V), repeat=DEPTH))


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def rewards() -> torch.Tensor:
    return torch.rand(V, V, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def exact_soft_solution(net: QNetwork) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi*(leaf) and V*(prompt), by summing over all leaves: pi* = pi_ref exp(R / beta) / Z."""
    tokens = collate_tokens([torch.tensor(PROMPT)] * len(LEAVES), [torch.tensor(leaf) for leaf in LEAVES])
    log_ref = net.logprobs(tokens, "reference").sum(1)
    scores = log_ref + rewards().flatten() / BETA
    return scores.log_softmax(0), BETA * scores.logsumexp(0)


RULES = {
    "one step": lambda facts: targets.n_step_return(*facts, 1),
    "two steps": lambda facts: targets.n_step_return(*facts, 2),
    "lambda 0.7": lambda facts: targets.lambda_return(*facts, 0.7),
    "to the end": lambda facts: targets.lambda_return(*facts, 1.0),
}


@pytest.mark.parametrize("rule", RULES, ids=RULES.keys())
@pytest.mark.parametrize("data", ["all leaves", "base samples"])
def test_the_lm_head_converges_to_the_soft_optimal_policy(rule, data):
    """Invariant 2 with a transformer: off-policy (every leaf equally often) and from the base model's own samples."""
    net = QNetwork(small_model(), V, HeadSettings(beta=BETA), lora=None)
    log_pi, value = exact_soft_solution(net)
    tokens = collate_tokens([torch.tensor(PROMPT)] * len(LEAVES), [torch.tensor(leaf) for leaf in LEAVES])
    ref_logprobs = net.logprobs(tokens, "reference")
    replay = PrefixReplay(1000)
    replay.add(
        [
            episode(PROMPT, list(leaf), rewards()[leaf].item(), ref_logprobs=ref_logprobs[i])
            for i, leaf in enumerate(LEAVES)
        ]
    )
    on_policy = ref_logprobs.sum(1).exp().numpy()
    copies = np.ones(len(LEAVES)) if data == "all leaves" else 1 + np.round(on_policy * 48)
    batch = replay.batch(np.repeat(np.arange(len(LEAVES)), copies.astype(int)))
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=4e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 1200)
    for step in range(1200):
        q_target = net.target(batch)
        facts = (batch.rewards, batch.discounts, q_target.next_values, q_target.advantages, batch.action_mask)
        q = net(batch)
        count = batch.action_mask.sum()
        loss = losses.dueling_td_loss(q.values, q.advantages, RULES[rule](facts), batch.action_mask, count, BETA)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            net.sync_target()
    learned = net.logprobs(tokens, "online").sum(1)
    first = net.target(replay.batch(np.array([0])), role="online")
    assert (learned.exp() - log_pi.exp()).abs().max().item() < 0.02
    assert first.values[0, 0].item() == pytest.approx(value.item(), abs=0.03)


def test_no_reward_means_no_change():
    """Invariant 1: with R = 0 everywhere the loss is 0 at the start and stays 0."""
    net = QNetwork(small_model(), V, HeadSettings(beta=BETA), lora=None)
    tokens = collate_tokens([torch.tensor(PROMPT)] * len(LEAVES), [torch.tensor(leaf) for leaf in LEAVES])
    ref_logprobs = net.logprobs(tokens, "reference")
    replay = PrefixReplay(100)
    replay.add([episode(PROMPT, list(leaf), 0.0, ref_logprobs=ref_logprobs[i]) for i, leaf in enumerate(LEAVES)])
    batch = replay.batch(np.arange(len(LEAVES)))
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for _ in range(5):
        q_target = net.target(batch)
        facts = (batch.rewards, batch.discounts, q_target.next_values, q_target.advantages, batch.action_mask)
        returns = targets.lambda_return(*facts, 0.95)
        q = net(batch)
        count = batch.action_mask.sum()
        loss = losses.dueling_td_loss(q.values, q.advantages, returns, batch.action_mask, count, BETA)
        advantages = (returns - q_target.values).clamp(min=0)
        loss = loss + losses.advantage_weighted_nll(q.logprobs, advantages, batch.action_mask, advantages.sum())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss.item() == pytest.approx(0.0, abs=1e-9)
        net.sync_target()
    assert net.kl(tokens).max().item() == pytest.approx(0.0, abs=1e-6)
