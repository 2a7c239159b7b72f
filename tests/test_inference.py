"""What was trained can be opened, lets write and be measured: runs, adapters, plain models, whole and linear ones."""

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from llm_dqn import DQNConfig, DQNTrainer
from llm_dqn.errors import UserError
from llm_dqn.inference import OpenRun, evaluate_run, generate_file, open_run
from llm_dqn.policy import BehaviourPolicy, greedy
from llm_dqn.recipe import parse_recipe
from llm_dqn.rollout import Writer, rollout
from llm_dqn.strength import ScaledAdvantage
from tests.networks import lora, prompts, shake

ROWS = [{"prompt": f"the film was {number}", "wanted": "e"} for number in range(12)]
REWARDS = """
def letters(prompts, completions, **columns):
    return [text.count("e") / max(len(text), 1) for text in completions]

def wanted_letters(prompts, completions, wanted):
    return [text.count(letter) / max(len(text), 1) for text, letter in zip(completions, wanted)]
"""
SMALL = {
    "max_steps": 2,
    "max_completion_length": 6,
    "prompts_per_collect": 4,
    "learning_starts": 4,
    "per_device_train_batch_size": 4,
    "capacity": 16,
    "eval_steps": 0,
    "final_eval_prompts": 5,
}


def letters(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [text.count("e") / max(len(text), 1) for text in completions]


def trained(path: str, folder: Path, peft_config: Any = "lora", **options: Any) -> DQNTrainer:
    """A run of two steps from Python, whose weights were then moved far enough to write something else."""
    config = lora() if peft_config == "lora" else peft_config
    args = DQNConfig(output_dir=str(folder), **(SMALL | options))
    trainer = DQNTrainer(path, letters, args, Dataset.from_list(ROWS), peft_config=config)
    trainer.train()
    shake(trainer.network, 0.3 if config is not None else 0.05)
    trainer.save_model()
    return trainer


def tokens(writer: Writer, path: str, policy: BehaviourPolicy | None = None, **options: Any) -> list[list[int]]:
    """Completions of four prompts, greedy unless another policy is given."""
    episodes = rollout(writer, prompts(path), policy or greedy(), seed=0, **options)
    return [episode.completion_ids.tolist() for episode in episodes]


@pytest.fixture(scope="module")
def tuned(tiny_llama_path: str, tmp_path_factory: pytest.TempPathFactory) -> DQNTrainer:
    return trained(tiny_llama_path, tmp_path_factory.mktemp("tuned") / "run")


@pytest.fixture(scope="module")
def run(tuned: DQNTrainer) -> str:
    return tuned.args.output_dir


@pytest.fixture
def opened(run: str) -> OpenRun:
    return open_run(run)


RUNS: dict[str, dict[str, Any]] = {
    "lora": {},
    "linear head": {"q_head": "linear"},
    "linear head, uniform prior": {"q_head": "linear", "prior": "uniform"},
    "whole model": {"peft_config": None, "learning_rate": 1e-3},
    "whole model, linear head": {"peft_config": None, "learning_rate": 1e-3, "q_head": "linear"},
}


BASE_GREEDY = BehaviourPolicy(temperature=0.0, epsilon=1.0)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_run_writes_what_its_trainer_would(
    build_model: Callable[..., str], tmp_path: Path, options: dict[str, Any], tied: bool
) -> None:
    path = build_model("llama", tied=tied)
    trainer = trained(path, tmp_path / "run", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's, of output layers that share their weights
        opened = open_run(str(tmp_path / "run"))
    assert opened.recipe is not None and opened.writer.max_completion_length == 6
    ours, base = tokens(trainer.parts.writer, path), tokens(open_run(path, 6).writer, path)
    assert tokens(opened.writer, path) == ours != base
    assert tokens(opened.writer, path, BASE_GREEDY) == base


def test_a_bfloat16_run_is_opened_in_bfloat16(tiny_llama_path: str, tmp_path: Path) -> None:
    trainer = trained(tiny_llama_path, tmp_path / "run", bf16=True)
    opened = open_run(str(tmp_path / "run"))
    assert tokens(opened.writer, tiny_llama_path) == tokens(trainer.parts.writer, tiny_llama_path)


def test_an_adapter_folder_needs_no_run(tuned: DQNTrainer, run: str, tiny_llama_path: str, tmp_path: Path) -> None:
    adapter = tuned.save_model(str(tmp_path / "adapter"))
    opened = open_run(str(adapter), max_completion_length=6)
    assert opened.recipe is None
    assert tokens(opened.writer, tiny_llama_path) == tokens(open_run(run).writer, tiny_llama_path)
    for file in adapter.glob("token*"):
        file.unlink()  # then the base model's own serves
    assert tokens(open_run(str(adapter), 6).writer, tiny_llama_path) == tokens(opened.writer, tiny_llama_path)


def test_the_tokenizer_is_the_one_that_was_saved_with_the_adapter(run: str, tiny_llama_path: str) -> None:
    config = Path(run) / "adapter" / "tokenizer_config.json"
    before = config.read_text()
    try:
        config.write_text(json.dumps(json.loads(before) | {"chat_template": "{{ messages }}"}))
        assert open_run(run).writer.tokenizer.chat_template == "{{ messages }}"
    finally:
        config.write_text(before)


def test_no_more_rows_are_written_at_once_than_said(run: str, tiny_llama_path: str, monkeypatch: Any) -> None:
    opened = open_run(run, batch_size=3)
    model, sizes = opened.writer.network.model.get_base_model(), []
    real = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: sizes.append(len(given["input_ids"])) or real(**given))
    rows = prompts(tiny_llama_path) * 2
    episodes = rollout(opened.writer, rows, greedy(), seed=0)
    assert sizes == [3, 3, 2] and [episode.prompt for episode in episodes] == [row.prompt for row in rows]
    assert open_run(run).writer.batch_size == 64


# --- how far to follow what was learned ---------------------------------------------------------------------------


def test_scale_0_is_the_base_and_1_the_tuned_model(opened: OpenRun, tiny_llama_path: str) -> None:
    base, ours = tokens(opened.writer, tiny_llama_path, BASE_GREEDY), tokens(opened.writer, tiny_llama_path)
    scaled = {
        scale: tokens(opened.writer, tiny_llama_path, extra=partial(ScaledAdvantage, opened.writer.network, scale))
        for scale in (0.0, 1.0)
    }
    assert scaled == {0.0: base, 1.0: ours} and base != ours


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0])
def test_log_probabilities_are_mixed_token_by_token(opened: OpenRun, scale: float) -> None:
    """Two steps, the second from the cache, in a batch with padding on the left."""
    network = opened.writer.network
    ids = torch.tensor([[0, 0, 20, 21, 22, 23], [30, 31, 32, 33, 34, 35]])
    mask = (ids > 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def logprobs(role: Any, width: int) -> torch.Tensor:
        facts = {"attention_mask": mask[:, :width], "position_ids": positions[:, :width], "use_cache": False}
        with network.writer(role) as model:
            return model(input_ids=ids[:, :width], **facts).logits[:, -1].log_softmax(-1)

    processor = ScaledAdvantage(network, scale, mask[:, :5])
    for width in (5, 6):
        reference, online = logprobs("reference", width), logprobs("online", width)
        with network.writer("online"):
            mixed = processor(ids[:, :width], online)
        wanted = (reference + scale * (online - reference)).log_softmax(-1)
        assert torch.allclose(mixed.log_softmax(-1), wanted, atol=1e-5)
        assert (reference - online).abs().max() > 0.1


# --- generate -----------------------------------------------------------------------------------------------------


@pytest.fixture
def prompt_file(tmp_path: Path) -> str:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(file)


def written(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_generate_writes_a_line_a_prompt_in_their_order(run: str, prompt_file: str, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert generate_file(run, prompt_file, str(out), greedy=True, max_completion_length=3) == len(ROWS)
    lines = written(out)
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in ROWS]
    assert all(line.keys() == {"prompt", "completion"} for line in lines)
    first = out.read_text()
    for seed, same in ((0, True), (1, False)):
        generate_file(run, prompt_file, str(out), seed=0)
        sampled = out.read_text()
        generate_file(run, prompt_file, str(out), seed=seed)
        assert (out.read_text() == sampled) == same and sampled != first


def test_generate_takes_a_scale(run: str, prompt_file: str, tiny_llama_path: str, tmp_path: Path) -> None:
    base, none, one, whole = (tmp_path / f"{name}.jsonl" for name in ("base", "none", "one", "whole"))
    generate_file(tiny_llama_path, prompt_file, str(base), greedy=True, max_completion_length=6)
    generate_file(run, prompt_file, str(none), greedy=True, beta_scale=0.0)
    generate_file(run, prompt_file, str(one), greedy=True, beta_scale=1.0)
    generate_file(run, prompt_file, str(whole), greedy=True)
    assert written(none) == written(base) != written(whole) == written(one)


def test_what_cannot_be_written_is_told_before_any_work(run: str, prompt_file: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--output .*nowhere/out.jsonl: the folder .*nowhere does not exist"):
        generate_file("not/opened/at/all", prompt_file, str(tmp_path / "nowhere" / "out.jsonl"))
    with pytest.raises(UserError, match="is a folder; name a file"):
        evaluate_run("not/opened/at/all", output=str(tmp_path))


# --- evaluate -----------------------------------------------------------------------------------------------------


def recipe_text(model: str, folder: Path) -> str:
    sections = {
        "model": {"model_name_or_path": model},
        "lora": {"r": 4},
        "data": {"train": str(folder / "prompts.jsonl")},
        "rollout": {"max_completion_length": 6, "prompts_per_collect": 4},
        "reward": {"funcs": [f"{folder / 'scores.py'}:wanted_letters"]},
        "replay": {"learning_starts": 4, "capacity": 64},
        "train": {"output_dir": str(folder / "run"), "max_steps": 4, "eval_steps": 0, "learning_rate": 0.01},
    }
    return json.dumps(sections)


def test_evaluating_a_run_again_gives_its_evaluation_again(
    tiny_llama_path: str, prompt_file: str, tmp_path: Path
) -> None:
    (tmp_path / "scores.py").write_text(REWARDS)
    text = recipe_text(tiny_llama_path, tmp_path)
    report = DQNTrainer.from_recipe(parse_recipe(text, "test")).train()
    again, pairs = evaluate_run(str(tmp_path / "run"), output=str(tmp_path / "again.json"))
    assert _close(again, report)
    assert json.loads((tmp_path / "again.json").read_text()) == again
    assert len(pairs) == report["tuned"]["prompts"] == 2  # a fifth of twelve is held out
    others = evaluate_run(str(tmp_path / "run"), seeds=[5])[1]
    assert [tuned.completion for _, tuned in others] != [tuned.completion for _, tuned in pairs]
    assert evaluate_run(str(tmp_path / "run"), max_prompts=1)[0]["tuned"]["prompts"] == 1


def _close(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Equal but for rounding."""
    for side in ("base", "tuned"):
        assert one[side] == {name: pytest.approx(value, abs=1e-4) for name, value in other[side].items()}
    return one["win_rate"] == other["win_rate"]


def test_a_run_from_python_asks_for_prompts_and_rewards(run: str, prompt_file: str, tmp_path: Path) -> None:
    (tmp_path / "scores.py").write_text(REWARDS)
    reward = [f"{tmp_path / 'scores.py'}:letters"]
    with pytest.raises(UserError, match="trained from Python on data that cannot be found again; give --prompts FILE"):
        evaluate_run(run)
    with pytest.raises(UserError, match="trained from Python on data that cannot"):
        evaluate_run(run, reward_specs=reward)
    with pytest.raises(UserError, match="trained from Python with rewards that cannot be found again; give --prompts"):
        evaluate_run(run, prompts=prompt_file)
    report, pairs = evaluate_run(run, prompts=prompt_file, reward_specs=reward)
    assert report["tuned"]["prompts"] == len(pairs) == len(ROWS)
    assert report["tuned"]["reward"] != report["base"]["reward"] and report["tuned"]["kl"] > 0


def test_a_plain_model_asks_for_prompts_and_rewards(tiny_llama_path: str, prompt_file: str, tmp_path: Path) -> None:
    (tmp_path / "scores.py").write_text(REWARDS)
    with pytest.raises(UserError, match="is no run folder, so it names no held-out prompts; give --prompts FILE"):
        evaluate_run(tiny_llama_path)
    with pytest.raises(UserError, match="is no run folder, so it names no reward; give --rewards"):
        evaluate_run(tiny_llama_path, prompts=prompt_file)
    spec = [f"{tmp_path / 'scores.py'}:letters"]
    report, _ = evaluate_run(tiny_llama_path, prompts=prompt_file, reward_specs=spec)
    assert report["win_rate"] == 0.5 and report["base"]["reward"] == report["tuned"]["reward"]
    assert report["tuned"]["kl"] == pytest.approx(0, abs=1e-6)


def test_a_reward_that_needs_another_column_says_so(tiny_llama_path: str, tmp_path: Path) -> None:
    (tmp_path / "scores.py").write_text(REWARDS)
    (tmp_path / "bare.jsonl").write_text('{"prompt": "the film"}\n')
    with pytest.raises(UserError, match="needs 'wanted', which is no column of the data"):
        spec = [f"{tmp_path / 'scores.py'}:wanted_letters"]
        evaluate_run(tiny_llama_path, prompts=str(tmp_path / "bare.jsonl"), reward_specs=spec)


def test_a_run_without_result_says_how_to_get_one(run: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text((Path(run) / "recipe.yaml").read_text())
    with pytest.raises(UserError, match="holds no adapter yet: let `llm-dqn train` finish, or continue it with --res"):
        open_run(str(tmp_path))


def test_what_is_no_model_at_all_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        open_run(str(tmp_path))
    with pytest.raises(UserError, match="neither a local folder nor reachable"):
        open_run("nobody/nothing")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no base model"):
        open_run(str(tmp_path))
