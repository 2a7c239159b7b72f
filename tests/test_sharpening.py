"""Own completions beside a log: what they weigh, when they join, what becomes of the policy, how a run goes on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from llm_dqn import DQNConfig, DQNTrainer, early_stopping
from llm_dqn.early_stopping import HELD_OUT, SHARPER
from llm_dqn.policy import SHARP
from llm_dqn.replay import PrefixReplay
from llm_dqn.sharpening import KEPT, Sharpening, sharpened
from llm_dqn.trainer_state import Checkpointed
from llm_dqn.types import Episode, QOutput, TDTarget
from tests.networks import lora

LOG = 120


def episode(ids: list[int], reward: float = 0.0) -> Episode:
    zeros = torch.zeros(len(ids))
    return Episode("p", "c", torch.tensor([1, 2]), torch.tensor(ids), zeros, zeros, "eos", reward)


def test_how_likely_an_action_is_at_least_where_the_policy_is_sharp():
    """By hand, at temperature .3: two actions of .7 and .3, and one of .4 among others, which need not be one."""
    assert SHARP == 0.3
    chances = torch.tensor([[0.7, 0.5, 0.4], [0.0, 1.0, 1 + 1e-7]])
    expected = torch.tensor([[0.9440, 0.5, 0.2056], [0.0, 1.0, 1.0]])
    assert torch.allclose(sharpened(chances), expected, atol=1e-4)
    among_many = torch.softmax(torch.tensor([0.4, 0.3, 0.3]).log() / SHARP, 0)[0]
    assert among_many > 0.2056


def test_own_completions_stand_beside_the_logged_ones_and_nobody_scored_them():
    sharpening, log = Sharpening(beside=2, best=1.0), PrefixReplay(4)
    log.add([episode([5, 6], 1.0), episode([7], 0.0)])
    batch = log.batch(np.array([0, 1]))
    assert sharpening.with_own(batch, np.random.default_rng(0)) is batch
    sharpening.add([episode([8, 8, 8])])
    mixed = sharpening.with_own(batch, np.random.default_rng(0))
    assert mixed.scored.tolist() == [True, True] + [False] * 4 and mixed.slots.tolist() == [0, 1] + [-1] * 4
    assert mixed.tokens.actions.tolist() == [[5, 6, 0], [7, 0, 0]] + [[8, 8, 8]] * 4
    assert mixed.rewards[0, 1] == 1 and not mixed.rewards[2:].any()
    parts = mixed.split(2)  # of like length together, each row with what it is
    assert sum(part.scored.tolist() == [True, True] for part in parts) == 1 and len(parts) == 3
    sharpening.add([episode([9])] * KEPT)
    assert len(sharpening.own) == KEPT and (sharpening.own.batch(np.arange(KEPT)).tokens.actions == 9).all()


def test_what_nobody_scored_weighs_as_if_it_were_right_and_moves_no_value():
    """By hand: best reward 1, values .25 and 1.5 of an own completion: more than can be hoped weighs nothing."""
    sharpening, log = Sharpening(1, best=1.0), PrefixReplay(2)
    log.add([episode([5, 6], 1.0)])
    sharpening.add([episode([7, 8])])
    batch = sharpening.with_own(log.batch(np.array([0])), np.random.default_rng(0))
    q = QOutput(
        *(torch.tensor(rows) for rows in ([[0.5, 0.5], [0.3, 0.4]], [[0.2, 0.2], [0.25, 1.5]])), *torch.zeros(2, 2, 2)
    )
    known = TDTarget(torch.ones(2, 2), torch.full((2, 2), 0.8), torch.full((2, 2), 0.8), q.taken)
    target = sharpening.as_if_right(known, q, batch)
    assert torch.equal(target.returns, torch.tensor([[1.0, 1.0], [0.3, 0.4]]))
    assert torch.equal(target.weights, torch.tensor([[0.8, 0.8], [0.75, 0.0]]))
    assert torch.equal(target.advantages, target.weights) and torch.equal(target.q_taken, q.taken)


@pytest.fixture
def log(tmp_path) -> Path:
    """Right is what ends in one of two ways, one of them twice as often."""
    endings = [" oooo", " oooo", " eeee", " xyz"]
    facts = [
        {"prompt": f"{number} of {LOG}", "completion": endings[number % 4], "reward": float(number % 4 < 3)}
        for number in range(LOG)
    ]
    file = tmp_path / "log.jsonl"
    file.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    return file


def run_of(model: str, log: Path, folder: Path, steps: int = 120, **options) -> DQNTrainer:
    settings = {
        "held_out_share": 0.2,
        "learning_rate": 3e-3,
        "updates_per_collect": 5,
        "prompts_per_collect": 8,
        "max_completion_length": 6,
        "per_device_train_batch_size": 8,
        "imagined": 0,
        "eval_steps": 0,
        "save_steps": 13,
        "final_eval_prompts": 2,
    }
    args = DQNConfig(
        output_dir=str(folder), warm_start=str(log), max_scored_completions=0, max_steps=steps, **(settings | options)
    )
    prompts = Dataset.from_list([{"prompt": f"{number} of {LOG}"} for number in range(LOG)])
    return DQNTrainer(model, lambda completions, **_: [0.0] * len(completions), args, prompts, peft_config=lora())


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(early_stopping, "LOOK_STEPS", 5)


def share(run: DQNTrainer) -> float:
    """Of the likelier of the two right completions among both, by mean probability over prompts of the log."""
    chances = []
    for completion in (" oooo", " eeee"):
        batch = run.replay.batch(np.flatnonzero([completion in text for text in texts(run.replay, run)]))
        chances.append(float(run.network.logprobs(batch.tokens, "online").sum(1).exp().mean()))
    return chances[0] / sum(chances)


def texts(replay: PrefixReplay, run: DQNTrainer) -> list[str]:
    batch = replay.batch(np.arange(len(replay)))
    tokenizer = run.parts.writer.tokenizer
    return [tokenizer.decode(row[mask]) for row, mask in zip(batch.tokens.actions, batch.action_mask, strict=True)]


def test_what_is_likeliest_gets_likelier_once_the_log_has_taught_it(tiny_llama_path, log, tmp_path, capsys):
    shares, last = {}, {}
    for kind in (0, 1):
        run = run_of(tiny_llama_path, log, tmp_path / f"{kind}", steps=300, sharpened=kind)
        run.parts.early_stopping.seen = lambda *look: None  # the last policy is what is asked about
        run.train()
        shares[kind], last[kind] = share(run), run
        assert set(run.replay.store.column("source")[: len(run.replay)]) == {1}  # the log
    lines = [json.loads(line) for line in (tmp_path / "1" / "metrics.jsonl").read_text().splitlines()]
    looks = [line[SHARPER] - line[HELD_OUT] for line in lines if SHARPER in line]
    assert looks[0] < 0 < looks[-1]  # at first the likeliest is what the base model likes
    own = texts(last[1].parts.sharpening.own, last[1])
    assert last[0].parts.sharpening is None and len(own) > 8
    assert min(last[1].parts.sharpening.own.versions) > 0  # the base model writes anything
    assert sum(" oooo" in text for text in own) > 0.9 * len(own)
    assert shares[0] < 0.8 < 0.95 < shares[1], shares
    assert capsys.readouterr().out.count("own completions, the likeliest ones, are learned from as well") == 1


def test_a_run_with_own_completions_goes_on_exactly(tiny_llama_path, log, tmp_path, monkeypatch):
    whole = run_of(tiny_llama_path, log, tmp_path / "whole")
    whole.train()
    cut = run_of(tiny_llama_path, log, tmp_path / "cut")
    monkeypatch.setattr(
        DQNTrainer, "report", lambda run, _: setattr(run.stop, "requested", 15) if run.step == 93 else None
    )
    with pytest.raises(SystemExit):
        cut.train()
    assert len(cut.parts.sharpening.own) > 0
    monkeypatch.undo()
    monkeypatch.setattr(early_stopping, "LOOK_STEPS", 5)
    again = run_of(tiny_llama_path, log, tmp_path / "cut")
    again.train(resume=True)
    assert len(again.parts.sharpening.own) == len(whole.parts.sharpening.own)
    for part in ("step", "collect_at", "prompts", "samples_drawn", "early_stopping"):
        assert Checkpointed.state(again)[part] == Checkpointed.state(whole)[part], part
    for name, weight in whole.network.checkpoint_state().items():
        assert torch.equal(weight, again.network.checkpoint_state()[name]), name


@pytest.mark.parametrize("why", ["rewards are three", "nothing is held out", "it is not wanted"])
def test_own_completions_are_left_alone_where_nothing_would_tell_whether_they_are_good(
    tiny_llama_path, log, tmp_path, why, capsys
):
    options = {"nothing is held out": {"held_out_share": 0.0}, "it is not wanted": {"sharpened": 0}}.get(why, {})
    if why == "rewards are three":
        facts = [json.loads(line) for line in log.read_text().splitlines()]
        log.write_text("".join(json.dumps({**fact, "reward": place % 3}) + "\n" for place, fact in enumerate(facts)))
    run = run_of(tiny_llama_path, log, tmp_path / "run", steps=16, **options)
    run.train()
    assert run.parts.sharpening is None or len(run.parts.sharpening.own) == 0
    assert "own completions" not in capsys.readouterr().out
