"""The loop end to end on a tiny model: what it is given in Python, what it leaves behind, that it goes on exactly."""

import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from llm_dqn import DQNConfig, DQNTrainer
from llm_dqn.errors import RunError, UserError
from llm_dqn.losses import agreeing
from llm_dqn.policy import SHARP, sampled
from llm_dqn.recipe import load_recipe
from llm_dqn.reward_kinds import FEW_NATS
from llm_dqn.rollout import rollout
from tests.networks import lora

WORDS = ("the film was", "i hated", "what a lovely", "a dull", "User: hello", "the plot and", "two friends", "3 of 10")
ROWS = [{"prompt": f"{word} {number}", "wanted": "e"} for number in range(4) for word in WORDS]
SMALL = {
    "max_steps": 6,
    "max_completion_length": 6,
    "prompts_per_collect": 8,
    "learning_starts": 8,
    "updates_per_collect": 2,
    "per_device_train_batch_size": 8,
    "capacity": 64,
    "target_sync_steps": 2,
    "logging_steps": 2,
    "eval_steps": 3,
    "save_steps": 3,
    "eval_prompts": 4,
    "final_eval_prompts": 4,
    "learning_rate": 1e-2,
}


def letters(prompts, completions, wanted, **columns):
    """Share of wanted letters; a reward with an extra column, as TRL's are."""
    return [text.count(letter) / max(len(text), 1) for text, letter in zip(completions, wanted, strict=True)]


