"""Which prompts a recipe names: to train on, to look at meanwhile, and to test on."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from llm_dqn import data
from llm_dqn.errors import UserError
from llm_dqn.recipe import Recipe
from llm_dqn.types import Prompt

HELD_OUT = 64  # prompts kept from training when no evaluation prompts are given


def data_sources(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """Recipe key -> (source, split) of the prompts to train on and of those that are held out."""
    facts = recipe.data
    held_back = _beside_train(recipe, "eval", facts.eval, facts.eval_split)
    return {"data.train": (facts.train, facts.split), **held_back}


def source_of_test(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """The same of the test prompts, which no run looks at; empty where the recipe names none."""
    return _beside_train(recipe, "test", recipe.data.test, recipe.data.test_split)


def _beside_train(recipe: Recipe, name: str, source: str | None, split: str | None) -> dict[str, tuple[str, str]]:
    facts = recipe.data
    if source:
        same = "train" if Path(source).is_file() else facts.split  # a single file has no other
        return {f"data.{name}": (source, split or same)}
    return {f"data.{name}_split": (facts.train, split)} if split else {}


def prompts_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Prompt], list[Prompt]]:
    """(training prompts, held-out prompts) of a recipe."""
    loaded = [_load_prompts(recipe, source, split, tokenizer) for source, split in data_sources(recipe).values()]
    return (loaded[0], loaded[1]) if len(loaded) == 2 else held_out(loaded[0], recipe.train.seed)


def prompts_of_test_split(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The test prompts of a recipe, which no run looks at. Raises UserError where it names none."""
    for source, split in source_of_test(recipe).values():
        return _load_prompts(recipe, source, split, tokenizer)
    raise UserError("the recipe names no test prompts (data.test and data.test_split are null); give --prompts FILE")


def _load_prompts(recipe: Recipe, source: str, split: str, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    facts = recipe.data
    return data.load_prompts(
        source,
        split=split,
        prompt_column=facts.prompt_column,
        tokenizer=tokenizer,
        max_prompt_length=facts.max_prompt_length,
        too_long=facts.too_long,
    )


def held_out(prompts: list[Prompt], seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Keeps a fifth of the prompts, 64 at most, from training; too few prompts serve as both."""
    count = min(HELD_OUT, len({prompt.text for prompt in prompts}) // 5)
    return data.hold_out(prompts, count, seed) if count else (prompts, prompts)
