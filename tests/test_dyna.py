"""Completions that no reward was asked for: where they come from, what they cost, that a run goes on exactly."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from llm_dqn import DQNConfig, DQNTrainer, dyna, intake
from llm_dqn.replay_browser import Choice
from llm_dqn.replay_export import export
from llm_dqn.trainer_state import Checkpointed
from tests.networks import lora

ROWS = [
    {"prompt": f"{word} {number}"} for number in range(12) for word in ("the film", "a dull plot", "two friends", "3")
]
SIZE = 64  # completions of a collection: as many as predictions need


class Judge:
    """Grades by the share of letters, which hidden states tell; counts what it is asked."""

    def __init__(self, knows: str = "share") -> None:
        self.asked, self.knows = 0, knows
        self.__name__ = "judge"

    def __call__(self, prompts: list[str], completions: list[str], **columns: object) -> list[float]:
        self.asked += len(completions)
        if self.knows == "nothing":
            return [float(np.random.default_rng(self.asked + place).random()) for place in range(len(completions))]
        share = [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]
        return share if self.knows == "share" else [float(one > 0.3) for one in share]


def trainer(path: str, folder: Path, judge: Judge, **options: object) -> DQNTrainer:
    settings = {
        "max_steps": 12,
        "prompts_per_collect": SIZE,
        "learning_starts": SIZE,
        "updates_per_collect": 2,
        "max_completion_length": 8,
        "per_device_train_batch_size": 8,
        "target_kl": None,
        "cache": False,
        "logging_steps": 1,
        "eval_steps": 0,
        "save_steps": 0,
        "final_eval_prompts": 2,
        "learning_rate": 1e-2,
        "seed": 1,
    }
    args = DQNConfig(output_dir=str(folder), **(settings | options))
    return DQNTrainer(path, judge, args, Dataset.from_list(ROWS), eval_dataset=ROWS[:2], peft_config=lora())


def learned(path: str, folder: Path, judge: Judge | None = None, resume: bool = False, **options: object) -> DQNTrainer:
    run = trainer(path, folder, judge or Judge(), **options)
    run.train(resume=resume)
    return run


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(DQNTrainer, "evaluate", lambda self: {})


@pytest.fixture
def always(monkeypatch):
    """However little is known: what is predicted of so few completions of a random model is not worth much."""
    monkeypatch.setattr(intake, "LEAST", 0.0)
    monkeypatch.setattr(intake, "LEAST_OF_GRADES", 0.0)
    monkeypatch.setattr(dyna, "TOLERATED", 1e9)


def test_predicted_rewards_are_learned_from_and_cost_no_call(tiny_llama_path, tmp_path, always, capsys):
    judge = Judge()
    run = learned(tiny_llama_path, tmp_path / "run", judge)
    sources = run.replay.store.column("source")
    assert run.parts.dyna.predicts
    # twelve steps: each collection is learned from for two steps, and six more for three times as many imagined ones
    assert judge.asked == run.scored_completions == 2 * SIZE and run.step == 12
    assert [int((sources == kind).sum()) for kind in range(3)] == [2 * SIZE, 0, 6 * SIZE]
    predicted, true = run.replay.rewards[sources == 2], run.replay.rewards[sources == 0]
    assert true.min() <= predicted.min() and predicted.max() <= true.max() and predicted.std() < true.std()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    skills = [line["replay/predicted_r2"] for line in lines if "replay/predicted_r2" in line]
    assert len(skills) == 2 and skills[-1] == pytest.approx(run.parts.dyna.model.skill)
    assert "are imagined for each scored one" in capsys.readouterr().out
    texts = {tuple(ids.tolist()) for ids in _completions(run, sources == 2)}
    assert len(texts) > SIZE  # written anew, not those that were scored


def _completions(run: DQNTrainer, which: np.ndarray) -> list[torch.Tensor]:
    batch = run.replay.batch(np.flatnonzero(which))
    return [row[mask] for row, mask in zip(batch.tokens.actions, batch.action_mask, strict=True)]


def test_the_shipped_judge_is_predicted_as_well_as_it_is_said_to_be(tmp_path):
    """On completions that were never scored, of prompts that were not seen."""
    data = Path(__file__).parents[1] / "data"
    prompts = [json.loads(line) for line in (data / "prompts_train.jsonl").read_text().splitlines()[:256]]
    args = DQNConfig(output_dir=str(tmp_path), prompts_per_collect=128, max_completion_length=40, eval_steps=0)
    judge = str(data / "tiny_reward_model")
    run = DQNTrainer(str(data / "tiny_lm"), judge, args, prompts, peft_config=lora())
    run.logbook.open(False, lambda state: None)
    run.collect()
    assert run.replay.graded and run.parts.dyna.predicts and run.collect_at == 4 * 32
    unseen = run.score(run.rollout())
    explained = 1 - np.mean(np.square([e.reward - p.reward for e, p in _beside(run, unseen)])) / np.var(
        [e.reward for e in unseen]
    )
    assert 0.3 < run.parts.dyna.skill < 0.8 and explained == pytest.approx(run.parts.dyna.skill, abs=0.15)


def _beside(run: DQNTrainer, episodes: list) -> list:
    return list(zip(episodes, run.parts.dyna.judged(episodes), strict=True))


def test_it_ends_when_true_rewards_fall(tiny_llama_path, tmp_path):
    run = trainer(tiny_llama_path, tmp_path, Judge())
    draw, model = torch.Generator().manual_seed(0), run.parts.dyna

    def collection(mean: float) -> dict[str, torch.Tensor]:
        features = torch.cat([torch.randn(64, 5, generator=draw), torch.full((64, 1), mean)], dim=1)
        return {
            "features": features,
            "rewards": mean + 0.1 * (features - features.mean(0))[:, 0],
            "prompts": torch.arange(64),
        }

    told = []
    for mean in (0.2, 0.5, 0.49, 0.3, 0.51):
        model.learn([collection(mean)], 0.2)
        told.append(model.predicts)
    assert told == [True, True, True, False, True]


@pytest.mark.parametrize(("knows", "options"), [("nothing", {}), ("share", {"imagined": 0}), ("share", {"budget": 0})])
def test_nothing_is_imagined_where_nothing_is_known_or_nothing_is_to_be(tiny_llama_path, tmp_path, knows, options):
    if "budget" in options:
        log = tmp_path / "log.jsonl"
        facts = [
            {**row, "completion": " aeiou"[: 2 + place % 4], "reward": place % 4} for place, row in enumerate(ROWS)
        ]
        log.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
        options = {"max_scored_completions": 0, "warm_start": str(log), "held_out_share": 0.0}
    judge = Judge(knows)
    run = learned(tiny_llama_path, tmp_path / "run", judge, max_steps=4, **options)
    assert not (run.replay.store.column("source") == 2).any()
    assert judge.asked == run.scored_completions == (0 if "warm_start" in options else 2 * SIZE)


def test_a_run_that_imagines_goes_on_exactly(tiny_llama_path, tmp_path, always):
    whole = learned(tiny_llama_path, tmp_path / "whole", max_steps=20)
    learned(tiny_llama_path, tmp_path / "cut", max_steps=11)
    again = learned(tiny_llama_path, tmp_path / "cut", max_steps=20, resume=True)
    assert again.scored_completions == whole.scored_completions == 3 * SIZE
    for name, weight in whole.network.checkpoint_state().items():
        assert torch.equal(weight, again.network.checkpoint_state()[name]), name
    for name, values in whole.replay.state_arrays().items():
        assert np.array_equal(values, again.replay.state_arrays()[name]), name
    state = Checkpointed.state(whole)["dyna"]
    assert state == Checkpointed.state(again)["dyna"] and state["predicts"]
    for name, values in whole.parts.dyna.tensors()["outcomes"].items():
        assert torch.equal(values, again.parts.dyna.tensors()["outcomes"][name]), name


def test_an_export_holds_true_rewards_unless_others_are_asked_for(tiny_llama_path, tmp_path, always):
    run = learned(tiny_llama_path, tmp_path / "run", max_steps=8)
    assert len(run.replay) == 4 * SIZE
    file = tmp_path / "out.jsonl"
    assert export(tmp_path / "run", file, Choice()) == SIZE
    assert {json.loads(line)["source"] for line in file.read_text().splitlines()} == {"online"}
    assert export(tmp_path / "run", file, Choice(limit=5)) == 5
    assert export(tmp_path / "run", file, Choice(source="imagined")) == 3 * SIZE


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "opt"])
def test_features_do_not_depend_on_the_batch(build_model, tmp_path, architecture):
    run = trainer(build_model(architecture), tmp_path / "run", Judge())
    episodes = run.rollout()
    dyna = run.parts.dyna
    dyna.model.fit(np.zeros((2, 3)), np.zeros(2), np.zeros(2))
    found: list[np.ndarray] = []
    dyna.model.predict = lambda features: found.append(features) or np.zeros(len(features))  # type: ignore[method-assign]
    dyna.judged(episodes)
    dyna.judged(sorted(episodes, key=lambda episode: len(episode.prompt_ids)))
    order = sorted(range(len(episodes)), key=lambda place: len(episodes[place].prompt_ids))
    assert np.allclose(found[0][order], found[1], atol=1e-4)
    run.replay.add([episode.__class__(**{**vars(episode), "reward": 1.0}) for episode in episodes])
    assert np.allclose(dyna.unknown(run.replay)["features"].numpy(), found[0], atol=1e-4)
    assert dyna.unknown(run.replay) == {}  # known by now


@pytest.mark.parametrize(("knows", "sharp"), [("nothing", False), ("share", False), ("right", True)])
def test_acting_is_sharp_where_answers_are_right_or_wrong(tiny_llama_path, tmp_path, knows, sharp):
    run = trainer(tiny_llama_path, tmp_path / "run", Judge(knows), max_steps=2, imagined=0)
    assert run.temperature == 1.0
    run.train()
    assert run.temperature == (0.3 if sharp else 1.0)
    fixed = trainer(tiny_llama_path, tmp_path / "fixed", Judge(knows), max_steps=2, imagined=0, temperature=0.7)
    fixed.train()
    assert fixed.temperature == 0.7
