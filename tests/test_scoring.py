"""What a network says of each token: the numbers it learned by, for every head and every way to store it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from llm_dqn.heads import ValueHead
from llm_dqn.inference import open_run
from llm_dqn.network import QNetwork
from llm_dqn.replay import collate_tokens
from llm_dqn.rollout import Writer
from llm_dqn.scoring import describe_tokens, token_texts
from llm_dqn.types import Episode, PrefixBatch, TokenBatch
from tests import tiny_models
from tests.networks import episode, network, shake, writer

PER_TOKEN = ("tokens", "q_values", "values", "advantages", "ranks", "base_ranks", "alternatives")
KINDS: dict[str, dict[str, Any]] = {
    "lm": {},
    "linear": {"q_head": "linear"},
    "linear, uniform prior": {"q_head": "linear", "uniform_prior": True},
    "linear, value head": {"q_head": "linear", "with_value": True},
    "lm, all weights": {"lora": None},
    "linear, all weights": {"q_head": "linear", "lora": None},
}


def episodes(count: int = 7) -> list[Episode]:
    """Random ids of different lengths, prompts and completions."""
    rng = np.random.default_rng(0)

    def ids(least: int, most: int) -> list[int]:
        return rng.integers(3, 290, size=rng.integers(least, most)).tolist()

    return [episode(ids(1, 9), [*ids(0, 12), 1]) for _ in range(count)]


def shaken(path: str, **options: Any) -> QNetwork:
    """A network whose policy and heads all differ from where they start."""
    net = network(path, **options)
    shake(net, 0.05 if options.get("lora", "") is None else 0.3)
    return net


def batch_of(net: QNetwork, rows: list[Episode]) -> PrefixBatch:
    """The rows as training sees them, with the reference's own log-probabilities."""
    tokens = collate_tokens([row.prompt_ids for row in rows], [row.completion_ids for row in rows])
    zeros = torch.zeros(tokens.actions.shape)
    written = net.logprobs(tokens, "reference")
    return PrefixBatch(tokens, zeros, zeros, written, written, torch.arange(len(rows)), torch.ones(len(rows)) > 0)


def logits_of(net: QNetwork, tokens: TokenBatch, role: Any) -> torch.Tensor:
    """(B, T, V) of the policy that writes in that role, the long way round."""
    with net.writer(role) as model:
        logits = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).logits.float()
    places = (tokens.prompt_lengths - 1).unsqueeze(1) + torch.arange(tokens.actions.shape[1])
    return logits[torch.arange(len(logits)).unsqueeze(1), places.clamp(max=logits.shape[1] - 1), : net.num_tokens]


def values_of(lines: list[dict[str, Any]], name: str) -> list[float]:
    return [value for line in lines for value in line[name]]


@pytest.mark.parametrize("kind", KINDS)
def test_q_and_v_are_those_that_training_sees(tiny_llama_path: str, kind: str) -> None:
    net = shaken(tiny_llama_path, **KINDS[kind])
    rows = episodes()
    lines = describe_tokens(writer(net, tiny_llama_path), rows)
    batch = batch_of(net, rows)
    with torch.no_grad():
        q = net(batch)
    mask = batch.action_mask
    assert values_of(lines, "q_values") == pytest.approx(q.taken[mask].tolist(), abs=1e-5)
    if "value" in net.heads:
        assert values_of(lines, "values") == pytest.approx(q.values[mask].tolist(), abs=1e-5)
    assert np.std(values_of(lines, "q_values")) > 1e-3
    for line, row in zip(lines, rows, strict=True):
        assert line["token_ids"] == row.completion_ids.tolist()
        assert {len(line[name]) for name in PER_TOKEN} == {len(row.completion_ids)}
        differences = np.subtract(line["q_values"], line["values"])
        assert differences == pytest.approx(np.array(line["advantages"]), abs=2e-6)


