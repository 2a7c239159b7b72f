"""What RUN names on the command line: a run folder, an adapter here or on the Hub, or a plain model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_dqn import models
from llm_dqn.errors import UserError
from llm_dqn.recipe import Recipe, load_recipe, resolve_path, with_resolved_paths


@dataclass(frozen=True)
class Named:
    """Where the parts of a policy lie. `adapter` and `tuned` (a model tuned whole) are never both there.

    name: what was typed, resolved. revision: of the base model; the commit it was tuned on, where that is known.
    """

    name: str
    base: str
    revision: str | None = None
    adapter: str | None = None
    tuned: str | None = None
    recipe: Recipe | None = None

    @property
    def trust_remote_code(self) -> bool:
        """Whether the recipe allowed the base model to bring its own code."""
        return self.recipe is not None and self.recipe.model.trust_remote_code

    def load_base(self, dtype: str | None = None) -> PreTrainedModel:
        """The pretrained model; `dtype` as the recipe has it unless given."""
        facts = self.recipe.model if self.recipe else None
        chosen = dtype or (facts.dtype if facts else "auto")
        attention = facts.attn_implementation if facts else None
        safe = facts.use_safetensors if facts else True
        return models.load_causal_lm(self.base, self.revision, chosen, attention, self.trust_remote_code, safe)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that lies beside what was tuned, or else the base model's."""
        tuned = self.adapter or self.tuned
        if tuned is not None and _has_tokenizer(tuned):
            return models.load_tokenizer(tuned, trust_remote_code=self.trust_remote_code)
        return models.load_tokenizer(self.base, self.revision, self.trust_remote_code)

    def heads(self) -> Path | None:
        """The file of the Q- and value heads beside what was tuned; None where there is none."""
        place = self.adapter or self.tuned
        if place is None:
            return None
        folder, name = Path(place), "q_head.safetensors"
        file = folder / name if folder.is_dir() else models.hub_file(place, name)
        return file if file is not None and file.is_file() else None

    @property
    def adapter_config(self) -> dict[str, Any]:
        """What the adapter says of itself; empty without one."""
        return (_adapter_config(self.adapter) or {}) if self.adapter else {}


def locate(run: str) -> Named:
    """Finds what `run` names. Raises UserError when there is nothing to open."""
    run = resolve_path(run)
    recipe_file = Path(run) / "recipe.yaml"
    if recipe_file.is_file():
        recipe = with_resolved_paths(load_recipe(recipe_file))
        adapter, tuned = _results_of(Path(run))
        facts = recipe.model
        pinned = (_adapter_config(adapter) or {}).get("revision") if adapter else None
        return Named(run, facts.model_name_or_path, pinned or facts.model_revision, adapter, tuned, recipe)
    config = _adapter_config(run)
    if config is None:
        return Named(run, run)
    base = config.get("base_model_name_or_path")
    if not base:
        raise UserError(f"{run}: adapter_config.json names no base model (base_model_name_or_path)")
    return Named(run, resolve_path(base), config.get("revision"), run)


def _results_of(folder: Path) -> tuple[str | None, str | None]:
    """(adapter, tuned model) that a run wrote; one of them is None."""
    if (folder / "adapter" / "adapter_config.json").is_file():
        return str(folder / "adapter"), None
    if (folder / "model" / "config.json").is_file():
        return None, str(folder / "model")
    raise UserError(f"{folder} holds no adapter yet: let `llm-dqn train` finish, or continue it with --resume")


def _adapter_config(place: str) -> dict[str, Any] | None:
    """What a folder or Hub id says of its adapter; None where there is none."""
    folder = Path(place)
    file = folder / "adapter_config.json" if folder.exists() else models.hub_file(place, "adapter_config.json")
    return json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else None


def _has_tokenizer(place: str) -> bool:
    folder = Path(place)
    file = folder / "tokenizer_config.json" if folder.is_dir() else models.hub_file(place, "tokenizer_config.json")
    return file is not None and file.is_file()
