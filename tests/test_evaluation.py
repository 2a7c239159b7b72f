"""Figures of an evaluation on hand-made numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from llm_dqn.evaluation import measure, perplexity, side_by_side, win_rate
from llm_dqn.statistics import bootstrap_interval, distinct_n
from tests.networks import episode, network, prompts, shake, writer


def test_win_rate_counts_ties_half():
    pairs = [(episode([1], [2], b), episode([1], [2], t)) for b, t in ((0, 1), (0, 1), (1, 0), (1, 1))]
    assert win_rate(pairs) == pytest.approx((2 + 0.5) / 4)


def test_bootstrap_interval_covers_the_mean_and_shrinks_with_the_sample():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * 2.0 / 20, rel=0.15)
    assert bootstrap_interval(np.array([1.0, 1.0])) == [1.0, 1.0]


def test_distinct_2_and_perplexity():
    assert distinct_n([[1, 2, 1, 2], [1, 2]], 2) == pytest.approx(2 / 4)
    assert distinct_n([[1]], 2) == 0.0
    assert perplexity([torch.tensor([0.25, 0.5]).log(), torch.tensor([0.125]).log()]) == pytest.approx(4.0)


def test_base_and_tuned_are_measured_by_who_wrote(tiny_llama_path):
    net = network(tiny_llama_path)
    write, asked = writer(net, tiny_llama_path), prompts(tiny_llama_path) * 8

    def score(episodes):
        return [
            episode(
                e.prompt_ids.tolist(),
                e.completion_ids.tolist(),
                float(e.completion_ids[0]),
                ref_logprobs=e.ref_logprobs,
            )
            for e in episodes
        ]

    before = measure(write, asked, score, seed=0).figures
    same = measure(write, asked, score, seed=0, base=True).figures
    assert before["reward_greedy"] == same["reward_greedy"] and before["kl"] == pytest.approx(0, abs=1e-6)
    shake(net, 0.5)
    tuned = measure(write, asked, score, seed=0).figures
    assert measure(write, asked, score, seed=0, base=True).figures == same
    assert tuned["reward_greedy"] != same["reward_greedy"] and tuned["kl"] > 0.05
    assert tuned["perplexity"] > same["perplexity"]


def test_pairs_are_shown_side_by_side():
    asked = replace(episode([1], [2], 0.25), prompt=[{"role": "user", "content": "How?"}], completion="bad")
    pairs = [(asked, replace(asked, completion="good", reward=0.75)), (episode([1], [2]), episode([1], [2]))]
    shown = {"prompt": "How?", "base": "bad", "base_reward": 0.25, "tuned": "good", "tuned_reward": 0.75}
    assert side_by_side(pairs, count=1) == [shown]
    assert [row["prompt"] for row in side_by_side(pairs)] == ["How?", "p"]
