"""What makes an update cheap gives what the plain way gives: values and gradients against full (N, V) tensors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from llm_dqn import DQNConfig, DQNTrainer, targets, vocabulary
from llm_dqn.replay import PrefixReplay
from llm_dqn.vocabulary import OutputRows
from tests.networks import episode, lora, network, shake

N, H, V = 11, 16, 300
EPISODES = [([5, 6, 7], [8, 9, 10, 1]), ([11], [12, 1]), ([13, 14, 15, 16, 17], [18, 19])]


@pytest.fixture
def pieces(monkeypatch):
    """Sweeps in many pieces, the last ones smaller."""
    monkeypatch.setattr(vocabulary, "POSITIONS", 4)
    monkeypatch.setattr(vocabulary, "HELD_ON_CPU", 4)
    monkeypatch.setattr(vocabulary, "FEWEST_TOKENS", 7)


def tensors(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bend", [None, lambda raw: 3 * torch.tanh(raw / 3), lambda raw: raw * 0.25])
@pytest.mark.parametrize("bias", [False, True])
def test_taken_logprobs_and_their_gradient_equal_log_softmax(pieces, bend, bias):
    """Invariant 6: a sweep in many pieces against one (N, V) tensor, with soft caps, scales and biases."""
    hidden, weight = tensors(N, H, scale=2).requires_grad_(), tensors(V, H, seed=1)
    offset = tensors(V, seed=2) if bias else None
    actions, ahead = torch.arange(N) * 27, tensors(N, seed=3)
    found = vocabulary.taken_logprobs(hidden, actions, OutputRows(weight, offset, bend))
    (gradient,) = torch.autograd.grad((found * ahead).sum(), hidden)
    raw = hidden @ weight.T + (0 if offset is None else offset)
    expected = (raw if bend is None else bend(raw)).log_softmax(-1)[torch.arange(N), actions]
    (naive,) = torch.autograd.grad((expected * ahead).sum(), hidden)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(gradient, naive, atol=1e-5)


@pytest.mark.parametrize("bend", [None, lambda raw: 3 * torch.tanh(raw / 3)])
@pytest.mark.parametrize("kept", [0, 4 * V, 2**20])
@pytest.mark.parametrize("frozen", [False, True])
def test_an_adapted_output_layer_has_the_naive_gradient(pieces, monkeypatch, bend, kept, frozen):
    """By the hidden state, where the trunk is tuned, and by both factors of the adapter."""
    monkeypatch.setattr(vocabulary, "KEPT", kept)
    hidden, weight, offset = tensors(N, H, scale=2), tensors(V, H, seed=1), tensors(V, seed=2)
    down, up = tensors(3, H, seed=4).requires_grad_(), tensors(V, 3, seed=5).requires_grad_()
    wanted = (down, up) if frozen else (down, up, hidden.requires_grad_())
    actions, ahead = torch.arange(N) * 27, tensors(N, seed=3)
    found = vocabulary.adapted_logprobs(hidden, hidden @ down.T, actions, OutputRows(weight, offset, bend), up)
    gradients = torch.autograd.grad((found * ahead).sum(), wanted)
    raw = hidden @ weight.T + offset + hidden @ down.T @ up.T
    expected = (raw if bend is None else bend(raw)).log_softmax(-1)[torch.arange(N), actions]
    assert torch.allclose(found, expected, atol=1e-5)
    for gradient, naive in zip(gradients, torch.autograd.grad((expected * ahead).sum(), wanted), strict=True):
        assert torch.allclose(gradient, naive, atol=1e-4, rtol=1e-5)


def test_large_logits_neither_overflow_nor_vanish(pieces):
    """A running maximum that rises by hundreds from piece to piece."""
    hidden, weight = torch.ones(2, 1), torch.linspace(-900, 900, V).unsqueeze(1)
    rows = OutputRows(weight)
    assert vocabulary.log_normalizer(hidden, rows).tolist() == pytest.approx(
        [900 + np.log(1 / (1 - np.exp(-1800 / 299)))] * 2
    )
    assert not vocabulary.log_normalizer(hidden * float("nan"), rows).isfinite().any()


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("chosen", [[], [0, 3, 4, 9], list(range(N))])
@pytest.mark.parametrize("kept", [0, 4 * V, 2**20])
def test_linear_head_and_its_normaliser_have_the_naive_gradient(pieces, monkeypatch, prior, chosen, kept):
    """Taken Q-values of all positions and acting normalisers of some, through both the trunk and the head.

    The naive computation is in float64: in float32 it is itself further than 1e-5 from it.
    """
    monkeypatch.setattr(vocabulary, "KEPT", kept)  # computed again in backward; kept for the first piece; kept
    hidden, weight = tensors(N, H).requires_grad_(), tensors(V, H, seed=1).requires_grad_()
    rows, scale = (OutputRows(tensors(V, H, seed=4)) if prior else None), 2.5
    actions, places = torch.arange(N) * 27 // 2, torch.tensor(chosen, dtype=torch.int64)
    by_taken, by_normalizer = tensors(N, seed=3), tensors(len(chosen), seed=5)
    taken, normalizers = vocabulary.linear_taken(hidden, weight, actions, places, rows, scale)
    found = torch.autograd.grad((taken * by_taken).sum() + (normalizers * by_normalizer).sum(), (hidden, weight))
    q_values = hidden.double() @ weight.double().T
    logits = scale * q_values + (hidden.double() @ rows.weight.double().T if rows else 0)
    expected = q_values[torch.arange(N), actions], logits[places].logsumexp(-1)
    loss = (expected[0] * by_taken).sum() + (expected[1] * by_normalizer).sum()
    naive = torch.autograd.grad(loss, (hidden, weight))
    for one, other in zip((taken, normalizers), expected, strict=True):
        assert torch.allclose(one.double(), other, atol=1e-5)
    for one, other in zip(found, naive, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def batch_of(net, reward: float = 1.0):
    replay = PrefixReplay(16)
    replay.add([episode(p, c, reward, ended="eos" if c[-1] == 1 else "length") for p, c in EPISODES])
    batch = replay.batch(np.arange(len(EPISODES)))
    return replace(batch, ref_logprobs=net.logprobs(batch.tokens, "reference"))


@pytest.mark.parametrize("uniform", [False, True])
def test_soft_values_of_a_linear_head_are_those_of_the_rule(tiny_llama_path, pieces, uniform):
    """The sweeps of `backup="soft"` against `targets.soft_value` of full tensors."""
    options = {"q_head": "linear", "uniform_prior": uniform}
    swept = network(tiny_llama_path, backup="soft", **options)
    full = network(tiny_llama_path, backup=lambda q, prior, _: targets.soft_value(q, prior, 0.5), **options)
    for net in (swept, full):
        shake(net, 0.2)
        net.sync_target()
    batch = batch_of(swept)
    one, other = swept.target(batch), full.target(batch)
    for name in ("values", "next_values", "taken"):
        assert torch.allclose(getattr(one, name), getattr(other, name), atol=1e-5), name
    assert one.values.abs().max() > 0.1


def test_a_trained_or_adapted_output_layer_comes_to_the_same_numbers(tiny_llama_path, pieces):
    """LoRA on the output layer, fresh and therefore without effect, against the layer alone."""
    plain = network(tiny_llama_path)
    adapted = network(tiny_llama_path, lora=lora(target_modules=["q_proj", "lm_head"]))
    strange = network(tiny_llama_path, lora=lora(target_modules=["q_proj", "lm_head"], use_dora=True))
    whole = network(tiny_llama_path, lora=None)
    batch = batch_of(plain)
    expected = plain(batch).logprobs
    for net in (plain, adapted):
        assert net._output_rows("online") is not None
    for net in (strange, whole):
        assert net._output_rows("online") is None
    for net in (adapted, strange, whole):
        assert torch.allclose(net(batch).logprobs, expected, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("role", ["online", "target", "reference"])
def test_an_adapted_output_layer_says_what_the_model_itself_says(build_model, pieces, architecture, role):
    net = network(build_model(architecture), lora=lora(target_modules=["q_proj", "lm_head"]))
    shake(net, 0.2)
    net.sync_target(0.5)
    batch = batch_of(net)
    with torch.no_grad(), net.roles.acting_as(role) as plain:
        logits = plain(batch.tokens.input_ids, attention_mask=batch.tokens.attention_mask).logits
    found = net.logprobs(batch.tokens, role)
    for row, (prompt, completion) in enumerate(EPISODES):
        states = logits[row, len(prompt) - 1 : len(prompt) - 1 + len(completion), : net.num_tokens].log_softmax(-1)
        expected = states[torch.arange(len(completion)), completion]
        assert torch.allclose(found[row, : len(completion)], expected, atol=1e-5)


def test_log_probabilities_of_a_linear_head_only_where_they_are_asked_for(tiny_llama_path):
    net = network(tiny_llama_path, q_head="linear")
    shake(net, 0.2)
    batch = batch_of(net)
    asked = batch.action_mask & (torch.arange(batch.action_mask.shape[1]) % 2 == 0)
    every, some, none = net(batch), net(batch, asked), net(batch, torch.zeros_like(asked))
    assert torch.allclose(some.logprobs, torch.where(asked, every.logprobs, 0.0), atol=1e-6)
    assert none.logprobs.abs().sum() == 0 and torch.equal(every.taken, none.taken)
    assert every.logprobs[batch.action_mask].max() < 0


def test_normalisers_for_cql_come_from_the_same_pass(tiny_llama_path, monkeypatch):
    net = network(tiny_llama_path, q_head="linear")
    shake(net, 0.2)
    batch, passes = batch_of(net), []
    hidden_of = net._hidden
    monkeypatch.setattr(net, "_hidden", lambda tokens, role: passes.append(role) or hidden_of(tokens, role))
    q = net(batch, normalizers=True)
    assert passes == ["online"]
    states = hidden_of(batch.tokens, "online")
    for row, (prompt, completion) in enumerate(EPISODES):
        for t in range(len(completion)):
            expected = net.heads["q"](states[row, len(prompt) - 1 + t]).logsumexp(-1)
            assert q.normalizers[row, t].item() == pytest.approx(expected.item(), abs=1e-5)


def test_one_pass_of_the_trunk_a_role(tiny_llama_path, monkeypatch):
    """A target reads the target's trunk, and the online one for double Q only."""
    for rule, roles in (("soft", ["target"]), ("double", ["target", "online"])):
        backup = "soft" if rule == "soft" else (lambda q, prior, online: targets.double_value(q, online()))
        net = network(tiny_llama_path, q_head="linear", backup=backup)
        batch, passes = batch_of(net), []
        hidden_of = net._hidden
        monkeypatch.setattr(
            net, "_hidden", lambda tokens, role, of=hidden_of, seen=passes: seen.append(role) or of(tokens, role)
        )
        net.target(batch)
        assert passes == roles


