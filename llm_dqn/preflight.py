"""`llm-dqn check`: everything that can be found wrong with a run before it is started, all at once.

Each part is tried by the code that a run uses; what fails becomes a line that names the recipe's key. When all parts
are there, one rollout and one update are run on the real model.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_dqn import data, models
from llm_dqn.adapters import lora_config
from llm_dqn.assembly import Inputs, base_model_of, prompts_of, settings_of
from llm_dqn.errors import NotReachable, RunError, UserError
from llm_dqn.recipe import Problem, Recipe, with_resolved_paths
from llm_dqn.rewards import RewardFunction, Rewards, load_reward
from llm_dqn.trainer import DQNTrainer
from llm_dqn.types import Prompt

T = TypeVar("T")
GIB = 2**30


@dataclass
class Findings:
    """What was found so far: `problems` are the user's to mend, `lines` say what was seen."""

    recipe: Recipe
    problems: list[Problem] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    unreachable: list[str] = field(default_factory=list)  # what a run would download, and cannot be looked at now

    def attempt(self, key: str, what: str, action: Callable[[], T]) -> T | None:
        """The result of `action`; None when it failed, which is noted under the recipe's `key`."""
        try:
            return action()
        except NotReachable:
            self.unreachable.append(what)
        except (UserError, RunError) as error:
            self.problem(key, str(error))
        return None

    def problem(self, key: str, message: str) -> None:
        """Notes a problem at the line where the key was written."""
        self.problems.append(self.recipe.problem(key, message))


def preflight(recipe: Recipe) -> tuple[list[Problem], list[str]]:
    """(problems, lines of information). A recipe with broken required keys may hold None there: those are skipped."""
    found = Findings(recipe)
    resolved = with_resolved_paths(recipe)
    tokenizer, model = _model(found, resolved)
    prompts = _prompts(found, resolved, tokenizer)
    rewards = _rewards(found, resolved, prompts)
    _logged(found, resolved, tokenizer)
    if model is not None and tokenizer is not None:
        found.attempt("model.model_name_or_path", "", lambda: models.num_valid_tokens(model, tokenizer))
    if model is not None:
        _estimate(found, resolved, model)
    complete = model and tokenizer and prompts and rewards
    if complete and not found.problems and not found.unreachable:
        _one_step(found, resolved, model, tokenizer, prompts, rewards)  # type: ignore[arg-type]
    if found.unreachable:
        found.lines.append("a run would download, and this check could not look into: " + ", ".join(found.unreachable))
    return found.problems, found.lines


def _model(found: Findings, recipe: Recipe) -> tuple[PreTrainedTokenizerBase | None, PreTrainedModel | None]:
    facts = recipe.model
    if facts.model_name_or_path is None:
        return None, None
    name, key = facts.model_name_or_path, "model.model_name_or_path"
    model = found.attempt(key, f"the model {name}", lambda: base_model_of(recipe))
    if model is None:
        return None, None
    tokenizer = found.attempt(
        key,
        f"the tokenizer of {name}",
        lambda: models.load_tokenizer(name, facts.model_revision, facts.trust_remote_code),
    )
    found.attempt(key, "", lambda: models.verify_head_shortcut(model))
    return tokenizer, model


def _prompts(
    found: Findings, recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[list[Prompt], list[Prompt]] | None:
    facts = recipe.data
    if facts.train is None:
        return None
    if tokenizer is None:
        # Without a tokenizer the rows can still be read and their column looked for.
        for key, source in (("data.train", facts.train), ("data.eval", facts.eval)):
            if source is not None:
                found.attempt(key, f"the data {source}", lambda source=source: _readable(source, facts))  # type: ignore[misc]
        return None
    for key, source in (("data.train", facts.train), ("data.eval", facts.eval)):
        if source is None:
            continue
        loaded = found.attempt(key, f"the data {source}", lambda source=source: _loaded(source, facts, tokenizer))  # type: ignore[misc]
        if loaded is not None:
            longest = max(len(prompt.ids) for prompt in loaded)
            found.lines.append(f"{key}: {len(loaded)} prompts, the longest has {longest} tokens")
    if found.problems or found.unreachable:
        return None
    return prompts_of(recipe, tokenizer)


def _readable(source: str, facts: Any) -> None:
    data.read_table(source, facts.split).require(facts.prompt_column, "data.prompt_column")


def _loaded(source: str, facts: Any, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    return data.load_prompts(
        source,
        split=facts.split,
        prompt_column=facts.prompt_column,
        tokenizer=tokenizer,
        max_prompt_length=facts.max_prompt_length,
        too_long=facts.too_long,
    )


def _rewards(found: Findings, recipe: Recipe, prompts: tuple[list[Prompt], list[Prompt]] | None) -> Rewards | None:
    facts = recipe.reward
    if facts.funcs is None:
        return None
    folders = [Path.cwd(), *([recipe.folder] if recipe.folder else [])]
    functions: list[RewardFunction] = []
    for spec in facts.funcs:
        function = found.attempt("reward.funcs", f"the reward {spec}", lambda spec=spec: load_reward(spec, folders))  # type: ignore[misc]
        if function is not None:
            functions.append(function)
    if len(functions) < len(facts.funcs):
        return None
    build = found.attempt("reward", "", lambda: Rewards(functions, facts.weights, facts.on_error, facts.timeout))
    if build is not None and prompts is not None:
        columns = sorted(prompts[0][0].columns)
        found.attempt("reward.funcs", "", lambda: build.check_columns(columns))
    return build


def _logged(found: Findings, recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None) -> None:
    path = recipe.replay.warm_start
    if path is not None and tokenizer is not None:
        rows = found.attempt("replay.warm_start", f"the log {path}", lambda: data.load_logged(path, tokenizer))
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
    kept = (recipe.train.save_total_limit or 10) + 1
    found.lines.append(
        f"replay: at most {replay / GIB:.2f} GiB; checkpoints: at most {kept * replay / GIB:.2f} GiB more"
    )
    target = Path(recipe.train.output_dir).absolute()
    there = next(parent for parent in (target, *target.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < (kept + 1) * replay:
        found.problem(
            "train.output_dir", f"{there} has {free / GIB:.1f} GiB free, the run may need {kept * replay / GIB:.1f}"
        )


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
    few = {"prompts_per_collect": min(4, args.prompts_per_collect), "learning_starts": 1, "warm_start": None}
    args = args.model_copy(update=few | {"per_device_train_batch_size": min(4, args.per_device_train_batch_size)})
    lora = None if recipe.lora is None else lora_config(**dict(recipe.lora))

    def step() -> tuple[float, float, Sequence[float]]:
        with tempfile.TemporaryDirectory() as elsewhere:  # nothing of this is the run's
            here = args.model_copy(update={"output_dir": elsewhere})
            trainer = DQNTrainer.of_inputs(here, Inputs(model, tokenizer, *prompts, rewards, lora))
            started = time.perf_counter()
            trainer.collect()
            collected = time.perf_counter()
            batch = trainer.sample()
            trainer.update([batch], [trainer.td_target(batch)])
            return collected - started, time.perf_counter() - collected, trainer.replay.rewards.tolist()

    done = found.attempt("train", "", step)
    if done is not None:
        rollout, update, values = done
        shown = ", ".join(f"{value:.3g}" for value in values[:4])
        found.lines.append(f"one rollout of {len(values)} completions took {rollout:.1f} s, rewards {shown}")
        found.lines.append(f"one update of {args.per_device_train_batch_size} episodes took {update:.1f} s")
