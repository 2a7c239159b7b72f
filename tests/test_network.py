"""The Q-network against first principles: a full-vocabulary forward pass of the plain model, written out by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_dqn import heads, targets
from llm_dqn.errors import UserError
from llm_dqn.network import QNetwork
from llm_dqn.replay import PrefixReplay
from llm_dqn.types import PrefixBatch, TokenBatch
from tests import tiny_models
from tests.networks import episode, lora, network, shake

EPISODES = [([5, 6, 7], [8, 9, 10, 1]), ([11], [12, 1]), ([13, 14, 15, 16, 17], [18, 19])]


def batch_of(net: QNetwork, reward: float = 0.0, episodes=EPISODES) -> PrefixBatch:
    """Episodes with the true log-probabilities of the reference."""
    replay = PrefixReplay(16)
    replay.add([episode(p, c, reward, ended="eos" if c[-1] == 1 else "length") for p, c in episodes])
    batch = replay.batch(np.arange(len(episodes)))
    return replace(batch, ref_logprobs=net.logprobs(batch.tokens, "reference"))


def by_hand(logits_of, net: QNetwork, prompt: list[int], completion: list[int]) -> list[float]:
    """log pi(a|s) from one unpadded forward pass a state: no batching, no masks, no gathering."""
    found = []
    for t, action in enumerate(completion):
        state = torch.tensor([prompt + completion[:t]])
        logits = logits_of(state)[0, -1, : net.num_tokens].float()
        found.append(logits.log_softmax(-1)[action].item())
    return found


@torch.no_grad()
def test_step_0_is_the_pretrained_model_exactly(architecture_path):
    """Invariant 1, for every architecture: same log-probabilities, Q = V = 0, no KL, loss 0."""
    net = network(architecture_path)
    plain = AutoModelForCausalLM.from_pretrained(architecture_path, dtype=torch.float32).eval()
    batch = batch_of(net)
    for role in ("online", "target", "reference"):
        logprobs = net.logprobs(batch.tokens, role)
        for row, (prompt, completion) in enumerate(EPISODES):
            exact = by_hand(lambda ids: plain(ids).logits, net, prompt, completion)
            assert logprobs[row, : len(completion)].tolist() == pytest.approx(exact, abs=2e-6)
    q, target = net(batch), net.target(batch)
    for value in (q.taken, q.values, target.taken, target.values, target.next_values, net.kl(batch.tokens)):
        assert value.abs().max().item() <= 1e-6


@pytest.mark.parametrize("kind", ["lm", "linear"])
@torch.no_grad()
def test_q_values_are_what_the_definition_says(tiny_llama_path, kind):
    """Q, V and V' of a shaken network, position by position, from the plain model and the heads alone."""
    backup = None if kind == "lm" else (lambda q, prior, _: targets.soft_value(q, prior, 0.5))
    net = network(tiny_llama_path, q_head=kind, backup=backup)
    shake(net, 0.2)
    batch = batch_of(net)
    q, target = net(batch), net.target(batch, role="online")
    with net.roles.acting_as("online") as plain:
        for row, (prompt, completion) in enumerate(EPISODES):
            for t, action in enumerate(completion):
                state = torch.tensor([prompt + completion[:t]])
                output = plain(state, output_hidden_states=True)
                hidden, logits = output.hidden_states[-1][:, -1], output.logits[0, -1]
                if kind == "lm":
                    value = net.heads["value"](hidden)
                    ratio = logits.log_softmax(-1)[action] - batch.ref_logprobs[row, t]
                    expected_q, expected_v = value + 0.5 * ratio, value
                else:
                    q_values = net.heads["q"](hidden)
                    expected_q = q_values[0, action]
                    expected_v = targets.soft_value(q_values, logits.log_softmax(-1)[None], 0.5)
                assert q.taken[row, t].item() == pytest.approx(expected_q.item(), abs=1e-5)
                assert target.taken[row, t].item() == pytest.approx(expected_q.item(), abs=1e-5)
                assert target.values[row, t].item() == pytest.approx(expected_v.item(), abs=1e-5)
                if t > 0:
                    assert target.next_values[row, t - 1].item() == pytest.approx(expected_v.item(), abs=1e-5)


