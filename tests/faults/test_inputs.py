"""Bad data, tokenizers and models (22 to 35). All are found by `check`, and by `train` before any long work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_dqn import DQNConfig, DQNTrainer, checkpoint, models
from llm_dqn.errors import UserError
from llm_dqn.losses import masked_mean
from llm_dqn.replay import PrefixReplay
from tests import networks, tiny_models
from tests.faults.desk import Desk, lines

CHAT = [{"role": "user", "content": "hello"}]

# --- data -------------------------------------------------------------------------------------------------------------

BAD_ROWS: dict[str, tuple[list[Any], str]] = {
    "empty": ([], "has no rows"),
    "column": ([{"promt": "a"}], "has no column 'prompt'; did you mean promt? (columns: promt; set data.prompt_column"),
    "mixed": ([{"prompt": "a"}, {"prompt": CHAT}], "row 2: column 'prompt' is a conversation but row 1 is plain text"),
    "none": ([{"prompt": "a"}, {"prompt": None}], "row 2: column 'prompt' is empty (None); remove the row or fill it"),
    "number": ([{"prompt": 3}], "row 1: column 'prompt' is int (3); expected text or a list of messages"),
    "silent": ([{"prompt": [{"role": "user", "content": None}]}], "row 1: column 'prompt', message 1: expected"),
    "half": ([{"prompt": "a \ud83d"}], "row 1: column 'prompt' holds half of a character pair"),
    "list": ([["a"]], "row 1: expected an object with named fields, got ['a']"),
}


@pytest.mark.parametrize("fault", BAD_ROWS)
@pytest.mark.parametrize("key", ["train", "eval"])
def test_case_22_bad_rows(desk: Desk, key: str, fault: str) -> None:
    """Refused, naming file, row and column, what was found there, the columns there are, and the nearest name."""
    rows, says = BAD_ROWS[fault]
    assert f"bad.jsonl{'' if says.startswith('has') else ', '}" in (
        said := desk.refused(f"data.{key}", **{f"data__{key}": desk.rows("bad.jsonl", rows)})
    )
    assert says in said


def test_case_22_missing_splits_and_files(desk: Desk) -> None:
    """A split that is not there, a file that is no file: refused with the splits there are and the nearest name."""
    said = desk.refused("data.eval_split", data__eval_split="test")
    assert said == "'prompts.jsonl' is a single file and has no split 'test', only train; leave the split out"
    desk.rows("parts/train.jsonl", [{"prompt": "a"}])
    assert "has no split 'test'" in desk.refused("data.eval_split", data__train="parts")
    del desk.settings["data"]["eval_split"]
    said = desk.refused("data.train", data__train="prompt.jsonl")
    assert said == "'prompt.jsonl' does not exist; did you mean prompts.jsonl?"
    said = desk.refused("data.train", data__train="parts/trian.jsonl")
    assert said == "there is no trian.jsonl in parts; did you mean train.jsonl?"


def test_case_23_prompts_too_long(desk: Desk) -> None:
    """Refused with row and counts, or dropped or shortened by `data.too_long`, with counts."""
    desk.rows("prompts.jsonl", [{"prompt": "the film " * count} for count in range(1, 11)])
    said = desk.refused("data.train", data__max_prompt_length=20)
    assert (
        "row 5: the prompt has 22 tokens, more than max_prompt_length=20; 6 of 10 rows are too long (longest 42)"
        in said
    )
    assert "set too_long to drop, truncate (keeps the end) or keep_start" in said
    _, shown = desk.trained(data__too_long="drop")
    assert "6 of 10 prompts over max_prompt_length=20 dropped" in shown


def test_case_23_more_than_the_model_can_read(desk: Desk, tiny_llama_path: str) -> None:
    """The limit is also what the model's context leaves beside the longest completion."""
    small = desk.model("short", tiny_llama_path, config={"max_position_embeddings": 16})
    desk.rows("prompts.jsonl", [{"prompt": "the film " * count} for count in range(1, 11)])
    said = desk.refused("data.train", model__model_name_or_path=small)
    assert "row 3: the prompt has 14 tokens, more than the 10 that the model's context leaves" in said
    said = desk.refused("rollout.max_completion_length", rollout__max_completion_length=16)
    assert (
        "leave no room for a prompt: the model was made to read 16 tokens in all; lower max_completion_length" in said
    )
    desk.set(rollout__max_completion_length=6, data__too_long="truncate")
    log = {"prompt": "the film", "completion": " was" * 20, "reward": 1}
    said = desk.refused("replay.warm_start", replay__warm_start=desk.rows("log.jsonl", [log]))
    assert "row 1: prompt and completion have 5 + " in said and "the model was made to read 16; remove the row" in said


