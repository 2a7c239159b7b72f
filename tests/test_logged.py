"""What of a log of scored completions is imitated where nothing else is scored: its best, whatever the rewards are."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset

from llm_dqn import DQNConfig, DQNTrainer
from llm_dqn.assembly import with_learning_rate
from llm_dqn.logged import kept_apart, least_imitated
from llm_dqn.replay import PrefixReplay, by_rewards, success_biased
from tests.networks import episode, lora
from tests.test_early_stopping import rows


@pytest.mark.parametrize(
    ("rewards", "share", "least"),
    [
        ([0.0] * 700 + [1.0] * 300, 0.1, 1.0),
        ([0.0] * 980 + [1.0] * 20, 0.1, 1.0),  # the best tenth would be failures for the most part
        (list(range(4000)), 0.1, 3599),
        (list(range(4000)), 0.02, 3799),  # 200 at least
        (list(range(100)), 0.1, 50),
        (list(range(10)), 0.1, 5),
        (list(range(1000)), 1.0, 500),  # all above the mean
        ([-5.0] * 500 + [-1.0] * 450 + [0.0] * 50, 0.1, -1.0),  # of equal ones all
        ([0.0] * 100 + [5.0] * 900, 0.1, 5.0),
        ([2.0] * 20, 0.1, 2.0),
    ],
)
def test_the_best_of_a_log_is_imitated_and_nothing_below_its_mean(rewards, share, least):
    assert least_imitated(rows(rewards, prompts=20), share) == least


def test_what_is_kept_apart_is_what_would_be_imitated():
    log = rows([float(number % 10) for number in range(1000)], prompts=500)
    _, kept = kept_apart(log, 0.2, seed=0, least=9.0)
    assert kept and {row.reward for row in kept} == {9.0}
    assert {row.reward for row in kept_apart(log, 0.2, seed=0)[1]} == {5.0, 6.0, 7.0, 8.0, 9.0}


def memory(least: float | None) -> PrefixReplay:
    """Logged episodes with the rewards 0 to 9, and two newer ones that got 5.5 and 0."""
    replay = PrefixReplay(16)
    replay.add([episode([1], [2, 3], float(reward), source="logged", policy_version=-1) for reward in range(10)])
    replay.add([episode([1], [2, 3], reward, source="imagined", policy_version=128) for reward in (5.5, 0.0)])
    replay.least_logged = least
    return replay


def test_only_the_best_of_the_log_and_whatever_else_is_above_the_mean_are_successes():
    assert memory(8.0).successes()[0].tolist() == [8, 9, 10]
    assert memory(None).successes()[0].tolist() == [5, 6, 7, 8, 9, 10]
    slots = np.array([11, 7, 8])
    assert memory(8.0).imitable(slots).tolist() == [True, False, True]
    assert memory(None).imitable(slots).tolist() == [True, True, True]


def test_a_log_does_not_age_where_nothing_newer_is_scored():
    rule, rng = success_biased(1.0, half_life=64.0), np.random.default_rng(0)
    drawn = np.bincount(rule(memory(8.0), 30_000, rng), minlength=12)
    assert drawn[[8, 9, 10]] == pytest.approx(np.full(3, 10_000), rel=0.05)
    drawn = np.bincount(rule(memory(None), 30_000, rng), minlength=12)
    assert drawn[10] > 3 * drawn[9] > 0
    aged = memory(None)
    aged.graded = True
    drawn = np.bincount(by_rewards(half_life=64.0)(aged, 30_000, rng), minlength=12)
    assert drawn[11] > 3 * drawn[9] > 0


LOG = 800


def trainer(model: str, folder, budget: int | None, peft_config=None, kinds: int = LOG, **options) -> DQNTrainer:
    """Of a log with so many different rewards, each as often as the others."""
    folder.mkdir()
    each = LOG // kinds
    log = [{"prompt": f"{number}", "completion": f" {number}", "reward": number // each} for number in range(LOG)]
    file = folder / "log.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in log))
    args = DQNConfig(
        output_dir=str(folder / "run"),
        warm_start=str(file),
        max_scored_completions=budget,
        max_completion_length=4,
        held_out_share=0.0,
        **options,
    )
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in log])
    return DQNTrainer(model, lambda completions, **_: [0.0] * len(completions), args, prompts, peft_config=peft_config)


@pytest.mark.parametrize(("share", "imitated"), [(0.1, 201), (0.5, 400), (1.0, 400)])
def test_the_rest_of_a_log_teaches_values_alone(tiny_llama_path, tmp_path, share, imitated):
    run = trainer(tiny_llama_path, tmp_path / "a", 0, lora(), imitated_share=share)
    batch = run.replay.batch(np.arange(len(run.replay)))
    target = run.td_target(batch)
    scored = batch.rewards.sum(1)
    assert ((target.weights > 0).any(1) == (scored >= LOG - imitated)).all()
    last = batch.action_mask.sum(1, keepdim=True) - 1
    assert torch.equal(target.returns.gather(1, last)[:, 0], scored)


@pytest.mark.parametrize(("share", "best"), [(None, 0.25), (0.1, 0.1), (1.0, 0.5)])
def test_where_new_completions_come_the_best_quarter_and_what_is_clearly_better_than_expected_is_imitated(
    tiny_llama_path, tmp_path, share, best
):
    run = trainer(tiny_llama_path, tmp_path / "a", 64, lora(), imitated_share=share)
    assert run.replay.least_logged is None and not run.replay.graded
    batch = run.replay.batch(np.arange(len(run.replay)))
    assert (run.td_target(batch).weights > 0).any(1).sum() > LOG / 3
    advantages = torch.ones(batch.action_mask.shape)
    assert (run.weights(advantages, batch) > 0).all()  # all, as long as nobody knows what rewards these are
    run.replay.best_alone = True
    imitated = run.weights(advantages, batch)[:, 0] > 0
    assert imitated.sum() == pytest.approx(LOG * best, abs=1) and imitated[-LOG // 10 :].all()
    advantages[: LOG // 8, 0] = 0.51 * float(run.replay.rewards.std())
    imitated = run.weights(advantages, batch)[:, 0] > 0
    assert imitated[: LOG // 8].all() and imitated.sum() == pytest.approx(LOG * (best + 1 / 8), abs=1)


@pytest.mark.parametrize(("budget", "best_alone"), [(0, False), (64, True)])
def test_a_log_alone_has_a_rule_of_its_own(tiny_llama_path, tmp_path, budget, best_alone):
    run = trainer(tiny_llama_path, tmp_path / "a", budget, lora(), kinds=5)
    run.see_first_rewards()
    assert run.replay.best_alone is best_alone and not run.replay.graded


def test_the_learning_rate_follows_from_what_is_tuned_and_from_where_completions_come(tiny_llama_path, tmp_path):
    args = DQNConfig(output_dir=str(tmp_path))
    alone = args.model_copy(update={"max_scored_completions": 0})
    rates = [with_learning_rate(given, what).learning_rate for given in (args, alone) for what in (lora(), None)]
    assert rates == [2.5e-4, 1e-4, 5e-4, 1e-4]
    assert with_learning_rate(alone.model_copy(update={"learning_rate": 0.1}), lora()).learning_rate == 0.1
