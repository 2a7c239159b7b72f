"""At which prompts the policy acts sharply, and at which not the next time; resumed runs know them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from llm_dqn import DQNConfig, DQNTrainer, intake
from llm_dqn.attempts import Attempts, of_prompt
from llm_dqn.policy import MILD, SHARP
from llm_dqn.types import Episode, Prompt
from tests.networks import episode, lora

ROWS = [{"prompt": f"{word} {number}"} for number in range(6) for word in ("the film", "two friends")]


def right(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """1 for a completion with many vowels: about half of them."""
    return [float(sum(letter in "aeiou" for letter in text) > len(text) // 4) for text in completions]


def run_of(path: str, folder: Path, steps: int, judge=right, **options: object) -> DQNTrainer:
    settings = {
        "prompts_per_collect": len(ROWS),
        "learning_starts": len(ROWS),
        "updates_per_collect": 2,
        "max_completion_length": 8,
        "per_device_train_batch_size": 4,
        "target_kl": None,
        "imagined": 0,
        "cache": False,
        "eval_steps": 0,
        "save_steps": 3,
        "final_eval_prompts": 2,
        "learning_rate": 1e-2,
    }
    args = DQNConfig(output_dir=str(folder), max_steps=steps, **(settings | options))
    return DQNTrainer(path, judge, args, Dataset.from_list(ROWS), eval_dataset=ROWS[:2], peft_config=lora())


def test_the_newest_sharp_attempt_at_a_prompt_counts():
    first, second = (Prompt(text, text, ids) for text, ids in (("a", [1, 2]), ("b", [1, 2, 3])))
    attempts = Attempts()
    assert attempts.temperatures([first, second], 0.3) == [0.3, 0.3]
    attempts.learn([(of_prompt([1, 2]), True), (of_prompt([1, 2, 3]), False)])
    assert attempts.temperatures([first, second], 0.3) == [1.0, 0.3]
    attempts.learn([(of_prompt([1, 2]), False)])
    assert attempts.temperatures([first], 0.3) == [0.3]


def test_one_success_among_several_completions_of_a_prompt_is_enough():
    outcomes = (1, 0), (1, 1), (1, 0), (2, 0)
    made = Attempts.at([episode([prompt], [2], reward) for prompt, reward in outcomes], least=0.5)
    assert made == [(of_prompt([1]), False), (of_prompt([2]), True)]


def test_in_turn_a_prompt_is_written_to_sharply_and_not():
    attempts = Attempts()
    attempts.learn(attempts.in_turn([episode([1], [2]), episode([1], [2]), episode([2], [2])]))
    assert attempts.failed == {of_prompt([1]), of_prompt([2])}
    attempts.learn(attempts.in_turn([episode([1], [2]), episode([3], [2])]))
    assert attempts.failed == {of_prompt([2]), of_prompt([3])}


@pytest.fixture
def written(monkeypatch) -> list[tuple[int, float, str]]:
    """(step, temperature, prompt) of every completion that is collected."""
    found: list[tuple[int, float, str]] = []
    real = intake.rollout

    def spied(writer, prompts, policy, **options):
        found.extend((options.get("policy_version", 0), policy.temperature, prompt.text) for prompt in prompts)
        return real(writer, prompts, policy, **options)

    monkeypatch.setattr(intake, "rollout", spied)
    return found


def test_where_acting_sharply_failed_it_is_given_up_until_that_prompt_succeeds(tiny_llama_path, tmp_path, written):
    run = run_of(tiny_llama_path, tmp_path / "run", steps=8)
    outcomes: list[dict[str, float]] = []
    score = run.score

    def noted(episodes: list[Episode]) -> list[Episode]:
        scored = score(episodes)
        outcomes.append({episode.prompt: episode.reward for episode in scored})
        return scored

    run.score = noted
    run.train()
    steps = sorted({step for step, *_ in written})
    assert steps == [0, 2, 4, 6] and len(outcomes) == 4
    by_step = {step: {text: temperature for at, temperature, text in written if at == step} for step in steps}
    failed: set[str] = set()
    seen: set[float] = set()
    for number, step in enumerate(steps):
        expected = {row["prompt"]: 1.0 if step == 0 or row["prompt"] in failed else SHARP for row in ROWS}
        assert by_step[step] == expected
        if step > 0:
            failed = {text for text, reward in outcomes[number].items() if reward == 0}
            seen |= set(expected.values())
    assert seen == {1.0, SHARP}  # both were there to be told apart


def counted(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Minus the vowels more or fewer than three."""
    return [-float(abs(sum(letter in "aeiou" for letter in text) - 3)) for text in completions]


def test_where_rewards_are_counted_a_prompt_is_written_to_mildly_every_other_time(tiny_llama_path, tmp_path, written):
    run = run_of(tiny_llama_path, tmp_path / "run", steps=8, judge=counted)
    run.train()
    steps = sorted({step for step, *_ in written})
    temperatures = [{temperature for at, temperature, _ in written if at == step} for step in steps]
    assert run.replay.kinds.repeat and not run.replay.kinds.right_or_wrong
    assert temperatures == [{1.0}, {MILD}, {1.0}, {MILD}]  # each collection has every prompt once
    assert len(run.attempts.failed) == len(ROWS)


def test_where_right_or_wrong_is_imagined_too_success_is_no_reason_to_stay_sharp(tiny_llama_path, tmp_path):
    run = run_of(tiny_llama_path, tmp_path / "run", steps=4)
    run.train()
    assert run.sharp == SHARP
    found = run.rollout()[:4]
    succeeded = [replace(episode, reward=1.0) for episode in found]
    run.attempts.failed.clear()
    run.learn_from_attempts(succeeded, sharp=True)
    assert not run.attempts.failed
    run.replay.add([replace(episode, reward=0.4, source="imagined") for episode in found])
    run.learn_from_attempts(succeeded, sharp=True)
    assert run.sharp == SHARP and run.attempts.failed == {of_prompt(one.prompt_ids.tolist()) for one in succeeded}


def test_nothing_is_sharp_while_all_rewards_are_the_same_or_the_temperature_is_given(
    tiny_llama_path, tmp_path, written
):
    run = run_of(tiny_llama_path, tmp_path / "same", steps=4, judge=lambda completions, **_: [0.0] * len(completions))
    run.train()
    assert {temperature for _, temperature, _ in written} == {1.0} and not run.attempts.failed
    written.clear()
    run_of(tiny_llama_path, tmp_path / "given", steps=4, temperature=0.7).train()
    assert {temperature for _, temperature, _ in written} == {0.7}


def test_a_run_that_is_cut_goes_on_with_what_it_knew(tiny_llama_path, tmp_path):
    whole = run_of(tiny_llama_path, tmp_path / "whole", steps=10)
    whole.train()
    run_of(tiny_llama_path, tmp_path / "cut", steps=5).train()
    again = run_of(tiny_llama_path, tmp_path / "cut", steps=10)
    again.train(resume=True)
    assert again.attempts.failed == whole.attempts.failed and whole.attempts.failed
    for name, weight in whole.network.checkpoint_state().items():
        assert torch.equal(weight, again.network.checkpoint_state()[name]), name