def test_parts_of_a_batch_are_padded_to_their_own_longest_and_add_up_to_its_gradient(tiny_llama_path):
    """What is learned in several pieces, as after memory ran out, is what one piece would have taught."""
    net = network(tiny_llama_path)
    shake(net, 0.2)
    batch = batch_of(net)
    weights = [parameter for parameter in net.parameters() if parameter.requires_grad]

    def gradients(parts):
        loss = sum((part.rewards - net(part).taken)[part.action_mask].square().sum() for part in parts)
        return torch.autograd.grad(loss, weights, allow_unused=True)

    parts = batch.split(1)
    assert [part.tokens.input_ids.shape[1] for part in parts] == sorted(len(p) + len(c) for p, c in EPISODES)
    assert [part.tokens.actions.shape[1] for part in parts] == [2, 4, 2]
    assert sorted(int(slot) for part in parts for slot in part.slots) == [0, 1, 2]
    assert batch.split(3) == [batch]
    for one, other in zip(gradients(parts), gradients([batch]), strict=True):
        # summed in another order: single precision is about the largest entry, which may be 100
        assert one is other is None or torch.allclose(one, other, rtol=1e-5, atol=2e-6 * float(other.abs().max() + 10))


def test_accumulated_batches_are_dealt_by_length_and_teach_the_same(tiny_llama_path, tmp_path):
    rates = {"learning_rate": 0.0, "value_learning_rate": 0.0}  # two steps from the same weights
    args = DQNConfig(output_dir=str(tmp_path), prioritized=True, success_share=0.0, max_completion_length=8, **rates)
    run = DQNTrainer(tiny_llama_path, lambda **_: [], args, [{"prompt": "a"}], peft_config=lora())
    lengths = (8, 1, 2, 7)  # of completions, after prompts of one token
    run.replay.add([episode([5], list(range(6, 6 + n)), reward=n / 4) for n in lengths])
    batches = [run.replay.batch(np.array(slots)) for slots in ([0, 1], [2, 3])]
    shake(run.network, 0.1)
    run.learning.size = 2
    seen, gradients, priorities = [], [], []

    def note(*_):
        gradients.append([None if w.grad is None else w.grad.clone() for w in run.parts.trainable])

    run.parts.optimizer.optimizer.register_step_pre_hook(note)
    update = run.learner.update
    run.learner.update = lambda step, parts, rule: (seen.append(parts), update(step, parts, rule))
    for learn in (run.update, run.learn_from):
        learn(batches)
        priorities.append(run.replay.priorities.copy())
    assert [[part.slots.tolist() for part in parts] for parts in seen] == [[[0, 1], [2, 3]], [[1, 2], [3, 0]]]
    assert [[part.tokens.input_ids.shape[1] for part in parts] for parts in seen] == [[9, 8], [3, 9]]
    for one, other in zip(*gradients, strict=True):
        assert one is other is None or torch.allclose(one, other, atol=1e-5)
    assert np.allclose(*priorities, atol=1e-6) and len(set(priorities[0].round(4))) == 4


def test_numbers_too_small_to_matter_are_zero_while_a_step_is_taken_and_only_then(tiny_llama_path, tmp_path):
    rows = [{"prompt": "the film"}, {"prompt": "i hated"}]
    args = DQNConfig(output_dir=str(tmp_path), prompts_per_collect=4, learning_starts=4, max_completion_length=4)
    run = DQNTrainer(tiny_llama_path, lambda completions, **_: [1.0] * len(completions), args, rows, peft_config=lora())
    run.collect()
    seen, step = [], run.parts.optimizer.step
    run.parts.optimizer.step = lambda: seen.append(float(torch.tensor(1e-39) * 0.5)) or step()
    run.update([run.sample()])
    assert seen == [0.0] and float(torch.tensor(1e-39) * 0.5) > 0
    torch.set_flush_denormal(True)
    try:
        run.update([run.sample()])
        assert float(torch.tensor(1e-39) * 0.5) == 0.0  # whoever wants it so keeps it
    finally:
        torch.set_flush_denormal(False)
