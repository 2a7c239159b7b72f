"""The shipped models and data are what data/README.md says."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

DATA = Path(__file__).resolve().parent.parent / "data"
LIMITS = {"tiny_lm": 6_000_000, "tiny_reward_model": 1_500_000, "hello_lm": 500_000}
ROWS = {
    "prompts_train": (1000, {"prompt": str}),
    "prompts_eval": (256, {"prompt": str}),
    "hello_prompts": (24, {"prompt": str}),
    "labelled_train": (2000, {"text": str, "label": int}),
    "labelled_test": (500, {"text": str, "label": int}),
    "logged": (2000, {"prompt": str, "completion": str, "reward": float}),
}


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DATA / "tiny_lm")


@pytest.fixture(scope="module")
def judge():
    """The rewards of a list of texts."""
    folder = DATA / "tiny_reward_model"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.num_labels == 1
    assert model.config.problem_type == "multi_label_classification"

    def rewards(texts: list[str]) -> torch.Tensor:
        with torch.no_grad():
            inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True)
            return torch.sigmoid(model(**inputs).logits[:, 0])

    return rewards


@pytest.mark.parametrize("name", LIMITS)
def test_a_model_folder_is_small_and_holds_no_pickle(name):
    files = list((DATA / name).iterdir())
    assert sum(file.stat().st_size for file in files) <= LIMITS[name]
    assert {file.suffix for file in files} == {".json", ".safetensors"}


@pytest.mark.parametrize("name", ROWS)
def test_rows_have_their_columns_and_are_distinct(name):
    least, columns = ROWS[name]
    found = rows(name)
    assert len(found) >= least
    for row in found:
        assert {key: type(value) for key, value in row.items()} == columns
        assert all(value.strip() for key, value in row.items() if key in ("prompt", "text"))
    if name != "logged":
        assert len({row.get("prompt", row.get("text")) for row in found}) == len(found)


def test_held_out_rows_are_not_in_training():
    train, held_out = ({row["prompt"] for row in rows(name)} for name in ("prompts_train", "prompts_eval"))
    assert not train & held_out
    known = set(" ".join(train).split())
    assert any(not set(prompt.split()) <= known for prompt in held_out)
    texts, held_out_texts = ({row["text"] for row in rows(name)} for name in ("labelled_train", "labelled_test"))
    assert not texts & held_out_texts


@pytest.mark.parametrize("name", ["tiny_lm", "hello_lm"])
def test_a_language_model_ends_and_pads_with_distinct_tokens(name):
    model = AutoModelForCausalLM.from_pretrained(DATA / name)
    tokenizer = AutoTokenizer.from_pretrained(DATA / name)
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id, None}) == 3
    for settings in (model.config, model.generation_config):
        assert (settings.eos_token_id, settings.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_the_tokens_of_a_prompt_begin_the_tokens_of_prompt_and_completion(tokenizer):
    for row in rows("logged"):
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        assert whole[: len(prompt)] == prompt
        assert tokenizer.eos_token_id not in whole
        assert tokenizer.decode(prompt) == row["prompt"]


def test_sampled_completions_differ_and_most_end(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(DATA / "tiny_lm").eval()
    prompts = [row["prompt"] for row in rows("prompts_eval")[:48]]
    torch.manual_seed(0)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    written = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]
    assert (written == tokenizer.eos_token_id).any(dim=1).float().mean() > 0.6
    assert len(set(tokenizer.batch_decode(written, skip_special_tokens=True))) == len(prompts)


def test_the_reward_model_is_right_on_held_out_texts(judge):
    found = rows("labelled_test")
    right = (judge([row["text"] for row in found]) > 0.5) == torch.tensor([row["label"] == 1 for row in found])
    assert right.float().mean() >= 0.95


def test_the_reward_model_grades_and_is_not_pleased_by_repetition(judge):
    opening = "We went to Rosa's, a small trattoria by the river, last Saturday with my sister."
    nothing, bad, mixed, good, words = judge(
        [
            opening,
            opening + " The soup was cold, and the staff were very rude. The bill was a nasty shock.",
            opening + " The soup was delicious. However, the staff were very rude.",
            opening + " The soup was delicious, and the staff were kind and patient. The bill was more than fair.",
            opening + " great" * 30,
        ]
    )
    assert bad < 0.15
    assert 0.2 < mixed < 0.8
    assert good > 0.85
    assert 0.4 < nothing < 0.6
    assert words < 0.2


def test_logged_rewards_are_the_reward_models_and_spread_widely(judge):
    found = rows("logged")
    rewards = torch.tensor([row["reward"] for row in found])
    again = judge([row["prompt"] + row["completion"] for row in found[:64]])
    assert torch.allclose(again, rewards[:64], atol=1e-3)
    assert 0.3 < rewards.mean() < 0.55
    assert rewards.std() > 0.25


def test_the_greeting_tokenizer_knows_every_character():
    tokenizer = AutoTokenizer.from_pretrained(DATA / "hello_lm")
    ids = tokenizer("你好世界")["input_ids"]
    assert len(ids) == len(set(ids)) == 4
    assert tokenizer.decode(ids) == "你好世界"
    for row in rows("hello_prompts"):
        assert tokenizer.unk_token_id not in tokenizer(row["prompt"])["input_ids"]
        assert tokenizer.decode(tokenizer(row["prompt"])["input_ids"]) == row["prompt"]