def test_prompt_tokens_and_padding_never_enter_the_loss(tiny_llama_path):
    """Invariants 4 and 5: an episode's Q does not depend on the batch it sits in, nor on what lies in the padding."""
    net = network(tiny_llama_path)
    shake(net)
    together = net(batch_of(net)).taken
    for row, pair in enumerate(EPISODES):
        alone = net(batch_of(net, episodes=[pair])).taken
        length = len(pair[1])
        assert torch.allclose(together[row, :length], alone[0, :length], atol=2e-6)
        assert together[row, length:].abs().sum().item() == 0.0
    batch = batch_of(net)
    littered = batch.tokens.input_ids.masked_fill(batch.tokens.attention_mask == 0, 17)
    tokens = TokenBatch(**{**vars(batch.tokens), "input_ids": littered})
    assert torch.allclose(net(replace(batch, tokens=tokens)).taken, together, atol=2e-6)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere"])
def test_chunked_loss_equals_the_naive_one(build_model, architecture, monkeypatch):
    """Invariant 6: values and gradients, softcap and logit scale included."""
    path = build_model(architecture)
    net = network(path)
    shake(net, 0.1)
    batch = batch_of(net)
    gradients = []
    for chunk in (2, 10**6):
        monkeypatch.setattr(heads, "CHUNK", chunk)
        net.zero_grad()
        net(batch).taken.square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters() if p.requires_grad])
    naive = network(path)
    naive.load_state_dict(net.state_dict())
    with naive.roles.acting_as("online") as plain:
        logits = plain(batch.tokens.input_ids, attention_mask=batch.tokens.attention_mask).logits
    total = 0.0
    hidden = naive._hidden(batch.tokens, "online")
    for row, (prompt, completion) in enumerate(EPISODES):
        for t, action in enumerate(completion):
            at = len(prompt) - 1 + t
            ratio = logits[row, at].float().log_softmax(-1)[action] - batch.ref_logprobs[row, t]
            total = total + (naive.heads["value"](hidden[row : row + 1, at].detach()) + 0.5 * ratio).square().sum()
    total.backward()
    gradients.append([p.grad for p in naive.parameters() if p.requires_grad])
    for name, first, second, third in zip(
        (n for n, p in net.named_parameters() if p.requires_grad), *gradients, strict=True
    ):
        assert torch.allclose(first, second, atol=1e-5), name
        assert torch.allclose(first, third, atol=1e-5), name


@pytest.mark.parametrize("kind", ["lm", "linear"])
def test_rows_beyond_the_tokenizer_have_no_probability_and_no_value(build_model, kind):
    """Invariant 7: padded vocabulary rows, however high their logits, change nothing."""
    words = tiny_models.tokenizer()
    path = build_model("llama", vocab_rows=len(words) + 13, tied=False)
    backup = lambda q, prior, _: targets.hard_value(q, targets.support_mask(prior, 0))  # noqa: E731
    net = network(path, q_head=kind, backup=backup)
    shake(net, 0.1)
    batch = batch_of(net, reward=1.0)
    before = [net(batch).taken.detach(), net.target(batch).next_values]
    with torch.no_grad(), net.roles.acting_as("reference") as plain:
        plain.get_output_embeddings().weight[len(words) :] = 50.0
    assert net.num_tokens == len(words)
    assert torch.equal(net(batch).taken, before[0]) and torch.equal(net.target(batch).next_values, before[1])
    net(batch).taken.sum().backward()
    states = net._hidden(batch.tokens, "online")[:, 0]
    assert net._acting_logits(states, "online").shape[-1] == len(words)


