"""`llm-dqn check`: everything that can be found wrong with a run before it is started, all at once.

Each part is tried by the code that a run uses; what fails becomes a line that names the recipe's key. When all parts
are there, one rollout and one update are run on the real model. Without `run_code`, nothing that comes with the recipe
is run: no reward is imported, no code of a model is run, no pickled weights are opened.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_dqn import data, models
from llm_dqn.adapters import lora_config
from llm_dqn.assembly import Inputs, base_model_of, settings_of
from llm_dqn.errors import NotReachable, RunError, UserError
from llm_dqn.inputs import load_prompts, reason
from llm_dqn.prompt_sources import data_sources, held_out, source_of_test
from llm_dqn.recipe import Problem, Recipe, mislaid, with_resolved_paths
from llm_dqn.reward_functions import code_behind
from llm_dqn.rewards import RewardError, RewardFunction, Rewards, load_reward
from llm_dqn.rollout import verify_generator
from llm_dqn.shipped import similar_nearby
from llm_dqn.tables import Table, read_table
from llm_dqn.trainer import DQNTrainer
from llm_dqn.types import Prompt
from llm_dqn.vllm_launch import check_engine

T = TypeVar("T")
GIB = 2**30


@dataclass
class Findings:
    """What was found so far: `problems` are the user's to mend, `lines` say what was seen."""

    recipe: Recipe
    problems: list[Problem] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    unreachable: list[str] = field(default_factory=list)  # what a run would download, and cannot be looked at now
    not_run: list[str] = field(default_factory=list)  # code that a run would run

    def attempt(self, key: str, action: Callable[[], T], kind: str = "", source: str | None = None) -> T | None:
        """The result of `action`; None when it failed, which is noted under the recipe's `key`.

        `kind` and `source` say what was to be opened: "model", "data/tiny_lm".
        """
        try:
            return action()
        except RewardError as error:
            self.problem("reward.funcs", str(error))
        except RunError as error:
            self.problem(key, str(error))
        except UserError as error:
            folder = self.recipe.folder
            if source is not None and isinstance(error, NotReachable) and mislaid(source, folder) is None:
                self.unreachable.append(f"{kind} {source}{similar_nearby(source, folder)}")
            else:
                self.problem(key, reason(error, source, folder))
        return None

    def problem(self, key: str, message: str) -> None:
        """Notes a problem at the line where the key was written."""
        self.problems.append(self.recipe.problem(key, message))


def preflight(recipe: Recipe, run_code: bool = True) -> tuple[list[Problem], list[str]]:
    """(problems, lines of information). A recipe with broken required keys may hold None there: those are skipped."""
    found = Findings(recipe)
    resolved = with_resolved_paths(recipe)
    rollout = resolved.rollout
    found.attempt("rollout.engine", partial(check_engine, rollout.engine, rollout.vllm_url))
    brings_code = recipe.model.trust_remote_code or not recipe.model.use_safetensors
    if brings_code and not run_code and recipe.model.model_name_or_path:
        setting = "trust_remote_code: true" if recipe.model.trust_remote_code else "use_safetensors: false"
        found.not_run.append(f"model {recipe.model.model_name_or_path}, because of {setting}")
    tokenizer, model = (None, None) if brings_code and not run_code else _model(found, resolved)
    context = models.context_length(model.config) if model is not None else None
    tables = _tables(found, resolved)
    prompts = None if tokenizer is None else _prompts(found, resolved, tables, tokenizer, context)
    for key, table in tables.items() if tokenizer is None else ():
        found.attempt(key, partial(data.check_prompts, table, resolved.data.prompt_column))
    rewards = _rewards(found, resolved, tables, run_code)
    if tokenizer is not None:
        _logged(found, resolved, tokenizer, context)
    if model is not None:
        _estimate(found, resolved, model)
    whole = model and tokenizer and prompts and rewards and resolved.train.output_dir
    if whole and not found.problems and not found.unreachable and not found.not_run:
        _one_step(found, resolved, model, tokenizer, prompts, rewards)  # type: ignore[arg-type]
    if found.unreachable:
        found.lines.append("a run would download these, and they could not be looked into:")
        found.lines += [f"  {name}" for name in dict.fromkeys(found.unreachable)]
        found.lines.append("everything else was looked at, but for a rollout and an update, which need them all")
    if found.not_run:
        found.lines.append("a run would run this code, and it was not looked into:")
        found.lines += [f"  {name}" for name in found.not_run]
        found.lines.append("no rollout and no update were tried; read the code before you train")
    return found.problems, found.lines


