"""What a run is about, opened and checked before any long work, in the order of what it costs: weights come last."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from llm_dqn import data, models
from llm_dqn.adapters import LoraConfig, lora_config
from llm_dqn.assembly import Inputs, base_model_of, logged_rows, rewards_of, settings_of
from llm_dqn.errors import UserError
from llm_dqn.prompt_sources import data_sources, held_out
from llm_dqn.recipe import DQNConfig, Recipe, RecipeError, mislaid, resolve_path, with_resolved_paths
from llm_dqn.rewards import Rewards, load_reward
from llm_dqn.shipped import similar_nearby
from llm_dqn.tables import Table, read_table
from llm_dqn.vllm_launch import check_engine


def inputs_of(typed: Recipe) -> tuple[DQNConfig, Inputs]:
    """Loads what a recipe names. Raises RecipeError, with the line, for the first thing that cannot be used."""
    recipe = with_resolved_paths(typed)
    args, facts = settings_of(recipe), recipe.model
    with blamed(typed, "rollout.engine"):
        check_engine(args.engine, args.vllm_url)
    said = {key: source for key, (source, _) in data_sources(typed).items()}
    where = (facts.model_name_or_path, facts.model_revision, facts.trust_remote_code)
    with blamed(typed, "model.model_name_or_path", typed.model.model_name_or_path):
        config = models.load_config(*where, facts.use_safetensors)
        tokenizer = models.load_tokenizer(*where)
        models.check_vocabulary(config, tokenizer)
    with blamed(typed, "rollout.max_completion_length"):
        room = data.room_for_prompt(models.context_length(config), args.max_completion_length)
    tables = {}
    for key, (source, split) in data_sources(recipe).items():
        with blamed(typed, key, said[key]):
            tables[key] = table_of(recipe, source, split)
    with blamed(typed, "reward.funcs"):
        for name in typed.reward.funcs:
            if mistyped := mislaid(name, typed.folder):
                raise UserError(mistyped)
        rewards = rewards_of(recipe)
        for table in tables.values():
            rewards.check_columns(table.columns_beside(recipe.data.prompt_column), table.name)
    prompts = []
    for key, table in tables.items():
        with blamed(typed, key, said[key]):
            prompts.append(load_prompts(recipe, table, tokenizer, room))
    train_prompts, eval_prompts = prompts if len(prompts) == 2 else held_out(prompts[0], recipe.train.seed)
    with blamed(typed, "replay.warm_start", typed.replay.warm_start):
        logged = logged_rows(args, tokenizer, models.context_length(config))
    lora = None if recipe.lora is None else lora_config(**dict(recipe.lora))
    with blamed(typed, "model.model_name_or_path"):
        model = base_model_of(recipe)
    return args, Inputs(model, tokenizer, train_prompts, eval_prompts, rewards, lora, logged)


@contextmanager
def blamed(recipe: Recipe, key: str, source: str | None = None) -> Iterator[None]:
    """Says of a UserError inside which line of the recipe it concerns; `source` is what was to be opened, as typed."""
    try:
        yield
    except RecipeError:
        raise
    except UserError as error:
        raise RecipeError([recipe.problem(key, reason(error, source, recipe.folder))]) from error


def reason(error: UserError, source: str | None, folder: Path | None = None) -> str:
    """Why something could not be opened: a path that was mistyped is told as that."""
    if source is None:
        return str(error)
    near = "" if "did you mean" in str(error) else similar_nearby(source, folder)
    return mislaid(source, folder) or f"{error}{near}"


def table_of(recipe: Recipe, source: str, split: str) -> Table:
    """The rows of one of `data_sources`, which have the prompt column."""
    table = read_table(source, split)
    table.require(recipe.data.prompt_column, "data.prompt_column")
    return table


def load_prompts(recipe: Recipe, table: Table, tokenizer: Any, room: int | None) -> list[data.Prompt]:
    """The prompts of a table by the recipe's rules."""
    facts = recipe.data
    return data.load_prompts(
        table,
        prompt_column=facts.prompt_column,
        tokenizer=tokenizer,
        max_prompt_length=facts.max_prompt_length,
        too_long=facts.too_long,
        room=room,
    )


def inputs_from_python(
    model: Any,
    reward_funcs: Any,
    args: DQNConfig,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: Any,
    peft_config: LoraConfig | None,
) -> Inputs:
    """The same from what `DQNTrainer(...)` is given; the words and their meaning are TRL's."""
    if args.overlap:
        raise UserError(
            f"overlap={args.overlap}: collectors are processes of their own, which open model, data and rewards from a "
            "recipe; use DQNTrainer.from_recipe(load_recipe(FILE)) or `llm-dqn train FILE`, or overlap=0"
        )
    check_engine(args.engine, args.vllm_url)
    path = os.fspath(model) if isinstance(model, str | os.PathLike) else None
    if path is not None:
        config = _opened("model", path, models.load_config)
        tokenizer = processing_class or _opened("model", path, models.load_tokenizer)
    elif processing_class is None:
        raise UserError(
            "processing_class: a loaded model needs its tokenizer, got None; pass processing_class=tokenizer"
        )
    else:
        config, tokenizer = model.config, processing_class
    models.ensure_pad_token(tokenizer, "processing_class")
    models.check_vocabulary(config, tokenizer)
    room = data.room_for_prompt(models.context_length(config), args.max_completion_length)
    load = partial(data.load_prompts, tokenizer=tokenizer, room=room)
    prompts = _opened("train_dataset", train_dataset, load)
    kept_apart = _opened("eval_dataset", eval_dataset, load) if eval_dataset is not None else None
    train_prompts, eval_prompts = (prompts, kept_apart) if kept_apart else held_out(prompts, args.seed)
    several = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    functions = [_opened("reward_funcs", spec, load_reward) for spec in several]
    rewards = Rewards(functions, args.weights, args.on_error, args.timeout, args.cache)
    for some in (train_prompts, eval_prompts):
        rewards.check_columns(sorted(some[0].columns))
    logged = logged_rows(args, tokenizer, models.context_length(config))
    loaded = model if path is None else _opened("model", path, models.load_causal_lm)
    return Inputs(loaded, tokenizer, train_prompts, eval_prompts, rewards, peft_config, logged)


def _opened(argument: str, given: Any, load: Any) -> Any:
    """What an argument stands for; names are looked up as those of a recipe are."""
    name = os.fspath(given) if isinstance(given, str | os.PathLike) else None
    try:
        return load(given if name is None else resolve_path(name))
    except UserError as error:
        raise UserError(f"{argument}: {reason(error, name)}") from error