def test_the_target_stands_still_until_it_is_synced(tiny_llama_path):
    net = network(tiny_llama_path)
    batch = batch_of(net)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.02)
    assert not any(p.requires_grad for n, p in net.named_parameters() if ".target" in n or n.startswith("target_heads"))
    before = net.target(batch).taken.clone()
    for _ in range(3):
        (net(batch).taken - 1).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(net.target(batch).taken, before)
    online = net.target(batch, role="online").taken
    assert (online - before).abs().max() > 1e-3
    net.sync_target()
    assert torch.allclose(net.target(batch).taken, online, atol=1e-6)


def test_polyak_sync_moves_a_part_of_the_way(tiny_llama_path):
    net = network(tiny_llama_path)
    shake(net)
    old = {k: v.clone() for k, v in net.checkpoint_state().items()}
    net.sync_target(0.25)
    new = net.checkpoint_state()
    moved = [k for k in new if k.startswith(("target.", "target_heads."))]
    assert moved
    for key in moved:
        twin = key.replace("target_heads.", "heads.").replace("target.", "online.", 1) if key in old else key
        assert torch.allclose(new[key], 0.75 * old[key] + 0.25 * old[twin], atol=1e-6), key


def test_target_head_lags_the_heads_only(tiny_llama_path):
    net = network(tiny_llama_path, target="head")
    assert not any(".target." in name for name, _ in net.named_parameters())
    batch = batch_of(net)
    shake(net)
    target = net.target(batch)
    assert target.values.abs().max().item() == 0.0  # the old head, all zeros
    assert torch.allclose(target.taken, 0.5 * (net.logprobs(batch.tokens, "online") - batch.ref_logprobs), atol=1e-6)


def test_full_fine_tuning_has_the_same_three_roles(tiny_llama_path):
    net = network(tiny_llama_path, lora=None)
    batch = batch_of(net)
    assert net.target(batch).taken.abs().max().item() == 0.0
    shake(net, 0.05)
    assert net.target(batch).taken.abs().max().item() == 0.0
    assert net(batch).taken.abs().max().item() > 1e-2
    net.sync_target()
    assert torch.allclose(net.target(batch).taken, net(batch).taken, atol=1e-6)


def test_a_linear_head_on_a_model_that_bends_its_logits_is_refused_in_one_sentence(build_model):
    with pytest.raises(UserError, match=r"q_head: linear .* Gemma2ForCausalLM .* use q_head: lm"):
        network(build_model("gemma2"), q_head="linear")


def test_lora_on_a_tied_head_unties_it_first(build_model):
    path = build_model("llama", tied=True)
    net = network(path, lora=lora(target_modules=["q_proj", "lm_head"]))
    with net.roles.acting_as("online") as plain:
        embedding, head = plain.get_input_embeddings().weight, plain.get_output_embeddings().weight
    assert embedding.data_ptr() != head.data_ptr()
    assert net.kl(batch_of(net).tokens).abs().max().item() <= 1e-6


@pytest.mark.parametrize("kind", ["lm", "linear"])
def test_acting_logits_are_prior_times_exp_q_over_beta(tiny_llama_path, kind):
    """The model that generates is the policy whose log-probabilities are learned from."""
    net = network(tiny_llama_path, q_head=kind, backup=lambda q, prior, _: targets.soft_value(q, prior, 0.5))
    shake(net, 0.1)
    batch = batch_of(net)
    with net.writer("online") as model:
        logits = model(batch.tokens.input_ids, attention_mask=batch.tokens.attention_mask).logits
    expected = net.logprobs(batch.tokens, "online")
    for row, (prompt, completion) in enumerate(EPISODES):
        for t, action in enumerate(completion):
            got = logits[row, len(prompt) - 1 + t, : net.num_tokens].float().log_softmax(-1)[action]
            assert got.item() == pytest.approx(expected[row, t].item(), abs=1e-5)
