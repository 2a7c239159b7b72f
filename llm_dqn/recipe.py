"""The recipe of a run, read from YAML or from Python, and everything that is wrong with it said at once.

`Recipe` is the file, section by section; `DQNConfig` is the same schema with the leaf names flat.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import yaml
from pydantic import Field, PrivateAttr, ValidationError

from llm_dqn.recipe_problems import problems_of
from llm_dqn.recipe_sections import (
    DataSection,
    DQNSection,
    EpsilonSection,
    LoraSection,
    ModelSection,
    ReplaySection,
    RewardSection,
    RolloutSection,
    Section,
    Text,
    TrainSection,
)
from llm_dqn.recipe_yaml import Document, Problem, RecipeError, apply_override, read_yaml
from llm_dqn.shipped import copy_recipe, find_recipe, mislaid, resolve_path, shipped_recipes, shipped_root

__all__ = [
    "DQNConfig",
    "DQNSection",
    "DataSection",
    "EpsilonSection",
    "LoraSection",
    "ModelSection",
    "Problem",
    "Recipe",
    "RecipeError",
    "ReplaySection",
    "RewardSection",
    "RolloutSection",
    "TrainSection",
    "copy_recipe",
    "dump_recipe",
    "find_recipe",
    "in_file_order",
    "load_recipe",
    "load_recipe_partially",
    "mislaid",
    "parse_recipe",
    "parse_recipe_partially",
    "resolve_path",
    "shipped_recipes",
    "shipped_root",
    "with_resolved_paths",
]


class Recipe(Section):
    """A whole run."""

    model: ModelSection
    lora: LoraSection | None = Field(default_factory=LoraSection)
    data: DataSection
    rollout: RolloutSection = Field(default_factory=RolloutSection)
    reward: RewardSection
    dqn: DQNSection = Field(default_factory=DQNSection)
    replay: ReplaySection = Field(default_factory=ReplaySection)
    train: TrainSection

    _folder: Path | None = PrivateAttr(default=None)
    _document: Document = PrivateAttr(default_factory=lambda: Document("recipe"))

    @property
    def folder(self) -> Path | None:
        """Where the recipe file lies; relative paths in the recipe are looked up there, too."""
        return self._folder

    @property
    def sources(self) -> list[str]:
        """Models, data and rewards, as they were typed."""
        data = self.data
        named = [self.model.model_name_or_path, data.train, data.eval, data.test, *(self.reward.funcs or ())]
        return [name for name in named if name is not None]  # a partly parsed recipe may hold None

    def writes(self, key: str) -> bool:
        """Whether `key` stands in the file or among the overrides, rather than having its default."""
        return key in self._document.lines or key in self._document.overridden

    def problem(self, key: str, message: str) -> Problem:
        """A problem with what `key` says, at the line where it was written."""
        return self._document.problem(key, message)

    def __eq__(self, other: object) -> bool:
        """The same settings, wherever they were written."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()


class DQNConfig(RolloutSection, RewardSection, DQNSection, ReplaySection, TrainSection):
    """The recipe's leaf names as flat keyword arguments, with the same defaults and the same checks."""

    funcs: list[Text] = Field(default_factory=list, description="Empty in Python: the trainer is given `reward_funcs`.")

    @property
    def log_alone(self) -> bool:
        """Whether it is learned from logged completions, and nothing new is scored."""
        return self.max_scored_completions == 0

    if not TYPE_CHECKING:  # type checkers and editors see the keyword arguments that pydantic derives

        def __init__(self, **values: Any) -> None:
            document = Document("DQNConfig", values)
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise RecipeError(problems_of(error, DQNConfig, document)) from None
            conflicts = [document.problem(keys[0], message) for keys, message in _conflicts(self)]
            if conflicts:
                raise RecipeError(conflicts)


FLAT_SECTIONS: dict[str, type[Section]] = {
    "rollout": RolloutSection,
    "reward": RewardSection,
    "dqn": DQNSection,
    "replay": ReplaySection,
    "train": TrainSection,
}
SECTION_OF = {leaf: name for name, section in FLAT_SECTIONS.items() for leaf in section.model_fields}