def _model(found: Findings, recipe: Recipe) -> tuple[PreTrainedTokenizerBase | None, PreTrainedModel | None]:
    facts = recipe.model
    name, key = facts.model_name_or_path, "model.model_name_or_path"
    if name is None:
        return None, None
    model = found.attempt(key, partial(base_model_of, recipe), "model", name)
    if model is None:
        return None, None
    load = partial(models.load_tokenizer, name, facts.model_revision, facts.trust_remote_code)
    tokenizer = found.attempt(key, load, "tokenizer", name)
    if found.attempt(key, partial(_verified, model)) is None:
        return tokenizer, None
    if tokenizer is not None:
        found.attempt(key, partial(models.num_valid_tokens, model, tokenizer))
    return tokenizer, model


def _verified(model: PreTrainedModel) -> bool:
    models.verify_head_shortcut(model)
    return True


def _tables(found: Findings, recipe: Recipe) -> dict[str, Table]:
    """Recipe key -> rows, of the prompts to train on, of those that are held out and of the test prompts."""
    tables = {}
    for key, (source, split) in (data_sources(recipe) | source_of_test(recipe)).items():
        if source is None:
            continue
        table = found.attempt(key, partial(read_table, source, split), "data", source)
        if table is None:
            continue
        at_fault = "data.prompt_column" if found.recipe.writes("data.prompt_column") else key
        checked = found.attempt(at_fault, partial(_with_column, table, recipe.data.prompt_column))
        if checked is not None:
            tables[key] = checked
    return tables


def _with_column(table: Table, column: str) -> Table:
    table.require(column, "data.prompt_column")
    return table


def _prompts(
    found: Findings,
    recipe: Recipe,
    tables: dict[str, Table],
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
) -> tuple[list[Prompt], list[Prompt]] | None:
    facts = recipe.data
    within = partial(data.room_for_prompt, context, recipe.rollout.max_completion_length)
    room = found.attempt("rollout.max_completion_length", within)
    loaded: list[list[Prompt]] = []
    for key, table in tables.items():
        prompts = found.attempt(key, partial(load_prompts, recipe, table, tokenizer, room))
        if prompts is not None:
            longest = max(len(prompt.ids) for prompt in prompts)
            found.lines.append(f"{key}: {len(prompts)} prompts, the longest has {longest} tokens")
            loaded += [prompts] if key in data_sources(recipe) else []
    if len(loaded) == 2:
        return loaded[0], loaded[1]
    only_train = not (facts.eval or facts.eval_split)
    return held_out(loaded[0], recipe.train.seed) if loaded and only_train else None


def _rewards(found: Findings, recipe: Recipe, tables: dict[str, Table], run_code: bool) -> Rewards | None:
    facts = recipe.reward
    if facts.funcs is None:
        return None
    folders = [Path.cwd(), *([recipe.folder] if recipe.folder else [])]
    functions: list[RewardFunction] = []
    for spec in facts.funcs:
        if not run_code:
            seen = len(found.problems)
            code = found.attempt("reward.funcs", partial(code_behind, spec, folders), "reward", spec)
            if code is not None:
                found.not_run.append(f"reward {code}")
            if code is not None or len(found.problems) > seen:
                continue
        function = found.attempt("reward.funcs", partial(load_reward, spec, folders), "reward", spec)
        if function is not None:
            functions.append(function)
    if len(functions) < len(facts.funcs):
        return None
    build = partial(Rewards, functions, facts.weights, facts.on_error, facts.timeout)
    rewards = found.attempt("reward.timeout" if facts.timeout else "reward", build)
    for table in tables.values() if rewards is not None else ():
        columns = table.columns_beside(recipe.data.prompt_column)
        found.attempt("reward.funcs", partial(rewards.check_columns, columns, table.name))  # type: ignore[union-attr]
    return rewards


