import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from llm_dqn import models
from llm_dqn.errors import UserError
from tests import tiny_models

SMALL_LLAMA = LlamaConfig(
    vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, eos_token_id=1
)


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    core = Tokenizer(tokenizer_models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "</s>": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def test_head_shortcut_gives_the_logits_of_every_architecture(architecture_path: str) -> None:
    model = models.load_causal_lm(architecture_path)
    models.verify_head_shortcut(model)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        hidden = models.trunk(model)(input_ids=ids).last_hidden_state
        ours = models.head_postprocess(model)(models.lm_head(model)(hidden))
        torch.testing.assert_close(ours, model(input_ids=ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "cohere", "granite"])
def test_caps_and_scales_matter_in_these_models(architecture: str, build_model: Callable[..., str]) -> None:
    model = models.load_causal_lm(build_model(architecture))
    raw = torch.linspace(-4, 4, 9)
    assert not torch.allclose(models.head_postprocess(model)(raw), raw, atol=0.1)


def test_postprocess_by_hand(build_model: Callable[..., str]) -> None:
    raw = torch.tensor([-6.0, 0.0, 6.0])
    expected = {
        "gemma2": torch.tensor([-2.89208, 0.0, 2.89208]),  # 3 * tanh(6 / 3)
        "cohere": torch.tensor([-1.5, 0.0, 1.5]),  # * 0.25
        "granite": torch.tensor([-1.5, 0.0, 1.5]),  # / 4
        "llama": raw,
    }
    for architecture, logits in expected.items():
        model = models.load_causal_lm(build_model(architecture))
        torch.testing.assert_close(models.head_postprocess(model)(raw), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_and_shortcut_in_low_precision(dtype: str, build_model: Callable[..., str]) -> None:
    model = models.load_causal_lm(build_model("granite"), dtype=dtype)
    assert models.lm_head(model).weight.dtype == getattr(torch, dtype)
    assert not model.training
    models.verify_head_shortcut(model)


def test_unknown_logits_are_refused(tiny_llama_path: str) -> None:
    class DoublingForCausalLM(LlamaForCausalLM):
        def forward(self, *args: object, **kwargs: object):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 2
            return out

    model = DoublingForCausalLM.from_pretrained(tiny_llama_path)
    with pytest.raises(UserError, match=r"DoublingForCausalLM computes its logits in a way .* \(max difference"):
        models.verify_head_shortcut(model)


def test_model_that_sees_the_future_is_refused(tiny_llama_path: str) -> None:
    class PeekingForCausalLM(LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, **kwargs: object):
            out = super().forward(input_ids, **kwargs)
            out.logits = out.logits + 0.1 * input_ids[:, -1:, None]
            return out

    model = PeekingForCausalLM.from_pretrained(tiny_llama_path)
    with pytest.raises(UserError, match="PeekingForCausalLM"):
        models.verify_head_shortcut(model)


def test_shortcut_check_leaves_mode_and_random_state(tiny_llama_path: str) -> None:
    model = models.load_causal_lm(tiny_llama_path).train()
    before = torch.get_rng_state()
    models.verify_head_shortcut(model)
    assert model.training
    assert torch.equal(before, torch.get_rng_state())


def test_missing_folder_and_unreachable_hub_id() -> None:
    for load in (models.load_causal_lm, models.load_tokenizer):
        with pytest.raises(UserError, match=r"'\./no/such' is not a folder"):
            load("./no/such")
        with pytest.raises(UserError, match="'nobody/nothing' is neither a local folder nor reachable on the Hub"):
            load("nobody/nothing")


def test_folder_without_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        models.load_causal_lm(str(tmp_path))


def test_adapter_folder_has_a_tokenizer_but_is_no_model(tmp_path: Path) -> None:
    tiny_models.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert len(models.load_tokenizer(str(tmp_path))) == 300
    with pytest.raises(UserError, match="not a Hugging Face model folder but an adapter; give its base model"):
        models.load_causal_lm(str(tmp_path))


def test_hub_file_that_cannot_be_had() -> None:
    assert models.hub_file("nobody/nothing", "adapter_config.json") is None
    assert models.hub_file("no id/at all/", "adapter_config.json") is None


def test_unknown_dtype(tiny_llama_path: str) -> None:
    with pytest.raises(UserError, match="dtype: 'fp8' is not one of auto, float32"):
        models.load_causal_lm(tiny_llama_path, dtype="fp8")


def test_unknown_attention(tiny_llama_path: str) -> None:
    with pytest.raises(UserError, match=r"could not be loaded: .*attn_implementation"):
        models.load_causal_lm(tiny_llama_path, attn_implementation="quantum")


def test_pickled_weights_are_refused(tiny_llama_path: str, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_llama_path, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no \*\.safetensors"):
        models.load_causal_lm(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"not opened")
    with pytest.raises(UserError, match=r"pickled weights \(\.bin\) only.*save_pretrained"):
        models.load_causal_lm(str(folder))


def test_damaged_weights(tiny_llama_path: str, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_llama_path, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="could not be loaded"):
        models.load_causal_lm(str(folder))


def test_own_code_is_refused_with_the_flag(tiny_llama_path: str, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(tiny_llama_path, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "c.Mine", "AutoModelForCausalLM": "m.MineForCausalLM"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "c.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UserError, match="brings its own code; if you trust it, set trust_remote_code: true"):
        models.load_causal_lm(str(folder))


def test_other_architectures_are_named(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=30, **small)).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="is BertForMaskedLM, which does not predict the next token"):
        models.load_causal_lm(str(tmp_path / "bert"))
    t5 = T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match="is T5ForConditionalGeneration, a sequence-to-sequence model"):
        models.load_causal_lm(str(tmp_path / "t5"))


def test_weights_that_would_start_at_random_are_refused(tmp_path: Path) -> None:
    LlamaModel(SMALL_LLAMA).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(UserError, match=r"lack 1 weights that would start at random: lm_head\.weight"):
        models.load_causal_lm(str(tmp_path))


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    LlamaForCausalLM(SMALL_LLAMA).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds no usable tokenizer"):
        models.load_tokenizer(str(tmp_path))


def test_tokenizer_without_eos(tmp_path: Path) -> None:
    word_tokenizer(unk_token="<unk>").save_pretrained(tmp_path)
    SMALL_LLAMA.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no end-of-sequence token.*eos_token"):
        models.load_tokenizer(str(tmp_path))


def test_padding_is_a_reserved_token_or_else_eos() -> None:
    plain = word_tokenizer(eos_token="</s>", unk_token="<unk>")
    models.ensure_pad_token(plain, "x")
    assert plain.pad_token == "</s>"

    reserved = word_tokenizer(eos_token="</s>", unk_token="<unk>")
    reserved.add_tokens(["<|reserved_0|>", "<|right_pad_id|>"], special_tokens=True)
    models.ensure_pad_token(reserved, "x")
    assert reserved.pad_token == "<|right_pad_id|>"
    assert len(reserved) == 6  # nothing was added

    given = word_tokenizer(eos_token="</s>", unk_token="<unk>", pad_token="a")
    models.ensure_pad_token(given, "x")
    assert given.pad_token == "a"


def test_tokenizer_loads_with_padding(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_models.tokenizer(pad=False).save_pretrained(tmp_path)
    SMALL_LLAMA.save_pretrained(tmp_path)
    tokenizer = models.load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token == tokenizer.eos_token
    assert "has no padding token: <eos> is used; padding is masked" in caplog.text


def test_stop_tokens_of_all_three_places(tiny_llama_path: str) -> None:
    model, tokenizer = models.load_causal_lm(tiny_llama_path), models.load_tokenizer(tiny_llama_path)
    assert models.stop_token_ids(model, tokenizer) == {1}
    model.config.eos_token_id = 7
    model.generation_config.eos_token_id = [8, 9, 100_000]  # the last is beyond the tokenizer
    assert models.stop_token_ids(model, tokenizer) == {1, 7, 8, 9}


def test_valid_tokens_exclude_padded_rows(build_model: Callable[..., str]) -> None:
    path = build_model("llama", vocab_rows=320)
    model, tokenizer = models.load_causal_lm(path), models.load_tokenizer(path)
    assert models.lm_head(model).weight.shape[0] == 320
    assert models.num_valid_tokens(model, tokenizer) == len(tokenizer) == 300


def test_tokenizer_larger_than_the_head(build_model: Callable[..., str]) -> None:
    path = build_model("llama", vocab_rows=280)
    with pytest.raises(UserError, match=r"300 tokens but the model only 280 rows.*resize_token_embeddings"):
        models.num_valid_tokens(models.load_causal_lm(path), models.load_tokenizer(path))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "opt"])
def test_untied_head_is_a_copy_that_saves_and_loads(
    architecture: str, build_model: Callable[..., str], tmp_path: Path
) -> None:
    model = models.load_causal_lm(build_model(architecture, tied=True))
    head, embedding = models.lm_head(model), model.get_input_embeddings()
    assert head.weight is embedding.weight
    ids = torch.arange(10)[None]
    before = model(input_ids=ids).logits

    models.untie_head(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    with torch.no_grad():
        head.weight.add_(0.5)
    assert not torch.equal(head.weight, embedding.weight)
    model.tie_weights()  # a later library call must not tie it again
    assert head.weight is not embedding.weight

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_untying_an_untied_head_changes_nothing(tiny_llama_path: str) -> None:
    model = models.load_causal_lm(tiny_llama_path)
    weight = models.lm_head(model).weight
    models.untie_head(model)
    assert models.lm_head(model).weight is weight


def test_trunk_alone_is_refused(tiny_llama_path: str) -> None:
    body = LlamaModel.from_pretrained(tiny_llama_path)
    with pytest.raises(UserError, match="LlamaModel has no"):
        models.trunk(body)
    with pytest.raises(UserError, match="LlamaModel has no output layer"):
        models.lm_head(body)
