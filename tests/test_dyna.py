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
        return share if self.knows == "share" else [float(one > 0.1) for one in share]


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
    monkeypatch.setattr(intake, "LEAST", -1e9)
    monkeypatch.setattr(intake, "LEAST_OF_GRADES", -1e9)
    monkeypatch.setattr(dyna, "TOLERATED", 1e9)


def test_predicted_rewards_are_learned_from_and_cost_no_call(tiny_llama_path, tmp_path, always, capsys):
    judge = Judge()
    run = learned(tiny_llama_path, tmp_path / "run", judge)
    sources = run.replay.store.column("source")
    assert run.parts.dyna.predicts
    # twelve steps: each collection is learned from for two steps, and two more for three times as many imagined ones
    assert not run.replay.graded and judge.asked == run.scored_completions == 3 * SIZE and run.step == 12
    assert [int((sources == kind).sum()) for kind in range(3)] == [3 * SIZE, 0, 9 * SIZE]
    predicted, true = run.replay.rewards[sources == 2], run.replay.rewards[sources == 0]
    assert true.min() <= predicted.min() and predicted.max() <= true.max() and predicted.std() < true.std()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    skills = [line["replay/predicted_r2"] for line in lines if "replay/predicted_r2" in line]
    assert len(skills) == 3 and skills[-1] == pytest.approx(run.parts.dyna.model.skill)
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
    return list(zip(episodes, run.parts.dyna.judged(episodes)[0], strict=True))


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


@pytest.mark.parametrize(("knows", "options"), [("nothing", {}), ("share", {"imagined": 0})])
def test_nothing_is_imagined_where_nothing_is_known_or_nothing_is_to_be(tiny_llama_path, tmp_path, knows, options):
    judge = Judge(knows)
    run = learned(tiny_llama_path, tmp_path / "run", judge, max_steps=4, **options)
    assert not (run.replay.store.column("source") == 2).any()
    assert judge.asked == run.scored_completions == 2 * SIZE


def log_of(folder: Path, noise: float = 0.0) -> dict[str, object]:
    """Settings of a run on a log alone, of single letters, whose rewards can be predicted, up to noise."""
    draw = np.random.default_rng(0)
    words = [" " + "".join(draw.choice(list("aeioubcdfg"), size=5)) for _ in range(2 * SIZE)]
    rewards = [sum(letter in "aeiou" for letter in word) / 5 + noise * draw.normal() for word in words]
    facts = [
        {**ROWS[place % len(ROWS)], "completion": word, "reward": reward}
        for place, (word, reward) in enumerate(zip(words, rewards, strict=True))
    ]
    file = folder / "log.jsonl"
    file.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    return {"max_scored_completions": 0, "warm_start": str(file), "held_out_share": 0.0}


def test_a_log_alone_is_enough_to_imagine_from(tiny_llama_path, tmp_path, always, capsys):
    judge = Judge()
    run = learned(tiny_llama_path, tmp_path / "run", judge, max_steps=7, **log_of(tmp_path))
    assert judge.asked == run.scored_completions == 0
    sources = run.replay.store.column("source")
    # before steps 0, 2, 4 and 6, and once more to look at the last policy
    assert [int((sources == kind).sum()) for kind in range(3)] == [0, 2 * SIZE, 5 * SIZE]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    promises = [line["eval/predicted_reward"] for line in lines if "eval/predicted_reward" in line]
    watch = run.parts.early_stopping
    assert len(promises) == 4 and watch.figure == "eval/predicted_reward" and watch.best_value >= max(promises)
    for name, weight in run.network.checkpoint_state().items():
        assert torch.equal(weight, watch.best[name]), name
    said = capsys.readouterr().out
    assert "all completions are imagined" in said and f"surely highest after step {watch.best_step}" in said


@pytest.mark.parametrize("options", [{}, {"imagined": 0}, {"noise": 0.2}])
def test_a_log_that_does_not_tell_is_learned_from_by_itself(tiny_llama_path, tmp_path, options):
    """Because its rewards are noise, because it shall be, or because the policy writes nothing like it."""
    noise = options.pop("noise", 9.0)
    run = learned(tiny_llama_path, tmp_path / "run", max_steps=4, **log_of(tmp_path, noise), **options)
    if noise < 1:
        assert run.parts.dyna.model.skill > intake.LEAST_OF_GRADES and not run.parts.dyna.predicts
    assert set(run.replay.store.column("source")[: len(run.replay)]) == {1} and not run.parts.early_stopping.best


def test_a_run_on_a_log_that_imagines_goes_on_exactly(tiny_llama_path, tmp_path, always, monkeypatch):
    log = log_of(tmp_path)
    whole = learned(tiny_llama_path, tmp_path / "whole", max_steps=13, **log)
    monkeypatch.setattr(
        DQNTrainer, "report", lambda run, _: setattr(run.stop, "requested", 15) if run.step == 5 else None
    )
    with pytest.raises(SystemExit):
        learned(tiny_llama_path, tmp_path / "cut", max_steps=13, **log)
    monkeypatch.undo()
    monkeypatch.setattr(DQNTrainer, "evaluate", lambda self: {})
    again = learned(tiny_llama_path, tmp_path / "cut", max_steps=13, resume=True, **log)
    for part in ("step", "collect_at", "prompts", "dyna", "early_stopping"):
        assert Checkpointed.state(again)[part] == Checkpointed.state(whole)[part], part
    for name, weight in whole.network.checkpoint_state().items():
        assert torch.equal(weight, again.network.checkpoint_state()[name]), name


