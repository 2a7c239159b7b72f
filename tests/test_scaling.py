"""The cost model against real adapters, a real replay, and what two processes were counted to move."""

import json

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import scaling_model
from benchmarks.scaling_model import BATCH, COMPLETION, PROMPT, SHAPES, Shape


def test_weights_are_counted_as_they_are():
    shape = Shape("tiny", layers=2, hidden=16, inner=40, keys=8, vocabulary=50, tied=False)
    sizes = {"hidden_size": 16, "intermediate_size": 40, "vocab_size": 50, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert sum(p.numel() for p in model.parameters()) - norms == shape.in_layers + shape.outside
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == shape.lora(4)


def test_models_have_the_size_of_their_names():
    for shape, billions in zip(SHAPES, (0.49, 7.6, 70.6), strict=True):
        assert (shape.in_layers + shape.outside) / 1e9 == pytest.approx(billions, rel=0.01)


def test_replay_and_gradients_are_those_measured():
    facts = json.loads((scaling_model.RESULTS.parent / "checkpoint.json").read_text())
    prompt, completion = 32, 224
    assert prompt + completion == facts["tokens_an_episode"]
    bytes_an_episode = 4 * (prompt + completion) + 8 * completion + 58
    assert scaling_model.replay_bytes(1) == 4 * (PROMPT + COMPLETION) + 8 * COMPLETION + 58
    assert facts["bytes_a_transition"]["in memory"] == pytest.approx(bytes_an_episode / completion, rel=0.01)
    counted = json.loads(scaling_model.RESULTS.read_text())
    assert counted["sums_a_step"] == 2
    assert counted["bytes_a_step"] == 4 * (counted["trainable"] + counted["gradients"] + 5)


def test_the_page_has_the_tables_that_the_script_makes():
    page = scaling_model.PAGE.read_text(encoding="utf-8")
    assert scaling_model.tables() in page and scaling_model.checked() in page
    for shape, said in zip(SHAPES, ("61 ms", "0.94 s", "8.7 s"), strict=True):
        seconds = float(said.split()[0]) * (1e-3 if "ms" in said else 1)
        assert said in page and BATCH * scaling_model.learning_seconds(shape) == pytest.approx(seconds, rel=0.02)