# --- tokenizers -------------------------------------------------------------------------------------------------------


def test_case_24_no_padding_token(desk: Desk, tiny_llama_path: str, tmp_path: Path) -> None:
    """A reserved token pads, or else the end-of-sequence token; this is said, and ends are learned all the same."""
    folder = desk.home / desk.model("bare", tiny_llama_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    words = tiny_models.tokenizer(pad=False)
    words.save_pretrained(folder)
    _, shown = desk.trained(model__model_name_or_path="models/bare")
    assert "has no padding token: <eos> is used; padding is masked, so ends are still learned" in shown
    memory = PrefixReplay(4)
    memory.add([networks.episode([5, 6], [7, words.eos_token_id]), networks.episode([5], [8, 9, 10])])
    batch = memory.batch(np.array([0, 1]))
    assert batch.action_mask.sum(1).tolist() == [2, 3]  # the end is an action, what pads after it is none


def test_case_25_no_end_of_sequence(desk: Desk, tiny_llama_path: str) -> None:
    """Refused with the line to add to the tokenizer, since no completion could ever end."""
    mute = desk.model("mute", tiny_llama_path, tokenizer_config={"eos_token": None})
    said = desk.refused("model.model_name_or_path", model__model_name_or_path=mute)
    assert 'has no end-of-sequence token, so no completion could ever end; add "eos_token"' in said


def test_case_25_several_end_of_sequence_tokens(desk: Desk, tiny_llama_path: str) -> None:
    """Each of them ends a completion."""
    several = desk.model("several", tiny_llama_path, generation_config={"eos_token_id": [1, 40, 41, 42, 43, 44]})
    run, _ = desk.trained(model__model_name_or_path=several, rollout__max_completion_length=30)
    ids = [
        AutoTokenizer.from_pretrained(several)(line["completion"]).input_ids for line in lines(run / "samples.jsonl")
    ]
    assert not any(set(row[:-1]) & {40, 41, 42, 43, 44} for row in ids)
    assert any(set(row[-1:]) & {40, 41, 42, 43, 44} for row in ids)


def test_case_26_conversations_without_a_template(desk: Desk) -> None:
    """Refused with three ways out."""
    said = desk.refused("data.train", data__train=desk.rows("chat.jsonl", [{"prompt": CHAT}]))
    assert said == (
        "chat.jsonl: column 'prompt' holds conversations but the tokenizer has no chat template; use a chat model, set "
        "tokenizer.chat_template, or give plain text prompts"
    )


def test_case_27_more_rows_than_tokens(desk: Desk, build_model: Callable[..., str]) -> None:
    """Rows of the output layer that no token has are never written, and no maximum sees them."""
    padded = desk.model("padded", build_model("llama", vocab_rows=320))
    textbook = {"dqn__q_head": "linear", "dqn__prior": "uniform", "dqn__backup": "max", "rollout__explore": "uniform"}
    desk.settings["dqn"] = {}
    run, _ = desk.trained(model__model_name_or_path=padded, **textbook)
    newest, _ = checkpoint.newest(run / "checkpoints")
    (stored,) = checkpoint.read_replay(newest)
    assert stored["tokens"].max() < 300 and len(stored["tokens"]) > 100  # by chance one in fifteen would be beyond


def test_case_28_more_tokens_than_rows(desk: Desk, build_model: Callable[..., str]) -> None:
    """Refused with both numbers and the call that mends the model."""
    small = desk.model("small", build_model("llama", vocab_rows=280))
    said = desk.refused("model.model_name_or_path", model__model_name_or_path=small)
    assert "the tokenizer has 300 tokens but the model only 280 rows" in said
    assert "call model.resize_token_embeddings(len(tokenizer)) and save the model again" in said


# --- models -----------------------------------------------------------------------------------------------------------


def test_case_29_tied_embeddings(desk: Desk, build_model: Callable[..., str]) -> None:
    """An output layer that shares its weights with the input gets its own before it is tuned; a merge is proven."""
    tied = desk.model("tied", build_model("llama", tied=True))
    desk.settings["lora"] = {"r": 4, "target_modules": ["q_proj", "lm_head"]}
    run, _ = desk.trained(model__model_name_or_path=tied, train__learning_rate=0.1)
    code, _, errors = desk.command("merge", str(run), "merged")
    assert code == 0, errors
    base, merged = (AutoModelForCausalLM.from_pretrained(path) for path in (tied, "merged"))
    assert torch.equal(base.get_input_embeddings().weight, merged.get_input_embeddings().weight)
    assert not torch.equal(base.lm_head.weight, merged.lm_head.weight)
    ids = torch.arange(3, 20)[None]
    tuned = PeftModel.from_pretrained(models.load_causal_lm(tied), str(run / "adapter"))
    assert (tuned(input_ids=ids).logits - merged(input_ids=ids).logits).abs().max() < 1e-4


def test_case_30_caps_and_scales(desk: Desk, build_model: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model does to its logits is repeated exactly, which is proven before the run; else it is refused."""
    capped = desk.model("capped", build_model("gemma2"))
    desk.trained(model__model_name_or_path=capped)
    monkeypatch.setattr(models, "head_postprocess", lambda model: lambda logits: logits)  # forgets the cap
    code, _, errors = desk.command("train", "r.yaml")
    assert code == 2
    assert "Gemma2ForCausalLM computes its logits in a way llm_dqn does not know (max difference" in errors


def test_case_31_bfloat16(desk: Desk) -> None:
    """The trunk may be coarse; adapters, heads, Q, targets and losses are float32."""
    desk.set(model__dtype="bfloat16", train__bf16=True)
    run, _ = desk.trained()
    newest, _ = checkpoint.newest(run / "checkpoints")
    _, parts = checkpoint.read(newest)
    assert {str(tensor.dtype) for tensor in parts["network"].values()} == {"torch.float32"}
    net = networks.network(desk.settings["model"]["model_name_or_path"], bf16=True)
    memory = PrefixReplay(1)
    memory.add([networks.episode([5, 6], [7, 8, 9])])
    q = net.target(memory.batch(np.array([0])))
    assert {q.taken.dtype, q.values.dtype, q.next_values.dtype, q.advantages.dtype} == {torch.float32}


@pytest.mark.parametrize(("truncated", "discount"), [("terminal", 0.0), ("bootstrap", 1.0)])
def test_case_32_the_length_cap(truncated: Any, discount: float) -> None:
    """A completion that was cut is flagged, and ends there or is valued as if it went on, by `dqn.truncated`."""
    memory = PrefixReplay(2, truncated=truncated)
    memory.add([networks.episode([5], [7, 8], ended="length"), networks.episode([5], [7, 1], ended="eos")])
    assert memory.batch(np.array([0, 1])).discounts.tolist() == [[1.0, discount], [1.0, 0.0]]


def test_case_33_nothing_to_learn_from() -> None:
    """A completion without tokens is refused by the replay; a batch without action tokens has loss 0, not 0/0."""
    with pytest.raises(ValueError, match="at least one action"):
        PrefixReplay(2).add([networks.episode([5], [])])
    values = torch.tensor([[float("nan"), float("inf")]], requires_grad=True)
    loss = masked_mean(values, torch.zeros(1, 2, dtype=torch.bool), 0)
    assert loss.item() == 0.0
    loss.backward()
    assert values.grad is not None and values.grad.tolist() == [[0.0, 0.0]]


def test_case_34_models_with_their_own_code(desk: Desk, tiny_llama_path: str) -> None:
    """Refused with the name of the flag, and none of the code is run."""
    strange = {"model_type": "strange", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "c.M"}}
    path = desk.model("strange", tiny_llama_path, config=strange)
    desk.write(f"{path}/c.py", f"open({str(desk.home / 'owned')!r}, 'w')")
    said = desk.refused("model.model_name_or_path", model__model_name_or_path=path)
    assert "brings its own code; if you trust it, set trust_remote_code: true (pin model_revision)" in said
    assert not (desk.home / "owned").exists()


def test_case_34_the_commit_of_a_hub_model(desk: Desk, tiny_llama_path: str) -> None:
    """A model of the Hub is written down with its commit, and opened again at that one."""
    commit, home = "0123456789abcdef0123456789abcdef01234567", Path(constants.HF_HUB_CACHE) / "models--me--tiny"
    shutil.copytree(tiny_llama_path, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    run, _ = desk.trained(model__model_name_or_path="me/tiny")
    assert f"  model_revision: {commit}\n" in (run / "recipe.yaml").read_text()
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["revision"] == commit
    (home / "refs" / "main").write_text("f" * 40)  # the branch moved on to what is not here
    assert desk.command("generate", str(run), "--prompts", "prompts.jsonl", "--output", "out.jsonl")[0] == 0


def test_case_35_pickled_weights(desk: Desk, tiny_llama_path: str) -> None:
    """Refused with two ways out; opened, by an unpickler of tensors alone, where `model.use_safetensors` is false."""
    folder = desk.home / desk.model("pickled", tiny_llama_path)
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    said = desk.refused("model.model_name_or_path", model__model_name_or_path="models/pickled")
    assert "has pickled weights (.bin) only" in said and "set model.use_safetensors: false" in said
    desk.trained(model__use_safetensors=False)
    torch.save({"x": Exploding(desk.home / "owned")}, folder / "pytorch_model.bin")
    code, _, errors = desk.command("train", "r.yaml")
    assert code == 2 and "hold more than tensors, which could run code; they were not opened" in errors
    assert not (desk.home / "owned").exists()


class Exploding:
    """What a pickle can do."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


MISTYPED = {
    "models/tinny": "there is no tinny in models; did you mean tiny?",
    "data/tinylm": "there is no tinylm in data; did you mean tiny_lm?",  # a shipped one
    "tinylm": "; did you mean data/tiny_lm?",
    "./nowhere/at/all": "'./nowhere/at/all' is not a folder; give a local model folder or a Hub id like 'owner/name'",
}


@pytest.mark.parametrize("typed", MISTYPED)
def test_mistyped_models(desk: Desk, typed: str) -> None:
    """A mistyped local name is told with the name that was meant, here, beside the recipe or among the shipped ones."""
    desk.set(model__model_name_or_path=typed)
    code, _, errors = desk.command("train", "r.yaml")
    assert code == 2 and errors.startswith("r.yaml:2: model.model_name_or_path: ") and MISTYPED[typed] in errors
    with pytest.raises(UserError) as caught:
        DQNTrainer(typed, len, DQNConfig(output_dir="x"), [{"prompt": "a"}])
    assert str(caught.value).startswith("model: ") and MISTYPED[typed] in str(caught.value)


def test_python_finds_shipped_files_as_recipes_do(desk: Desk) -> None:
    trainer = DQNTrainer(
        "data/hello_lm",
        "recipes/rewards/hello_world.py:characters",
        DQNConfig(output_dir="x", max_completion_length=4),
        "data/hello_prompts.jsonl",
    )
    assert len(trainer.parts.eval_prompts) == 7
