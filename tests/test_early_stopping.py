"""Learning from a log alone: what is kept from it, when learning stops, which policy is left, how it goes on."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from llm_dqn import DQNConfig, DQNTrainer, early_stopping
from llm_dqn.data import LoggedRow
from llm_dqn.early_stopping import HELD_OUT, PREDICTED
from llm_dqn.logged import FEWEST, MOST, kept_apart
from llm_dqn.types import Prompt
from tests.networks import lora


def rows(rewards: Sequence[float], prompts: int) -> list[LoggedRow]:
    texts = [f"p{number % prompts}" for number in range(len(rewards))]
    return [
        LoggedRow(Prompt(text, text, [1]), "x", [2], reward, "eos") for text, reward in zip(texts, rewards, strict=True)
    ]


def test_what_is_kept_apart_shares_no_prompt_with_what_is_learned_from():
    log = rows([float(number % 3 == 0) for number in range(600)], prompts=200)
    learned, kept = kept_apart(log, 0.1, seed=0)
    learned_texts, kept_texts = ({row.prompt.text for row in some} for some in (learned, kept))
    assert not learned_texts & kept_texts and len(learned_texts) == 180
    assert kept and all(row.reward == 1 for row in kept)
    assert kept_apart(log, 0.1, seed=0)[1] == kept != kept_apart(log, 0.1, seed=1)[1]


@pytest.mark.parametrize(
    ("rewards", "prompts", "share"),
    [
        ([1.0] * 500, 100, 0.1),  # nothing is better than the mean
        ([0.0] * 493 + [1.0] * (FEWEST - 1), 500, 0.9),
        ([0.0] * 470 + [1.0] * 30, 500, 0.1),  # to keep eight of thirty apart would cost too many
        ([0.0, 1.0] * 250, 1, 0.5),  # one prompt cannot be on both sides
        ([0.0, 1.0] * 250, 100, 0.0),
        ([], 1, 0.5),
    ],
)
def test_all_is_learned_from_where_there_is_too_little_to_keep_apart(rewards, prompts, share):
    log = rows(rewards, prompts)
    assert kept_apart(log, share, seed=0) == (log, ())


def test_no_more_is_kept_apart_than_is_looked_at():
    log = rows([float(number % 2) for number in range(9000)], prompts=4500)
    learned, kept = kept_apart(log, 0.5, seed=0)
    assert MOST <= len(kept) <= MOST + 1 and len(learned) > 8000


def test_where_successes_are_rare_more_prompts_are_kept_apart_to_find_a_few():
    log = rows([float(number % 25 == 0) for number in range(1000)], prompts=1000)
    learned, kept = kept_apart(log, 0.1, seed=0)
    assert len(kept) == FEWEST and sum(row.reward for row in learned) == 40 - FEWEST
    assert len(learned) < 900


LOG, STEPS = 96, 40


@pytest.fixture
def log(tmp_path) -> Path:
    """Successes that have nothing in common but their letters: more than those can only be learned by heart."""
    draw = random.Random(0)
    facts = [
        {
            "prompt": f"{number} of {LOG}",
            "completion": " " + "".join(draw.choices("aeiou", k=4)) if number % 2 else " xyz",
            "reward": number % 2,
        }
        for number in range(LOG)
    ]
    file = tmp_path / "log.jsonl"
    file.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    return file


def trained(model: str, log: Path, folder: Path, steps: int, resume: bool = False, **options) -> DQNTrainer:
    args = DQNConfig(
        output_dir=str(folder),
        warm_start=str(log),
        max_scored_completions=0,
        max_steps=steps,
        learning_rate=1e-2,
        updates_per_collect=4,
        max_completion_length=6,
        logging_steps=2,
        eval_steps=0,
        save_steps=7,
        imagined=0,
        sharpened=0,
        final_eval_prompts=4,
        **({"held_out_share": 0.3} | options),
    )
    prompts = Dataset.from_list([{"prompt": f"{number} of {LOG}"} for number in range(LOG)])
    run = DQNTrainer(model, lambda completions, **_: [0.0] * len(completions), args, prompts, peft_config=lora())
    run.train(resume=resume)
    return run


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(early_stopping, "LOOK_STEPS", 2)
    monkeypatch.setattr(early_stopping, "PATIENCE", 8)


def test_learning_stops_and_the_policy_that_generalised_best_is_left(tiny_llama_path, log, tmp_path, capsys):
    run = trained(tiny_llama_path, log, tmp_path / "run", steps=400)
    watch = run.parts.early_stopping
    assert watch.best_step > 0 and run.step == 2 * watch.best_step + 8 < 400
    # the weights in memory, and so in adapter/
    assert run.parts.held_out.look(4)[0] == pytest.approx(watch.best_value, rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seen = [line[HELD_OUT] for line in lines if HELD_OUT in line]
    assert max(seen) == pytest.approx(watch.best_value) and seen[-1] < watch.best_value > seen[0]
    assert f"likeliest after step {watch.best_step}" in capsys.readouterr().out


def test_a_run_that_is_cut_goes_on_to_the_same_policy(tiny_llama_path, log, tmp_path):
    whole = trained(tiny_llama_path, log, tmp_path / "whole", STEPS)
    cut = trained(tiny_llama_path, log, tmp_path / "cut", STEPS // 2 + 1)
    assert cut.step == STEPS // 2 + 1
    again = trained(tiny_llama_path, log, tmp_path / "cut", STEPS, resume=True)
    assert again.parts.early_stopping.state() == whole.parts.early_stopping.state()
    for name, weight in whole.network.checkpoint_state().items():
        assert torch.equal(weight, again.network.checkpoint_state()[name]), name


def test_without_held_out_prompts_a_run_learns_to_its_end(tiny_llama_path, log, tmp_path):
    run = trained(tiny_llama_path, log, tmp_path / "run", STEPS, held_out_share=0.0)
    assert run.step == STEPS and run.parts.held_out is None and len(run.replay) == LOG
    assert not run.parts.early_stopping.best


def test_where_a_judge_grades_learning_stops_as_well(tiny_llama_path, log, tmp_path):
    """What is imitated is the best it has seen: others like that get likelier until these are known by heart."""
    facts = [json.loads(line) for line in log.read_text().splitlines()]
    grades = [{**fact, "reward": fact["reward"] + place / LOG} for place, fact in enumerate(facts)]
    log.write_text("".join(json.dumps(fact) + "\n" for fact in grades))
    run = trained(tiny_llama_path, log, tmp_path / "run", steps=400)
    assert run.replay.graded and run.parts.early_stopping.best_step > 0 and run.step < 400


def test_one_figure_begins_where_another_was_looked_at_before(tiny_llama_path, log, tmp_path):
    """Held-out completions are looked at before the first step; whether rewards can be predicted is known a little
    later."""
    watch = trained(tiny_llama_path, log, tmp_path / "run", 2, held_out_share=0.0).parts.early_stopping
    assert not watch.over(10**6)
    looks = [(0, HELD_OUT, 0.3), (4, HELD_OUT, 0.5), (6, HELD_OUT, 0.4)]
    looks += [(8, PREDICTED, -1.0), (12, PREDICTED, 0.5), (16, PREDICTED, 0.2)]
    best = [(0, 0.3), (4, 0.5), (4, 0.5), (8, -1.0), (12, 0.5), (12, 0.5)]
    for look, expected in zip(looks, best, strict=True):
        watch.seen(*look)
        assert (watch.best_step, watch.best_value) == expected
    assert not watch.over(31) and watch.over(32)
    assert "surely highest after step 12 (at least 0.500)" in watch.put_back()
