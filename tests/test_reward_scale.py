"""The unit in which rewards are learned from: the same is learned whatever it is, and Q is told in rewards."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import llm_dqn
from llm_dqn.assembly import price
from llm_dqn.recipe import RecipeError, load_recipe
from llm_dqn.reward_scale import reward_scale
from tests.faults.runs import FILES, QUIET, cut_at, logged
from tests.test_trainer import letters, metrics, trainer

TIMES = 128.0


def times(prompts: list[str], completions: list[str], wanted: list[str], **columns: Any) -> list[float]:
    return [TIMES * share for share in letters(prompts, completions, wanted)]


@pytest.mark.parametrize(
    ("rewards", "unit"),
    [
        ([0.0] * 63 + [1.0], 1.0),  # rare success
        ([0.0] * 30 + [1.0] * 2, 1.0),  # at the very quantile
        ([0.03, 0.4, 0.97], 1.0),
        ([0.0, 0.01], 0.0078125),
        ([-60.0] * 9 + [40.0] * 9, 128.0),
        ([-1000.0] + [number / 100 for number in range(100)], 1.0),  # one penalty does not make the rest look alike
        ([2.0, 2.0], None),
        ([], None),
    ],
)
def test_the_unit_is_what_rewards_differ_by(rewards, unit):
    assert reward_scale(rewards) == unit


def test_the_same_is_learned_whatever_rewards_are_multiplied_with(tiny_llama_path, tmp_path):
    """Bit for bit, for a power of two; Q, V and beta come out in rewards."""
    report = trainer(tiny_llama_path, tmp_path / "as_is").train()
    more = trainer(tiny_llama_path, tmp_path / "times", reward=times).train()
    assert more["tuned"]["reward"] == pytest.approx(TIMES * report["tuned"]["reward"]) != 0
    policies = [load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("as_is", "times")]
    assert all(torch.equal(policies[0][name], policies[1][name]) for name in policies[0])
    for one, other in zip(metrics(tmp_path / "as_is"), metrics(tmp_path / "times"), strict=True):
        assert other["train/q_taken"] == pytest.approx(TIMES * one["train/q_taken"])
        assert other["train/kl"] == one["train/kl"]

    rows = [json.loads(line) for line in (tmp_path / "as_is/samples.jsonl").read_text().splitlines()]
    asked = tmp_path / "rows.jsonl"
    asked.write_text("".join(json.dumps({key: row[key] for key in ("prompt", "completion")}) + "\n" for row in rows))
    scores = [list(llm_dqn.score(str(tmp_path / name), str(asked))) for name in ("as_is", "times")]
    for one, other in zip(*scores, strict=True):
        for name in ("q_values", "values"):
            assert other[name] == pytest.approx([TIMES * value for value in one[name]], rel=1e-4)


def test_a_run_that_goes_on_keeps_the_unit(tiny_llama_path, tmp_path):
    options = {"reward": times, **QUIET}
    trainer(tiny_llama_path, tmp_path / "whole", **options).train()
    run = trainer(tiny_llama_path, tmp_path / "cut", **(options | {"save_steps": 3}))
    cut_at(run, 4)
    again = trainer(tiny_llama_path, tmp_path / "cut", **options)
    again.train(resume=True)
    assert again.network.reward_scale == run.network.reward_scale not in (1.0, None)
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    for name in FILES:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_nothing_is_measured_before_rewards_differ(tiny_llama_path, tmp_path):
    """The unit is that of the first collection in which they do."""
    calls: list[int] = []

    def late(completions: list[str], **columns: Any) -> list[float]:
        calls.append(len(completions))
        return [64.0 * (len(calls) > 1 and number % 2) for number in range(len(completions))]

    run = trainer(tiny_llama_path, tmp_path / "run", reward=late, max_steps=4, **QUIET)
    seen: list[float] = []
    collect = run.collect

    def collecting() -> None:
        collect()
        seen.append(run.network.reward_scale)

    run.collect = collecting
    run.train()
    assert seen == [1.0, 64.0] and run.network.beta == 64 * price(run.args)


def test_a_unit_can_be_given(tiny_llama_path, tmp_path):
    run = trainer(tiny_llama_path, tmp_path / "run", max_steps=2, reward_scale=10.0, **QUIET)
    run.train()
    assert run.network.reward_scale == 10 and run.network.beta == pytest.approx(10 * price(run.args))
    with pytest.raises(RecipeError, match=r"dqn.reward_scale.*needs q_head: lm"):
        load_recipe("hello_world", ["dqn.q_head=linear", "dqn.reward_scale=2"])
    linear = trainer(tiny_llama_path, tmp_path / "linear", reward=times, q_head="linear", max_steps=2, **QUIET)
    linear.train()
    assert linear.network.reward_scale == 1 and linear.network.beta == price(linear.args)