@pytest.mark.parametrize("kind", ["linear", "linear, uniform prior"])
def test_v_of_a_linear_head_is_the_soft_maximum_of_its_q(tiny_llama_path: str, kind: str) -> None:
    net = shaken(tiny_llama_path, **KINDS[kind])
    rows = episodes()
    lines = describe_tokens(writer(net, tiny_llama_path), rows)
    tokens = batch_of(net, rows).tokens
    with net.roles.acting_as("online") as plain, torch.no_grad():
        hidden = plain.base_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        prior = plain.get_output_embeddings()(hidden)
        q_values = net.heads["q"](hidden)
        if KINDS[kind].get("uniform_prior"):
            prior = torch.zeros_like(q_values)
        values = net.beta * torch.logsumexp(prior.log_softmax(-1) + q_values / net.beta, dim=-1)
    for row, (line, one) in enumerate(zip(lines, rows, strict=True)):
        first = len(one.prompt_ids) - 1
        expected = values[row, first : first + len(one.completion_ids)].tolist()
        assert line["values"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere", "gpt2"])
def test_ranks_and_alternatives_follow_from_all_logits(build_model, architecture: str) -> None:
    """Tokens that the base finds likeliest, in order, with both probabilities and Q; rows of padding are no tokens."""
    path = build_model(architecture, vocab_rows=320)
    net = shaken(path)
    rows = episodes(3)
    lines = describe_tokens(writer(net, path), rows, top=4)
    tokens = batch_of(net, rows).tokens
    tuned, base = (logits_of(net, tokens, role) for role in ("online", "reference"))
    for row, line in enumerate(lines):
        for t, action in enumerate(line["token_ids"]):
            assert line["ranks"][t] == 1 + int((tuned[row, t] > tuned[row, t, action]).sum())
            assert line["base_ranks"][t] == 1 + int((base[row, t] > base[row, t, action]).sum())
            likeliest = base[row, t].topk(4).indices.tolist()
            found = line["alternatives"][t]
            assert [one["token_id"] for one in found] == likeliest
            log_base, log_tuned = base[row, t].log_softmax(-1), tuned[row, t].log_softmax(-1)
            for one in found:
                token = one["token_id"]
                assert one["base_probability"] == pytest.approx(float(log_base[token].exp()), abs=1e-5)
                assert one["probability"] == pytest.approx(float(log_tuned[token].exp()), abs=1e-5)
                q_value = line["values"][t] + net.beta * float(log_tuned[token] - log_base[token])
                assert one["q_value"] == pytest.approx(q_value, abs=1e-4)


def test_neither_batch_nor_order_nor_padding_matters(tiny_llama_path: str) -> None:
    net = network(tiny_llama_path)
    shake(net, 0.1)
    rows = episodes(9)
    whole = describe_tokens(writer(net, tiny_llama_path), rows)
    by_size = {size: Writer(**{**vars(writer(net, tiny_llama_path)), "batch_size": size}) for size in (1, 2, 5)}
    for size, small in by_size.items():
        backwards = describe_tokens(small, rows[::-1])[::-1]
        for one, other in zip(whole, backwards, strict=True):
            for name in ("q_values", "values", "advantages"):
                assert one[name] == pytest.approx(other[name], abs=1e-5), size
            for name in ("tokens", "ranks", "base_ranks"):
                assert one[name] == other[name], size


@pytest.mark.parametrize("chunk", [1, 3])
def test_the_chunk_does_not_matter(tiny_llama_path: str, monkeypatch: Any, chunk: int) -> None:
    net = shaken(tiny_llama_path)
    expected = describe_tokens(writer(net, tiny_llama_path), episodes(3))
    monkeypatch.setattr("llm_dqn.heads.CHUNK", chunk)
    found = describe_tokens(writer(net, tiny_llama_path), episodes(3))
    assert values_of(found, "q_values") == pytest.approx(values_of(expected, "q_values"), abs=1e-5)


@pytest.mark.parametrize(("top", "listed"), [(0, 0), (1, 1), (10_000, 300)])
def test_as_many_alternatives_as_asked_for(tiny_llama_path: str, top: int, listed: int) -> None:
    net = network(tiny_llama_path)
    lines = describe_tokens(writer(net, tiny_llama_path), episodes(2), top)
    lengths = {len(found) for line in lines for found in line["alternatives"]}
    assert lengths == {min(listed, net.num_tokens)}


# --- what is opened again -----------------------------------------------------------------------------------------

RECIPE = """
model: {{model_name_or_path: {model}}}
lora: null
data: {{train: prompts.jsonl}}
reward: {{funcs: [rewards.py:letters]}}
train: {{output_dir: runs/x}}
"""


def saved(net: QNetwork, path: str, folder: Path) -> str:
    """What names it to `open_run`: an adapter's folder, or a run's where all weights were tuned."""
    if net.has_adapter:
        net.save_policy(folder)
        return str(folder)
    net.save_policy(folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE.format(model=path))
    return str(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_an_opened_policy_knows_the_q_and_v_it_was_saved_with(tiny_llama_path: str, tmp_path: Path, kind: str) -> None:
    """A linear head is folded into the output layer when it is saved; its Q must not be added twice."""
    net = shaken(tiny_llama_path, **KINDS[kind])
    rows = episodes()
    before = describe_tokens(writer(net, tiny_llama_path), rows)
    opened = open_run(saved(net, tiny_llama_path, tmp_path))
    assert opened.knows_values
    after = describe_tokens(opened.writer, rows)
    for name in ("q_values", "values", "advantages"):
        assert values_of(after, name) == pytest.approx(values_of(before, name), abs=2e-5), name
    for name in ("ranks", "base_ranks"):
        assert values_of(after, name) == values_of(before, name)


def test_an_adapter_without_heads_gives_log_ratios_and_no_values(tiny_llama_path: str, tmp_path: Path) -> None:
    net = shaken(tiny_llama_path)
    net.save_policy(tmp_path)
    (tmp_path / "q_head.safetensors").unlink()
    opened = open_run(str(tmp_path))
    rows = episodes()
    lines = describe_tokens(opened.writer, rows)
    tokens = batch_of(net, rows).tokens
    ratios = net.logprobs(tokens, "online") - net.logprobs(tokens, "reference")
    assert not opened.knows_values
    assert set(values_of(lines, "values")) == {0.0}
    assert values_of(lines, "q_values") == values_of(lines, "advantages")
    assert values_of(lines, "advantages") == pytest.approx(ratios[tokens.action_mask].tolist(), abs=1e-5)


def test_a_plain_model_learned_nothing(tiny_llama_path: str) -> None:
    opened = open_run(tiny_llama_path)
    lines = describe_tokens(opened.writer, episodes())
    for name in ("q_values", "values", "advantages"):
        assert set(values_of(lines, name)) == {0.0}
    assert values_of(lines, "ranks") == values_of(lines, "base_ranks")
    rows = values_of(lines, "alternatives")
    assert all(one["probability"] == one["base_probability"] for row in rows for one in row)


def test_values_that_are_no_constant_come_from_the_value_head(tiny_llama_path: str) -> None:
    net = shaken(tiny_llama_path)
    head = net.heads["value"]
    assert isinstance(head, ValueHead)
    lines = describe_tokens(writer(net, tiny_llama_path), episodes())
    assert np.std(values_of(lines, "values")) > 1e-3


# --- texts of tokens ----------------------------------------------------------------------------------------------

TEXTS = [
    "the film was a quiet joy",
    " leading and trailing ",
    "two\nlines\tand a tab",
    "emoji 😀😀 and a family 👩‍👩‍👧 end",
    "שלום עולם, right to left",
    "日本語とعربى",
    "e\u0301 and é",
    "a real \ufffd in the text",
    "",
]


def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer in SentencePiece's manner: ▁ for spaces, bytes for the unknown, and a space lost at the start."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁film", "a", "e", "f"]
    scores = [(word, -float(place + 1)) for place, word in enumerate(words)]
    core = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerFast:
    """Words with ## for what goes on: spaces come from the decoder, not from the tokens."""
    words = ["[UNK]", "[SEP]", "the", "film", "##s", "fi", "##lm", ",", "a"]
    core = Tokenizer(models.WordPiece({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="[SEP]", unk_token="[UNK]")


MAKERS = {"byte-level": tiny_models.tokenizer, "sentencepiece": sentencepiece, "wordpiece": wordpiece}


def joined(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    special = set(tokenizer.all_special_ids)
    assert all(text == tokenizer.convert_ids_to_tokens(t) for t, text in zip(ids, texts, strict=True) if t in special)
    return "".join(text for token, text in zip(ids, texts, strict=True) if token not in special)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_join_to_the_completion(maker: str, text: str) -> None:
    tokenizer = MAKERS[maker]()
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert joined(tokenizer, ids) == tokenizer.decode(ids, skip_special_tokens=True)
    if maker == "byte-level":
        assert joined(tokenizer, ids) == text


@pytest.mark.parametrize("maker", MAKERS)
def test_so_do_any_tokens_in_any_order(maker: str) -> None:
    """Halves of characters, special tokens between them, and bytes that never become text."""
    tokenizer = MAKERS[maker]()
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = rng.integers(len(tokenizer), size=rng.integers(1, 20)).tolist()
        assert joined(tokenizer, ids) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_character_belongs_to_its_last_token() -> None:
    tokenizer = tiny_models.tokenizer()
    ids = tokenizer("a😀b")["input_ids"]
    assert token_texts(tokenizer, ids) == ["a", "", "", "", "😀", "b"]
    assert token_texts(tokenizer, [*ids, tokenizer.eos_token_id])[-1] == "<eos>"


def test_a_long_text_of_many_bytes_is_not_slow() -> None:
    tokenizer = tiny_models.tokenizer()
    ids = tokenizer("שלום 😀 " * 400)["input_ids"]
    assert joined(tokenizer, ids) == "שלום 😀 " * 400


def test_alternatives_are_named_as_they_stand_in_a_sentence(tiny_llama_path: str) -> None:
    lines = describe_tokens(writer(network(tiny_llama_path), tiny_llama_path), episodes(2), top=300)
    names = {one["token_id"]: one["token"] for one in lines[0]["alternatives"][0]}
    tokenizer = tiny_models.tokenizer()
    (the,) = tokenizer(" the", add_special_tokens=False)["input_ids"]
    assert names[the] == " the"
    assert names[tokenizer.eos_token_id] == "<eos>"


def test_the_model_is_left_as_it_was(tiny_llama_path: str) -> None:
    net = shaken(tiny_llama_path, q_head="linear")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    describe_tokens(writer(net, tiny_llama_path), episodes(2))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with net.writer("reference") as model:
        plain = AutoModelForCausalLM.from_pretrained(tiny_llama_path)
        ids = torch.tensor([[5, 6, 7]])
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-6)