def test_where_predictions_are_uncertain_less_is_promised(tiny_llama_path, tmp_path):
    """Away from what was scored predictions rise, and what is sure of them falls."""
    dyna, draw = trainer(tiny_llama_path, tmp_path, Judge()).parts.dyna, torch.Generator().manual_seed(0)
    features = torch.randn(300, 60, generator=draw)
    rewards = features[:, 0] + 0.5 * torch.randn(300, generator=draw)
    dyna.learn([{"features": features, "rewards": rewards, "prompts": torch.arange(300)}], 0.2)
    assert dyna.predicts
    lows = []
    for shift, stray in ((0.0, 0.0), (1.0, 0.0), (1.5, 8.0)):
        seen = torch.randn(64, 60, generator=draw) * (1 + stray)
        seen[:, 0] = shift
        predicted = dyna.model.predict(seen.numpy())
        lows.append(float((predicted - 2 * dyna.model.uncertainty(seen.numpy())).mean()))
    assert lows[0] < lows[1] > lows[2]
    assert [round(dyna.promise(low + 0.2, 0.1), 3) for low in (1.0, 0.0, 0.5, 0.5, 2.0)] == [1.0, 0.5, 0.5, 0.5, 0.75]


def test_a_run_that_imagines_goes_on_exactly(tiny_llama_path, tmp_path, always):
    whole = learned(tiny_llama_path, tmp_path / "whole", max_steps=12)
    learned(tiny_llama_path, tmp_path / "cut", max_steps=7)
    again = learned(tiny_llama_path, tmp_path / "cut", max_steps=12, resume=True)
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
    run = learned(tiny_llama_path, tmp_path / "run", max_steps=4)
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


@pytest.mark.parametrize(("knows", "then"), [("nothing", 64), ("share", 32), ("right", 32)])
def test_collections_are_half_as_large_once_rewards_are_no_grades(tiny_llama_path, tmp_path, knows, then):
    asked: list[int] = []
    judge = Judge(knows)

    def watched(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
        asked.append(len(completions))
        return judge(prompts, completions)

    run = trainer(tiny_llama_path, tmp_path / "run", watched, prompts_per_collect=None, max_steps=6, imagined=0)
    run.train()
    assert run.replay.graded == (knows == "nothing") and asked == [64, then, then]
    given = trainer(tiny_llama_path, tmp_path / "given", Judge(knows), prompts_per_collect=7)
    assert given.prompts_per_collect == 7


def test_collections_stay_as_they_are_where_collectors_elsewhere_write(tiny_llama_path, tmp_path):
    """What an old policy wrote is not learned from twice as often."""
    apart = {"collectors": str(tmp_path / "segments")}
    for others, then in (({}, 32), (apart, 64)):
        run = trainer(tiny_llama_path, tmp_path / "run", Judge(), prompts_per_collect=None, **others)
        run.choose_source()
        first, run.step = run.prompts_per_collect, 1
        assert (first, run.prompts_per_collect) == (64, then)


def test_nothing_is_imagined_where_collectors_elsewhere_write(tiny_llama_path, tmp_path, always):
    """Neither beside what they wrote nor where nothing came."""
    run = learned(tiny_llama_path, tmp_path / "run")
    assert run.parts.dyna.predicts
    known, scored = len(run.replay), run.score(run.rollout())
    run.shared = object()
    run.write_alone()
    assert run.imagine(scored) == 0 and len(run.replay) == known
    run.shared = None
    run.write_alone()
    assert len(run.replay) > known


def test_few_new_rewards_are_judged_with_those_before_them(tiny_llama_path, tmp_path):
    model, draw = trainer(tiny_llama_path, tmp_path, Judge()).parts.dyna, torch.Generator().manual_seed(0)
    for mean in (0.5, 0.46):  # by the last 32 alone true rewards would have fallen
        features = torch.randn(32, 5, generator=draw)
        rewards = mean + 0.1 * (features - features.mean(0))[:, 0]
        model.learn([{"features": features, "rewards": rewards, "prompts": torch.arange(32)}], 0.2)
    assert model.predicts and model._newest == 64 and model.best_mean == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("knows", "then"), [("nothing", [1.0, 1.0, 1.0]), ("share", [0.6, 0.6, 0.6]), ("right", [0.3, 0.3, 0.3])]
)
def test_acting_is_sharp_where_answers_are_right_or_wrong_and_mild_where_parts_count(
    tiny_llama_path, tmp_path, knows, then
):
    run = trainer(tiny_llama_path, tmp_path / "run", Judge(knows), max_steps=2, imagined=0)
    prompts = run.parts.eval_prompts[:1] * 3
    assert run.temperatures(prompts) == [1.0, 1.0, 1.0]
    run.train()
    run.attempts.failed.clear()
    assert run.temperatures(prompts) == then
    fixed = trainer(tiny_llama_path, tmp_path / "fixed", Judge(knows), max_steps=2, imagined=0, temperature=0.7)
    fixed.train()
    assert fixed.temperatures(prompts) == [0.7, 0.7, 0.7]