def _logged(found: Findings, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, context: int | None) -> None:
    path = recipe.replay.warm_start
    if path is not None:
        load = partial(data.load_logged, path, tokenizer, context=context)
        rows = found.attempt("replay.warm_start", load, "log", path)
        if rows is not None:
            found.lines.append(f"replay.warm_start: {len(rows)} logged completions")


def _estimate(found: Findings, recipe: Recipe, model: PreTrainedModel) -> None:
    """Sizes that follow from the settings, and whether the disk takes them."""
    total = sum(parameter.numel() for parameter in model.parameters())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    copies = 1 if recipe.lora is not None else 2 + (recipe.dqn.target == "adapter")
    found.lines.append(
        f"model: {total / 1e6:.1f} M parameters in {model.dtype}, {weights * copies / GIB:.2f} GiB with its "
        f"{'adapters beside it' if copies == 1 else f'{copies - 1} frozen copies'}"
    )
    tokens = recipe.data.max_prompt_length + recipe.rollout.max_completion_length
    replay = recipe.replay.capacity * (4 * tokens + 8 * recipe.rollout.max_completion_length)
    saved = replay + (0 if recipe.lora is not None else 4 * total * 4)  # both networks and AdamW's two moments
    kept = (recipe.train.save_total_limit or 10) + 1
    spilled = replay if recipe.replay.storage == "disk" else 0
    where = " on disk beside its checkpoints" if spilled else ""
    found.lines.append(
        f"replay: at most {replay / GIB:.2f} GiB{where}; on disk: {kept} checkpoints of at most {saved / GIB:.2f} GiB"
    )
    if recipe.train.output_dir is None:
        return
    target = Path(recipe.train.output_dir).absolute()
    there = next(parent for parent in (target, *target.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    needed = kept * saved + spilled
    if free < needed:
        found.problem("train.output_dir", f"{there} has {free / GIB:.1f} GiB free, the run may need {needed / GIB:.1f}")


def _one_step(
    found: Findings,
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: tuple[list[Prompt], list[Prompt]],
    rewards: Rewards,
) -> None:
    """One small rollout and one update on the real model, with their times."""
    args = settings_of(recipe)
    few: dict[str, int | str | None] = {"learning_starts": 1, "warm_start": None, "sharding": "none"}
    few |= {"prompts_per_collect": min(4, args.prompts_per_collect or 4)}
    few |= {"overlap": 0, "collectors": None}  # written here, whoever will write for the run
    args = args.model_copy(update=few | {"per_device_train_batch_size": min(4, args.per_device_train_batch_size)})
    lora = None if recipe.lora is None else lora_config(**dict(recipe.lora))

    def step() -> tuple[float, float, Sequence[float]]:
        with tempfile.TemporaryDirectory() as elsewhere:  # nothing of this is the run's
            here = args.model_copy(update={"output_dir": elsewhere})
            trainer = DQNTrainer.of_inputs(here, Inputs(model, tokenizer, *prompts, rewards, lora))
            verify_generator(trainer.parts.writer, prompts[1])
            started = time.perf_counter()
            trainer.collect()
            collected = time.perf_counter()
            batch = trainer.sample()
            trainer.update([batch])
            return collected - started, time.perf_counter() - collected, trainer.replay.rewards.tolist()

    done = found.attempt("train", step)
    if done is not None:
        rollout, update, values = done
        shown = ", ".join(f"{value:.3g}" for value in values[:4])
        found.lines.append(f"one rollout of {len(values)} completions took {rollout:.1f} s, rewards {shown}")
        found.lines.append(f"one update of {args.per_device_train_batch_size} episodes took {update:.1f} s")
