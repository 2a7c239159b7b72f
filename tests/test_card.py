"""The model card says what was measured, invents nothing, and its snippet runs."""

import json
import math
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from huggingface_hub import ModelCard

from llm_dqn.card import Card, license_of, read_card
from llm_dqn.errors import UserError
from llm_dqn.recipe import load_recipe
from llm_dqn.trainer import DQNTrainer
from tests.hub_server import problems_of_card
from tests.networks import network, shake
from tests.tiny_models import tokenizer

RECIPE = """# llm-dqn 0.1.0
# torch 2.13.0
model: {model_name_or_path: someone/base}
data: {train: someone/prompts, eval: null}
rollout: {max_completion_length: 5}
reward: {funcs: [rewards.py:polite, someone/judge], weights: [1.0, 0.5]}
dqn: {q_head: lm, beta: 0.1}
train: {seed: 7, output_dir: runs/polite, run_name: null}
"""
FIGURES = {
    "reward": 0.25, "reward_ci": [0.2, 0.3], "reward_greedy": 0.4, "kl": 0.0, "perplexity": 3.0, "length": 9.0,
    "distinct_2": 0.5, "prompts": 12,
}  # fmt: skip
EVALUATION = {"base": FIGURES, "tuned": FIGURES | {"reward": 0.75, "kl": 0.125, "length": 4.0}, "win_rate": 0.875}
METRICS = [
    {"step": 1, "scored_completions": 4, "rollout/reward": 0.1},
    {"step": 2, "scored_completions": 8, "rollout/reward": 0.6, "eval/reward": 0.7},
]


def card(**facts: Any) -> Card:
    known = {"place": "me/polite", "kind": "adapter", "base": "someone/base", "base_on_hub": True}
    return Card(**(known | {"recipe_text": RECIPE, "evaluation": EVALUATION, "metrics": METRICS} | facts))


def test_metadata_is_what_the_hub_reads() -> None:
    text = card(revision="abc", license={"license": "apache-2.0"}).markdown()
    assert problems_of_card(text) == []
    data = ModelCard(text).data
    assert (data.base_model, data.library_name, data.license) == ("someone/base", "peft", "apache-2.0")
    assert data.datasets == "someone/prompts" and data.base_model_relation == "adapter" and "lora" in data.tags
    results = {result.metric_type: result for result in data.eval_results}
    assert results["reward"].metric_value == 0.75 and "0.200 to 0.300" in results["reward"].metric_name
    assert results["win_rate"].metric_value == 0.875 and results["reward"].dataset_type == "someone/prompts"


def test_everything_that_was_measured_is_said() -> None:
    text = card(revision="abc").markdown()
    assert "| reward, sampled | 0.250 (0.200 to 0.300) | 0.750 (0.200 to 0.300) |" in text
    assert "on 88% of them" in text and "12 prompts" in text
    assert "`rewards.py:polite` (weight 1.0), `someone/judge` (weight 0.5)" in text
    assert "| run | polite |" in text and "| seed | 7 |" in text and "llm-dqn 0.1.0, torch 2.13.0" in text
    assert "2 steps, 8 scored completions" in text and "at revision `abc`" in text
    assert "went from 9.000 to 4.000 tokens" in text and "at most 5 tokens" in text


def test_nothing_is_invented() -> None:
    bare = card(base="/home/ann/base", base_on_hub=False, evaluation=None, metrics=[], recipe_text="")
    text = bare.markdown()
    metadata = text.split("---")[1]
    for key in ("base_model", "license", "datasets", "model-index", "model_name"):
        assert key not in metadata
    assert bare.curve is None and "![" not in text and "## Measured" not in text and "## How" not in text
    assert "Nothing was measured on held-out prompts." in text and "No licence is stated" in text
    assert "a folder that is not on the Hub" in text


def test_a_figure_that_is_missing_breaks_nothing() -> None:
    tuned = EVALUATION["tuned"] | {"reward": math.nan, "reward_ci": [math.nan, math.nan], "perplexity": None}
    text = card(evaluation=EVALUATION | {"tuned": tuned}).markdown()
    assert "| reward, sampled | 0.250 (0.200 to 0.300) | not measured |" in text and "nan" not in text.split("##")[0]
    assert problems_of_card(text) == []


def test_the_curve_is_a_picture_that_stands_alone() -> None:
    curve = card().curve
    assert curve is not None
    tags = {element.tag.split("}")[1] for element in ElementTree.fromstring(curve).iter()}
    assert "style" in tags and not tags & {"script", "image", "foreignObject", "use"}
    assert "while training" in curve and "held-out prompts" in curve
    assert curve.count("http") == curve.count("http://www.w3.org/")


def test_the_licence_is_the_base_models_or_none(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    assert license_of(readme) == {}
    readme.write_text("# no metadata\n")
    assert license_of(readme) == {}
    readme.write_text("---\nlicense: other\nlicense_name: house\nlicense_link: LICENSE\ntags: [x]\n---\n# base\n")
    assert license_of(readme) == {"license": "other", "license_name": "house", "license_link": "LICENSE"}


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_the_snippet_runs(
    build_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], chat: bool, kind: Any
) -> None:
    path = build_model("llama", chat=True) if chat else build_model("llama")
    net = network(path) if kind == "adapter" else network(path, lora=None)
    shake(net, 0.05)
    net.save_policy(tmp_path)
    tokenizer(chat=chat).save_pretrained(tmp_path)
    text = card(place=str(tmp_path), kind=kind, conversational=chat).markdown()
    capsys.readouterr()
    exec(compile(text.split("```python\n")[1].split("```")[0], "card", "exec"), {})
    assert capsys.readouterr().out.strip()
    assert ("apply_chat_template" in text) == chat


def test_a_run_describes_itself(trained_run: Path) -> None:
    text = (trained_run / "adapter" / "README.md").read_text()
    assert problems_of_card(text) == [] and "base_model" not in text.split("---")[1]
    evaluation = json.loads((trained_run / "evaluation.json").read_text())
    assert f"{evaluation['tuned']['reward']:.3f}" in text and "![Reward against scored completions](reward.svg)" in text
    assert (trained_run / "adapter" / "reward.svg").is_file() and "48 steps" in text
    assert "recipes/rewards/hello_world.py:characters" in text and "| seed | 0 |" in text


def test_conversations_are_known_by_their_samples(trained_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    base = "data/hello_lm"
    assert not read_card(run / "adapter", run, "me/x", base, "adapter").conversational
    line = {"step": 0, "prompt": [{"role": "user", "content": "hi"}], "completion": "yes", "reward": 1.0}
    (run / "samples.jsonl").write_text(json.dumps(line) + "\n")
    assert read_card(run / "adapter", run, "me/x", base, "adapter").conversational


def test_the_trainer_pushes_by_the_same_way(tmp_path: Path) -> None:
    """Tests have no network, and say so: the adapter is written, and the refusal is the command's."""
    trainer = DQNTrainer.from_recipe(load_recipe("hello_world", [f"train.output_dir={tmp_path / 'run'}"]))
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, so nothing can be uploaded"):
        trainer.push_to_hub("me/hello")
    with pytest.raises(UserError, match="REPO_ID hello: it names no owner"):
        trainer.push_to_hub("hello")
    assert (tmp_path / "run" / "adapter" / "README.md").is_file()
