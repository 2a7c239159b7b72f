"""Base + adapter become one plain model, proven equal before it is written; what is not equal is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from llm_dqn import merge as merging
from llm_dqn.cli import main
from llm_dqn.errors import RunError, UserError
from llm_dqn.merge import merge, merge_beside
from tests.networks import lora, network, shake
from tests.tiny_models import ARCHITECTURES

HEAD = {"lora": lora(target_modules=["q_proj", "v_proj", "lm_head"])}
CASES: list[tuple[str, dict[str, Any], bool]] = [  # architecture, options, whether the head has to be untied
    *((name, {}, False) for name in sorted(ARCHITECTURES)),
    ("llama", {"tied": True}, False),
    ("llama", {"tied": True, **HEAD}, True),
    ("llama", {"tied": True, "lora": lora(target_modules=["q_proj", "embed_tokens"])}, True),
    ("llama", {"tied": True, "q_head": "linear"}, False),
    ("llama", {"q_head": "linear"}, False),
    ("gemma2", {"lora": lora(target_modules=["q_proj", "lm_head"])}, True),
]


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof as it is, on fewer texts."""
    monkeypatch.setattr(merging, "RANDOM_TEXTS", 2)
    monkeypatch.setattr(merging, "REAL_TEXTS", 2)
    monkeypatch.setattr(merging, "NEW_TOKENS", 8)


def saved_adapter(path: str, folder: Path, tokenizer: bool = True, **options: Any) -> Path:
    """What a run leaves in `adapter/`, its weights moved far from the base."""
    net = network(path, **options)
    shake(net, 0.2)
    net.save_policy(folder)
    if tokenizer:
        PreTrainedTokenizerFast.from_pretrained(path).save_pretrained(folder)
    return folder