def trainer(path: str, folder: Path, reward=letters, peft_config="lora", dataset=None, **options) -> DQNTrainer:
    config = lora() if peft_config == "lora" else peft_config
    args = DQNConfig(output_dir=str(folder), **(SMALL | options))
    return DQNTrainer(path, reward, args, dataset or Dataset.from_list(ROWS), peft_config=config)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_from_python_leaves_what_the_contract_says(tiny_llama_path, tmp_path):
    report = trainer(tiny_llama_path, tmp_path / "run").train()
    run = tmp_path / "run"
    names = {path.relative_to(run).as_posix() for path in run.rglob("*")}
    assert names >= {
        "recipe.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "evaluation.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/q_head.safetensors",
        "adapter/tokenizer.json",
        "adapter/README.md",
        "checkpoints/step-000006/manifest.json",
    }
    assert json.loads((run / "evaluation.json").read_text()) == report
    for side in ("base", "tuned"):
        keys = {"reward", "reward_ci", "reward_greedy", "kl", "perplexity", "length", "distinct_2"}
        assert keys <= report[side].keys() and len(report[side]["reward_ci"]) == 2
    assert 0 <= report["win_rate"] <= 1
    lines = metrics(run)
    assert [line["step"] for line in lines] == [2, 4, 6]
    expected = {
        "step", "scored_completions", "seconds", "rollout/reward", "rollout/length", "rollout/epsilon", "train/td_loss",
        "train/q_taken", "train/td_target", "train/kl", "train/grad_norm", "replay/episodes", "tokens_per_second",
    }  # fmt: skip
    assert expected <= lines[0].keys()
    assert {"eval/reward", "eval/reward_greedy"} <= lines[1].keys()  # step 3 lies in the second line
    assert lines[-1]["scored_completions"] == 24 and lines[-1]["replay/episodes"] == 24
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    assert {"step", "prompt", "completion", "reward"} <= sample.keys()
    recipe = load_recipe(run / "recipe.yaml")
    assert recipe.train.max_steps == 6 and recipe.lora is not None and recipe.lora.r == 4
    card = (run / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card and "More Information Needed" not in card and "reward, sampled" in card


def test_what_passed_for_grades_while_nothing_was_right_is_learned_from_as_right_and_wrong(tiny_llama_path, tmp_path):
    calls: list[int] = []

    def reward(completions, **columns):
        """A bonus at first; then every third completion is right as well."""
        calls.append(len(completions))
        bonus = [zlib.crc32(text.encode()) % 10_000 / 1e6 for text in completions]
        return [one + (len(calls) > 1 and number % 3 == 0) for number, one in enumerate(bonus)]

    options = {"eval_steps": 0, "max_completion_length": 12, "updates_per_collect": 2, "imagined": 0}
    run = trainer(tiny_llama_path, tmp_path, reward, max_steps=2, **options)
    run.train()
    assert run.replay.graded and run.sharp is None and (run.td_target(run.sample()).weights < 0).any()
    again = trainer(tiny_llama_path, tmp_path, reward, max_steps=4, **options)
    again.train(resume=True)
    assert not again.replay.graded and again.sharp == SHARP and len(again.replay.kinds.values) > 8
    assert not (again.td_target(again.sample()).weights < 0).any()


def test_where_parts_of_an_answer_are_counted_the_best_is_imitated_and_a_cut_run_remembers(tiny_llama_path, tmp_path):
    def reward(completions, **columns):
        return [zlib.crc32(text.encode()) % 6 / 5 for text in completions]

    options = {"max_steps": 2, "eval_steps": 0, "max_completion_length": 12, "imagined": 0}
    run = trainer(tiny_llama_path, tmp_path, reward, **options)
    run.train()
    assert run.replay.holds_to_the_best
    target, rewards = run.td_target(batch := run.sample()), batch.rewards.sum(1)
    imitated = (target.weights > 0).any(1)
    clearly = target.advantages[:, 0] >= 0.5 * run.replay.rewards.std()
    assert not imitated[(rewards < run.replay.kinds.best(0.25)) & ~clearly].any() and imitated.any()
    again = trainer(tiny_llama_path, tmp_path, reward, **options)
    again.train(resume=True)
    assert again.replay.holds_to_the_best


@pytest.mark.parametrize(("kinds", "graded"), [(2, False), (10_000, True)])
def test_grades_are_told_from_right_or_wrong_and_learned_from_in_both_directions(
    tiny_llama_path, tmp_path, kinds, graded
):
    def reward(completions, **columns):
        return [zlib.crc32(text.encode()) % kinds / kinds for text in completions]

    options = {"max_steps": 2, "eval_steps": 0, "max_completion_length": 12}
    run = trainer(tiny_llama_path, tmp_path, reward, **options)
    run.train()
    assert run.replay.graded is graded
    batch = run.sample()
    target = run.td_target(batch)
    assert (target.weights < 0).any().item() is graded and (target.advantages < 0).any()
    learned_from = agreeing(target.advantages) if graded else target.advantages
    assert torch.equal(target.weights.clamp(min=0), learned_from.clamp(min=0))
    if graded:
        lowered = learned_from.clamp(max=0) * (1 - batch.behaviour_logprobs.exp())
        share = target.weights.clamp(max=0).sum() / lowered.sum()
        assert 0 < share <= 1 + 1e-5
        torch.testing.assert_close(target.weights.clamp(max=0), lowered * share)
    again = trainer(tiny_llama_path, tmp_path, reward, **options)
    again.train(resume=True)
    assert again.step == 2 and again.replay.graded is graded
    for given, weight in ((0.0, False), (1.0, True)):
        fixed = trainer(tiny_llama_path, tmp_path / str(given), reward, negative_weight=given, **options)
        fixed.train()
        assert (fixed.td_target(fixed.sample()).weights < 0).any().item() is weight
    fading = trainer(tiny_llama_path, tmp_path / "fading", reward, negative_weight=1.0, negative_half_life=128.0)
    fading.step = 256
    assert fading.negative_weight == 0.25


def test_of_graded_answers_that_can_be_written_in_few_ways_the_best_are_imitated(
    tiny_llama_path, tmp_path, monkeypatch, capsys
):
    def reward(completions, **columns):
        return [zlib.crc32(text.encode()) / 2**32 for text in completions]

    options = {"max_steps": 2, "eval_steps": 0, "max_completion_length": 3, "imagined": 0}
    run = trainer(tiny_llama_path, tmp_path / "many", reward, **options)
    run.train()
    written = run.replay.batch(np.arange(len(run.replay))).behaviour_logprobs.sum(1)
    nats = run.nats_of_a_completion()
    assert nats == pytest.approx(-float(written.mean()), rel=1e-5) and nats > FEW_NATS
    assert run.replay.graded and not run.replay.holds_to_the_best
    monkeypatch.setattr("llm_dqn.rewards_seen.FEW_NATS", nats + 1)
    short = trainer(tiny_llama_path, tmp_path / "few", reward, **options)
    short.train()
    assert short.replay.holds_to_the_best and not short.replay.graded
    assert not (short.td_target(short.sample()).weights < 0).any()
    assert "grades of short answers: only the best completions are imitated" in capsys.readouterr().out


def test_the_budget_of_reward_calls_is_kept(tiny_llama_path, tmp_path):
    seen = []

    def counting(prompts, completions, **columns):
        seen.append(len(completions))
        return [float(len(text)) for text in completions]

    options = {"max_scored_completions": 20, "max_steps": 1000, "eval_steps": 0, "updates_per_collect": 2}
    run = trainer(tiny_llama_path, tmp_path, counting, **options)
    run.train()
    assert run.scored_completions == 20 and seen[:3] == [8, 8, 4]
    assert run.step == 6  # every collect was learned from


@pytest.mark.parametrize(
    "switches",
    [
        {"q_head": "linear", "prior": "uniform", "backup": "max", "n_step": 1, "loss": "huber", "target": "head",
         "explore": "uniform", "advantage_weight": 0.0, "success_share": 0.0},
        {"q_head": "linear", "backup": "max", "double": True, "support_top_k": 8, "temperature": 0.0},
        {"q_head": "linear", "backup": "soft", "n_step": 3, "corrected": False},
        {"q_head": "linear", "expectile": 0.7, "cql_weight": 0.1, "advantage_weight": 0.0},
        {"q_head": "lm", "backup": "max", "double": True, "support_top_k": 8, "lam": 0.5},
        {"q_head": "lm", "n_step": 1, "target_tau": 0.1, "target_sync_steps": 1, "truncated": "bootstrap"},
        {"prioritized": True, "success_share": 0.0, "gamma": 0.9, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True, "bf16": True, "num_generations": 4, "prompts_per_collect": 2},
        {"lr_scheduler_type": "cosine", "weight_decay": 0.1, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
    ],
    ids=lambda switches: "-".join(map(str, switches.values()))[:40],
)  # fmt: skip
def test_every_switch_of_the_textbook_runs(tiny_llama_path, tmp_path, switches):
    report = trainer(tiny_llama_path, tmp_path, **({"eval_steps": 0} | switches)).train()
    assert all(line["train/td_loss"] is not None for line in metrics(tmp_path))
    assert report["tuned"]["reward"] == pytest.approx(report["tuned"]["reward"])  # finite


def test_full_fine_tuning_and_lora_dropout(tiny_llama_path, tmp_path):
    trainer(tiny_llama_path, tmp_path / "full", peft_config=None, learning_rate=1e-3).train()
    assert (tmp_path / "full" / "model" / "config.json").is_file()
    dropping = LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer(tiny_llama_path, tmp_path / "drop", peft_config=dropping).train()


def test_conversations_and_async_rewards(tiny_chat_path, tmp_path):
    seen = {}

    async def asked(prompts, completions, **columns):
        seen["prompt"], seen["completion"] = prompts[0], completions[0]
        return [float(len(completion[0]["content"])) for completion in completions]

    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    trainer(tiny_chat_path, tmp_path, asked, dataset=Dataset.from_list(rows), max_steps=2).train()
    assert seen["prompt"][0]["role"] == "user" and seen["completion"][0]["role"] == "assistant"


def test_abstaining_rewards_leave_episodes_out_and_all_of_them_end_the_run(tiny_llama_path, tmp_path):
    def half(prompts, completions, **columns):
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    run = trainer(tiny_llama_path, tmp_path / "half", half, learning_starts=4, eval_steps=0, save_steps=0)
    run.train()
    assert len(run.replay) == 12 and run.scored_completions == 24
    nothing = trainer(tiny_llama_path, tmp_path / "none", lambda prompts, **_: [None] * len(prompts))
    with pytest.raises(RunError, match="80 completions scored, no reward among them"):
        nothing.train()


def test_logged_completions_alone_can_be_learned_from(tiny_llama_path, tmp_path):
    log = tmp_path / "log.jsonl"
    rows = [
        {"prompt": row["prompt"], "completion": " eee" if i % 2 else " xyz", "reward": i % 2}
        for i, row in enumerate(ROWS)
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = trainer(tiny_llama_path, tmp_path / "run", warm_start=str(log), max_scored_completions=0, max_steps=4)
    run.train()
    assert run.scored_completions == 0 and len(run.replay) == len(ROWS)


def test_mistakes_are_named_before_anything_is_loaded_for_long(tiny_llama_path, tmp_path):
    with pytest.raises(ValueError, match=r"learning_rat.*did you mean learning_rate"):
        DQNConfig(output_dir=str(tmp_path), learning_rat=1)
    with pytest.raises(UserError, match="wanted"):
        trainer(tiny_llama_path, tmp_path, dataset=Dataset.from_list([{"prompt": "x"}] * 8))
    with pytest.raises(UserError, match="processing_class"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tiny_llama_path)
        DQNTrainer(model, letters, DQNConfig(output_dir=str(tmp_path)), Dataset.from_list(ROWS))


def test_a_damaged_checkpoint_is_passed_over(tiny_llama_path, tmp_path, capsys):
    trainer(tiny_llama_path, tmp_path).train()
    newest = tmp_path / "checkpoints" / "step-000006" / "network.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(bytes(data))
    again = trainer(tiny_llama_path, tmp_path, max_steps=7)
    again.begin(resume=True)
    assert again.step == 3
    assert "network.safetensors does not match its checksum" in capsys.readouterr().out


def test_a_new_run_moves_an_earlier_one_aside(tiny_llama_path, tmp_path):
    for _ in range(2):
        trainer(tiny_llama_path, tmp_path / "run", max_steps=2, eval_steps=0).train()
    assert (tmp_path / "run.earlier-1" / "evaluation.json").is_file()
    assert len(metrics(tmp_path / "run")) == 1


def test_advantages_praise_what_did_better_than_expected(tiny_llama_path, tmp_path):
    """The sign that everything hangs on: success lifts, failure does not, and updates move log pi accordingly."""
    run = trainer(tiny_llama_path, tmp_path, success_share=0.0, per_device_train_batch_size=2, learning_rate=5e-3)
    prompts = run.parts.stream.prompts[:2]
    written = rollout(run.parts.writer, prompts, sampled(), seed=0)
    good, bad = replace(written[0], reward=1.0), replace(written[1], reward=0.0)
    run.replay.add([good, bad])
    run.network.start_values_at(0.5)
    batch = run.replay.batch(np.array([0, 1]))
    target = run.td_target(batch)
    mask = batch.action_mask
    assert (target.advantages[0][mask[0]] > 0).all() and (target.advantages[1][mask[1]] < 0).all()
    assert target.returns[0, mask[0].sum() - 1].item() == pytest.approx(1.0)
    before = run.network.logprobs(batch.tokens, "online").sum(1)
    for _ in range(5):
        run.update([batch])
    after = run.network.logprobs(batch.tokens, "online").sum(1)
    assert after[0] > before[0] + 0.1 and after[1] < before[1]


def test_hello_world_is_learned(tmp_path):
    """The shipped toy from start to end: what was hardly ever written becomes the greedy completion."""
    recipe = load_recipe("hello_world", [f"train.output_dir={tmp_path}", "train.eval_steps=0", "train.save_steps=0"])
    run = DQNTrainer.from_recipe(recipe)
    report = run.train()
    assert report["base"]["reward"] < 1.5 and report["base"]["reward_greedy"] < 3
    assert report["tuned"]["reward_greedy"] > 3.5 and report["tuned"]["reward"] > 2.5
    last = metrics(tmp_path)[-1]
    assert last["train/q_taken"] == pytest.approx(last["rollout/reward"], abs=0.7)


@pytest.mark.parametrize(("every", "equal"), [(3, True), (100, False)])
def test_the_target_is_synced_every_so_many_steps_and_only_then(tiny_llama_path, tmp_path, every, equal):
    run = trainer(tiny_llama_path, tmp_path, max_steps=3, target_sync_steps=every, eval_steps=0, save_steps=0)
    run.train()
    state = run.network.checkpoint_state()
    twins = [(key, key.replace("online.", "target.", 1)) for key in state if key.startswith("online.")]
    twins += [(key, "target_" + key) for key in state if key.startswith("heads.")]
    assert twins and all(torch.equal(state[online], state[target]) for online, target in twins) == equal
