"""Other engines than `generate` write what it would, with the adapter as it is, or the run refuses to start."""

from dataclasses import replace

import pytest
import torch

from llm_dqn.errors import RunError, StepFailed, UserError
from llm_dqn.policy import greedy, sampled
from llm_dqn.recipe import DQNConfig, RecipeError
from llm_dqn.replay import collate_tokens
from llm_dqn.rollout import rollout, verify_generator
from llm_dqn.trainer import DQNTrainer
from llm_dqn.vllm_server import VLLMServer
from tests import tiny_models
from tests.networks import PROMPTS, lora, network, prompts, shake, writer
from tests.vllm_double import BASE, Double


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


# --- vllm -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def serve(tiny_llama_path):
    servers = []

    def start(**options):
        servers.append(Double(tiny_llama_path, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def test_a_server_writes_with_the_adapter_as_it_is_now(tiny_llama_path, serve, tmp_path):
    net, double = network(tiny_llama_path), serve()
    plain, asked = writer(net, tiny_llama_path), prompts(tiny_llama_path)
    write = replace(plain, engine="vllm", server=VLLMServer(double.url + "/v1", str(tmp_path)))
    before = {name: value.clone() for name, value in net.checkpoint_state().items()}
    verify_generator(write, asked)
    assert all(torch.equal(before[name], value) for name, value in net.checkpoint_state().items())
    for scale in (0.1, 0.2):  # two policies, one after the other
        shake(net, scale)
        written = rollout(write, asked, greedy(), seed=0)
        assert ids(written) == ids(rollout(plain, asked, greedy(), seed=0))
        assert len(double.adapters) == len(list(tmp_path.iterdir())) == 1  # the old one is gone there and here
    explored = rollout(write, asked, replace(greedy(), epsilon=1.0), seed=0)
    assert ids(explored) == ids(rollout(plain, asked, replace(greedy(), epsilon=1.0), seed=0)) != ids(written)
    first = rollout(write, asked[:1] * 4, replace(sampled(), temperature=0.7), seed=1)
    assert ids(first) == ids(rollout(write, asked[:1] * 4, replace(sampled(), temperature=0.7), seed=1))
    assert len({tuple(row) for row in ids(first)}) > 1  # the same prompt, draws of its own each time
    for episode in first:
        torch.testing.assert_close(episode.behaviour_logprobs, learners_word(plain, episode), atol=1e-4, rtol=0)


def test_a_server_that_ignores_the_adapter_is_refused_although_a_fresh_adapter_changes_nothing(tiny_llama_path, serve):
    write = writer(network(tiny_llama_path), tiny_llama_path)
    server = VLLMServer(serve(ignores_adapters=True).url)
    with pytest.raises(RunError, match=r"disagree by .* nats .* vllm, online policy"):
        verify_generator(replace(write, engine="vllm", server=server), prompts(tiny_llama_path))


def test_what_is_wrong_with_a_server_is_said_in_words(tiny_llama_path, serve):
    with pytest.raises(UserError, match=r"rollout.vllm_url: localhost:1 is no address"):
        VLLMServer("localhost:1")
    with pytest.raises(UserError, match=r"rollout.vllm_url: no vLLM server answers at http://127.0.0.1:9"):
        VLLMServer("http://127.0.0.1:9")
    write, server = writer(network(tiny_llama_path), tiny_llama_path), VLLMServer(serve(lora=False).url)
    with pytest.raises(StepFailed, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
        rollout(replace(write, engine="vllm", server=server), prompts(tiny_llama_path), sampled(), seed=0)
    with pytest.raises(RecipeError, match="needs the address of a server"):
        DQNConfig(output_dir="x", engine="vllm", collectors="y")
    with pytest.raises(RecipeError, match="uniform needs engine: generate, got continuous"):
        DQNConfig(output_dir="x", engine="continuous", explore="uniform")


def test_a_run_trains_on_what_a_server_writes(tiny_llama_path, serve, tmp_path):
    double = serve()
    args = DQNConfig(
        output_dir=str(tmp_path / "run"),
        engine="vllm",
        vllm_url=double.url,
        max_steps=4,
        updates_per_collect=2,
        prompts_per_collect=4,
        learning_starts=4,
        max_completion_length=6,
        per_device_train_batch_size=4,
        capacity=16,
        epsilon={"start": 0.0, "end": 0.0},
        eval_steps=0,
        learning_rate=0.01,
        final_eval_prompts=2,
    )
    data = [{"prompt": text} for text in PROMPTS * 3]
    trainer = DQNTrainer(tiny_llama_path, count_e, args, data, peft_config=lora())
    trainer.train()
    names = list(dict.fromkeys(body["model"] for body in double.asked))
    assert len(names) >= 4 and BASE in names  # the probe's adapter, those of both collections, the final one, the base


def count_e(completions, **_):
    return [float(completion.count("e")) for completion in completions]