def peft_adapter(path: str, folder: Path, config: Any) -> Path:
    """An adapter that was made with PEFT alone."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def logits_and_tokens(model: PreTrainedModel) -> tuple[torch.Tensor, list[int]]:
    ids = torch.tensor([[7, 30, 41, 52, 9, 63, 77, 80, 12, 95]])
    mask = torch.ones_like(ids)
    settings = GenerationConfig(do_sample=False, max_new_tokens=12, pad_token_id=0)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, attention_mask=mask).logits
        written = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    return logits, written[0].tolist()


def quiet(message: str) -> None:
    """Says nothing."""


@pytest.mark.parametrize(("architecture", "options", "untied"), CASES, ids=lambda value: str(value)[:60])
def test_the_merged_model_is_base_plus_adapter(
    build_model: Any, tmp_path: Path, architecture: str, options: dict[str, Any], untied: bool
) -> None:
    """Invariant 8 for every architecture, opened by plain transformers against plain PEFT."""
    options = dict(options)
    path = build_model(architecture, **({"tied": options.pop("tied")} if "tied" in options else {}))
    adapter = saved_adapter(path, tmp_path / "adapter", **options)
    proof = merge(str(adapter), str(tmp_path / "out"), say=quiet)
    peft = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected, found = logits_and_tokens(peft), logits_and_tokens(plain)
    assert float((expected[0] - found[0]).abs().max()) <= 1e-5 * float(expected[0].abs().max())
    assert found[1] == expected[1]
    assert proof.holds and proof.relative_difference <= 1e-5 and proof.reloaded_difference <= 1e-5
    assert proof.untied_head == untied
    base = logits_and_tokens(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    assert float((base[0] - found[0]).abs().max()) > 0.05  # the adapter did something


def test_everything_goes_along_and_nothing_else_is_left(build_model: Any, tmp_path: Path) -> None:
    path = shutil.copytree(build_model("llama", chat=True), tmp_path / "base")
    GenerationConfig(eos_token_id=1, temperature=0.7, do_sample=True).save_pretrained(path)
    adapter = saved_adapter(str(path), tmp_path / "adapter")
    lines: list[str] = []
    merge(str(adapter), str(tmp_path / "deep" / "out"), say=lines.append)
    out = tmp_path / "deep" / "out"
    assert {file.name for file in out.iterdir()} == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "merge.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert [file.name for file in out.parent.iterdir()] == ["out"]
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.7
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(path).chat_template
    record = json.loads((out / "merge.json").read_text())
    assert record["base_model"] == str(path) and record["proof"]["greedy_equal"] is True
    assert f"{record['proof']['relative_difference']:.2g} of the largest" in lines[1]
    assert "all 16 greedy tokens are equal" in (out / "README.md").read_text()


def test_a_coarser_type_is_proven_first_and_its_rounding_measured(tiny_llama_path: str, tmp_path: Path) -> None:
    adapter = saved_adapter(tiny_llama_path, tmp_path / "adapter")
    proof = merge(str(adapter), str(tmp_path / "out"), "bfloat16", say=quiet)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert proof.relative_difference <= 1e-5 < proof.rounding_difference < 0.1
    assert proof.reloaded_difference <= 1e-5  # the files hold just the rounded weights
    assert "Rounding the weights to bfloat16" in (tmp_path / "out" / "README.md").read_text()


def test_auto_keeps_the_type_of_the_base(tiny_llama_path: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_llama_path, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_llama_path).save_pretrained(tmp_path / "base")
    adapter = saved_adapter(str(tmp_path / "base"), tmp_path / "adapter")
    assert merge(str(adapter), str(tmp_path / "out"), say=quiet).dtype == "bfloat16"


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modules", [["q_proj", "lm_head"], ["q_proj", "embed_tokens"]])
def test_a_merge_that_comes_out_wrong_is_not_written(build_model: Any, tmp_path: Path, modules: list[str]) -> None:
    """With `ensure_weight_tying` PEFT adds the product of a tied layer twice, and untying it changes what it means."""
    path = build_model("llama", tied=True)
    config = LoraConfig(r=4, target_modules=modules, ensure_weight_tying=True, task_type="CAUSAL_LM")
    adapter = peft_adapter(path, tmp_path / "adapter", config)
    with pytest.raises(RunError, match=r"nothing was written, because merging .* is not exact: logits .* differ by"):
        merge(str(adapter), str(tmp_path / "out"), say=quiet)
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoraConfig(r=4, target_modules=["q_proj"], alora_invocation_tokens=[15], task_type="CAUSAL_LM"), "aLoRA"),
        (PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PROMPT_TUNING adapter cannot be merged"),
    ],
    ids=["activated", "prompt"],
)
def test_an_adapter_that_is_no_change_of_weights_is_refused(
    tiny_llama_path: str, tmp_path: Path, config: Any, reason: str
) -> None:
    adapter = peft_adapter(tiny_llama_path, tmp_path / "adapter", config)
    with pytest.raises(UserError, match=reason):
        merge(str(adapter), str(tmp_path / "out"), say=quiet)
    assert not (tmp_path / "out").exists()


def test_files_that_open_differently_are_not_kept(
    tiny_llama_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = saved_adapter(tiny_llama_path, tmp_path / "adapter")
    save = PreTrainedModel.save_pretrained

    def spoil(model: PreTrainedModel, folder: str, **options: Any) -> None:
        save(model, folder, **options)
        weights = load_file(Path(folder) / "model.safetensors")
        weights["model.norm.weight"][3] *= 1.01
        save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", spoil)
    with pytest.raises(RunError, match="nothing was kept, because the written files do not open as the merged model"):
        merge(str(adapter), str(tmp_path / "out"), say=quiet)
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


def test_nothing_is_overwritten_and_types_are_known(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match=r"there exists already; remove it or choose another folder"):
        merge("not/opened/at/all", str(tmp_path / "there"))
    with pytest.raises(UserError, match="--dtype int8: not one of auto, float32"):
        merge("not/opened/at/all", str(tmp_path / "new"), "int8")


def test_what_has_no_adapter_says_so(tiny_llama_path: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a plain model without adapter: there is nothing to merge"):
        merge(tiny_llama_path, str(tmp_path / "out"))
    run = tmp_path / "run"
    shutil.copytree(tiny_llama_path, run / "model")
    (run / "recipe.yaml").write_text(
        f"model: {{model_name_or_path: {tiny_llama_path}}}\nlora: null\ndata: {{train: x}}\nreward: {{funcs: [x]}}\n"
        f"train: {{output_dir: {run}}}\n"
    )
    with pytest.raises(UserError, match=r"was tuned whole, so there is nothing to merge: .*run/model is a plain"):
        merge(str(run), str(tmp_path / "out"))
    assert merge_beside(str(run)) == str(run)


def test_rounded_and_pickled_weights_are_refused(tiny_llama_path: str, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_llama_path, tmp_path / "base")
    adapter = saved_adapter(str(base), tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    quantized = config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (base / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(UserError, match="is quantized, and merging into rounded weights is not exact"):
        merge(str(adapter), str(tmp_path / "out"))
    (base / "config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors; pickled weights are not opened"):
        merge(str(adapter), str(tmp_path / "out"))


# --- runs and the command -----------------------------------------------------------------------------------------


def test_a_run_is_proven_on_its_own_texts(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    with pytest.raises(SystemExit) as left:
        main(["merge", str(run), str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert left.value.code in (0, None) and "proven: logits of base + adapter and merged model differ by" in printed
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["proof"]["real_texts"] == 2
    folder = merge_beside(str(run), quiet)
    written = (Path(folder) / "model.safetensors").stat().st_mtime_ns
    assert folder == str(run / "merged") == merge_beside(str(run), quiet)
    assert (Path(folder) / "model.safetensors").stat().st_mtime_ns == written
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, run / "adapter" / "adapter_model.safetensors")
    assert merge_beside(str(run), quiet) == folder
    assert (Path(folder) / "model.safetensors").stat().st_mtime_ns != written
