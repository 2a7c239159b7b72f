"""Other engines than `generate` write what it would, with the adapter as it is, or the run refuses to start."""

from dataclasses import replace

import pytest
import torch

from llm_dqn.errors import RunError
from llm_dqn.policy import greedy, sampled
from llm_dqn.replay import collate_tokens
from llm_dqn.rollout import rollout, verify_generator
from tests import tiny_models
from tests.networks import network, prompts, shake, writer


def ids(episodes):
    return [episode.completion_ids.tolist() for episode in episodes]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_continuous_batching_is_the_learner_and_greedily_writes_what_generate_does(architecture, build_model):
    path = build_model(architecture)
    net = network(path)
    shake(net, 0.1)
    write, asked = writer(net, path), prompts(path)
    continuous = replace(write, engine="continuous", batch_size=2)  # fewer places than prompts
    verify_generator(continuous, asked)
    assert ids(rollout(continuous, asked, greedy(), seed=0)) == ids(rollout(write, asked, greedy(), seed=0))


def test_continuous_batching_draws_by_its_seed_and_notes_what_the_learner_says(build_model):
    words = tiny_models.tokenizer()
    path = build_model("llama", vocab_rows=len(words) + 13, tied=False)
    net = network(path)
    shake(net, 0.1)
    with torch.no_grad(), net.roles.acting_as("reference") as plain:
        plain.get_output_embeddings().weight[len(words) :] *= 100  # rows beyond the tokenizer would always win
    plain_writer, asked = writer(net, path), prompts(path)
    write = replace(plain_writer, engine="continuous")
    torch.manual_seed(5)
    first = rollout(write, asked, sampled(), seed=1)
    after = torch.rand(1)
    assert ids(first) == ids(rollout(write, asked, sampled(), seed=1)) != ids(rollout(write, asked, sampled(), seed=2))
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    mixed = rollout(write, asked, replace(sampled(), epsilon=0.5, temperature=0.7), seed=3)
    tokens = [e.behaviour_logprobs for e in first + mixed]
    asked_again = [learners_word(plain_writer, e) for e in first + mixed]
    torch.testing.assert_close(torch.cat(tokens), torch.cat(asked_again), atol=1e-4, rtol=0)


def learners_word(write, episode):
    return write.network.logprobs(collate_tokens([episode.prompt_ids], [episode.completion_ids]), "online")[0]


def test_a_continuous_writer_that_ignores_the_adapter_stops_the_run(tiny_llama_path, monkeypatch):
    net, base = network(tiny_llama_path), network(tiny_llama_path)
    shake(net, 0.3)
    monkeypatch.setattr(net, "writer", base.writer)
    with pytest.raises(RunError, match=r"disagree by .* nats .* continuous"):
        verify_generator(replace(writer(net, tiny_llama_path), engine="continuous"), prompts(tiny_llama_path))
