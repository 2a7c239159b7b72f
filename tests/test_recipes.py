"""Every recipe that ships can be read, and says what it promises."""

from pathlib import Path

import pytest

from llm_dqn.recipe import load_recipe, resolve_path, shipped_recipes, shipped_root, with_resolved_paths
from llm_dqn.rewards import load_reward
from recipes.rewards.gsm8k import correct_answer
from recipes.rewards.hello_world import characters

RECIPES = shipped_recipes()


def test_the_promised_recipes_are_there() -> None:
    assert {"quickstart", "hello_world", "textbook", "gpt2_imdb", "qwen_gsm8k"} <= set(RECIPES)


@pytest.mark.parametrize("path", sorted((shipped_root() / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid_and_tells_how_to_start_it(path: Path) -> None:
    load_recipe(path)
    purpose, *head = path.read_text().splitlines()
    assert purpose.startswith("# ") and len(purpose) < 110
    assert any(f"llm-dqn train {path.stem}" in line for line in head), "the command that starts it"
    assert any("key" in line or "=" in line for line in head), "how one key is changed"


@pytest.mark.parametrize("name", RECIPES)
def test_run_folders_of_shipped_recipes_do_not_collide(name: str) -> None:
    assert load_recipe(name).train.output_dir == f"runs/{name}"


@pytest.mark.parametrize("name", ["quickstart", "hello_world", "textbook"])
def test_what_works_offline_finds_all_its_files_from_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = with_resolved_paths(load_recipe(name))
    named = [recipe.model.model_name_or_path, recipe.data.train, recipe.data.eval, *recipe.reward.funcs]
    for value in filter(None, named):
        assert Path(value.partition(".py:")[0] + ".py" if ".py:" in value else value).exists(), value


def test_the_textbook_recipe_turns_every_switch_of_the_quickstart() -> None:
    quickstart, textbook = load_recipe("quickstart"), load_recipe("textbook")
    assert textbook.data == quickstart.data and textbook.reward == quickstart.reward
    dqn = textbook.dqn
    assert (dqn.q_head, dqn.prior, dqn.backup, dqn.n_step, dqn.loss, dqn.target) == (
        "linear",
        "uniform",
        "max",
        1,
        "huber",
        "head",
    )
    assert (textbook.rollout.explore, dqn.advantage_weight, textbook.replay.success_share) == ("uniform", 0, 0)


@pytest.mark.parametrize(
    "spec", ["recipes/rewards/hello_world.py:characters", "recipes/rewards/gsm8k.py:correct_answer"]
)
def test_a_reward_file_of_a_recipe_is_found_from_anywhere(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_reward(resolve_path(spec)).name == spec.partition(":")[2]


def test_a_point_for_each_right_character_at_its_place() -> None:
    completions = ["你好世界", "世界你好", "你们世界", "", "你好世界！"]
    assert characters(prompts=["问候："] * 5, completions=completions) == [4, 0, 3, 0, 4]


def test_the_last_number_is_the_answer() -> None:
    completions = [
        "3 + 4, so 1,234.50 in all",
        "It is $5.",
        "I cannot say",
        [{"role": "assistant", "content": "9-3 = 6"}],
    ]
    solutions = ["long\n#### 1234.5", "#### 6", "#### 1", "#### 6"]
    assert correct_answer(completions=completions, answer=solutions, question=["?"] * 4) == [1, 0, 0, 1]