def _conflicts(recipe: Recipe | DQNConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """Settings that cannot go together: (the keys, the one to report first; what is wrong and how to cure it)."""
    s: Any = recipe
    if isinstance(recipe, Recipe):
        s = SimpleNamespace(**{leaf: getattr(getattr(recipe, name), leaf) for leaf, name in SECTION_OF.items()})
    start, end = s.epsilon.start, s.epsilon.end
    if end > start:
        yield ("epsilon.end", "epsilon.start"), f"must be at most epsilon.start ({start}), got {end}"
    if s.engine == "vllm" and s.vllm_url is None and (s.overlap or s.collectors is not None):
        yield (
            ("vllm_url", "engine", "overlap", "collectors"),
            "needs the address of a server, as http://127.0.0.1:8000: collectors cannot share one that the run starts",
        )
    if s.engine == "vllm" and s.q_head == "linear":
        yield ("engine", "q_head"), "vllm needs q_head: lm; a server cannot add a linear head's Q to its logits"
    if s.engine != "generate" and s.explore == "uniform":
        yield ("explore", "engine"), f"uniform needs engine: generate, got {s.engine}; explore: prior works with all"
    if s.engine == "continuous" and s.min_p is not None:
        yield ("min_p", "engine"), "is unknown to engine: continuous; use generate, or top_p"
    if s.weights is not None and s.funcs and len(s.weights) != len(s.funcs):
        yield ("weights", "funcs"), f"needs one number a reward function ({len(s.funcs)}), got {len(s.weights)}"
    if s.double and s.backup != "max":
        yield ("double", "backup"), "needs backup: max; a soft backup has no best token to pick"
    if s.prior == "uniform" and s.q_head != "linear":
        yield ("prior", "q_head"), "uniform needs q_head: linear; the lm head is measured against the language model"
    if s.reward_scale not in (None, 1) and s.q_head == "linear":
        yield ("reward_scale", "q_head"), "needs q_head: lm; a linear head learns from rewards as they are (1)"
    if s.expectile is not None and s.q_head != "linear":
        yield ("expectile", "q_head"), "needs q_head: linear; the lm head ties V to the policy (null switches this off)"
    for key, what in (("learning_starts", "start learning earlier"), ("per_device_train_batch_size", "lower that")):
        least = getattr(s, key)
        if s.capacity < least:
            yield (
                ("capacity", key),
                f"must be at least {key} ({least}), got {s.capacity}; raise the capacity or {what}",
            )
    if s.prioritized and s.success_share:
        yield (
            ("prioritized", "success_share"),
            f"excludes success_share, which is {s.success_share}; set success_share: 0",
        )
    if s.overlap and s.collectors is not None:
        yield ("overlap", "collectors"), f"excludes collectors, which is {s.collectors}; leave one of them out"
    behind = s.overlap * s.updates_per_collect
    if s.max_age is not None and s.max_age < behind:
        yield (
            ("max_age", "overlap", "updates_per_collect"),
            f"must be at least overlap x updates_per_collect ({behind}), the age of what is taken in, got {s.max_age}",
        )
    if s.warmup_steps and s.lr_scheduler_type == "constant":
        yield (
            ("warmup_steps", "lr_scheduler_type"),
            f"{s.warmup_steps} has no effect with lr_scheduler_type: constant; use constant_with_warmup",
        )


def load_recipe(path_or_name: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, or the shipped recipe of that name. Raises RecipeError with everything that is wrong."""
    path, text = find_recipe(path_or_name)
    return parse_recipe(text, path, overrides)


def load_recipe_partially(
    path_or_name: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> tuple[Recipe | None, list[Problem]]:
    """As `parse_recipe_partially`, of a file or a shipped recipe. Raises UserError where there is no such recipe."""
    path, text = find_recipe(path_or_name)
    return parse_recipe_partially(text, path, overrides)


def parse_recipe(text: str, source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a text. `source` is the file it came from: it names errors and finds relative paths."""
    recipe, problems = parse_recipe_partially(text, source, overrides)
    if recipe is None or problems:
        raise RecipeError(problems)
    return recipe


def parse_recipe_partially(
    text: str, source: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> tuple[Recipe | None, list[Problem]]:
    """What can be used of a recipe, and everything that is wrong with it.

    A broken optional key falls back to its default, a broken or missing required key to None, so that further checks
    can find their own problems; the recipe is None when the text is no YAML at all.
    """
    document, problems = read_yaml(text, str(source))
    if problems and not document.values:
        return None, problems
    for override in overrides:
        problems += apply_override(document, override)
    # a section whose lines are all commented out reads as null; only for lora does null mean something
    document.values = {k: {} if v is None and k in _SECTIONS else v for k, v in document.values.items()}
    broken: list[Problem] = []
    try:
        recipe = Recipe.model_validate(document.values)
    except ValidationError as error:
        broken = problems_of(error, Recipe, document)
        recipe = _usable_part(document.values, broken)
    recipe._folder = Path(source).parent if Path(source).is_file() else None
    recipe._document = document
    already_broken = {problem.key for problem in broken}
    conflicts = [
        document.problem(_dotted(keys[0]), message)
        for keys, message in _conflicts(recipe)
        if already_broken.isdisjoint(map(_dotted, keys))
    ]
    return recipe, in_file_order(problems + broken + conflicts)


def _dotted(leaf: str) -> str:
    return f"{SECTION_OF[leaf.split('.')[0]]}.{leaf}"


_SECTIONS = {name for name in Recipe.model_fields if name != "lora"}


def _usable_part(values: dict[str, Any], broken: list[Problem]) -> Recipe:
    """The recipe without its broken keys: defaults stand in for them, None for required ones."""
    bad = {problem.key for problem in broken}
    sections: dict[str, Section | None] = {}
    for name, info in Recipe.model_fields.items():
        section = LoraSection if name == "lora" else cast(type[Section], info.annotation)
        given = {} if name in bad else values.get(name, {})
        sections[name] = None if given is None else _usable_section(section, given, name, bad)
    return Recipe.model_construct(**sections)  # type: ignore[arg-type]


def _usable_section(section: type[Section], given: dict[str, Any], path: str, bad: set[str]) -> Section:
    fields: dict[str, Any] = {}
    missing: dict[str, None] = {}
    for leaf, info in section.model_fields.items():
        key = f"{path}.{leaf}"
        if leaf in given and key not in bad and not isinstance(given[leaf], dict):
            fields[leaf] = given[leaf]
        elif isinstance(given.get(leaf), dict) and key not in bad:
            fields[leaf] = _usable_section(info.annotation, given[leaf], key, bad)  # type: ignore[arg-type]
        elif info.is_required():
            missing[leaf] = None
    stand_ins = {leaf: ["?"] if leaf == "funcs" else "?" for leaf in missing}
    return section.model_validate(fields | stand_ins).model_copy(update=missing)


def in_file_order(problems: list[Problem]) -> list[Problem]:
    """By line; what has no line (missing keys, overrides) comes last."""
    return sorted(dict.fromkeys(problems), key=lambda problem: (problem.line is None, problem.line or 0))


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; `parse_recipe` gives the same recipe back."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True, width=120)


def with_resolved_paths(recipe: Recipe) -> Recipe:
    """The same recipe with every model, data and reward path that exists replaced by where it was found."""

    def found(value: str | None) -> str | None:
        return None if value is None else resolve_path(value, recipe.folder)

    # a partly parsed recipe may hold None where the functions are missing
    funcs = None if recipe.reward.funcs is None else [found(spec) for spec in recipe.reward.funcs]
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"model_name_or_path": found(recipe.model.model_name_or_path)}),
            "data": recipe.data.model_copy(
                update={name: found(getattr(recipe.data, name)) for name in ("train", "eval", "test")}
            ),
            "reward": recipe.reward.model_copy(update={"funcs": funcs}),
            "replay": recipe.replay.model_copy(update={"warm_start": found(recipe.replay.warm_start)}),
        }
    )
