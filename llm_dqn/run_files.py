"""What lies in a run folder, read without any model, at any moment: a line that is being written is left out."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llm_dqn.errors import UserError

Row = dict[str, Any]
EVALUATION_SAMPLES = "evaluation_samples.jsonl"


@dataclass(frozen=True)
class RunFiles:
    """A run folder's contents; what it does not hold is empty.

    base, tuned: score lines of the final evaluation, `base[i]` and `tuned[i]` of the same prompt. notes: what could
    not be read.
    """

    name: str
    recipe_text: str = ""
    recipe: Row = field(default_factory=dict)
    versions: list[str] = field(default_factory=list)
    metrics: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    evaluation: Row = field(default_factory=dict)
    base: list[Row] = field(default_factory=list)
    tuned: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def setting(self, section: str, key: str, otherwise: Any = None) -> Any:
        """A value of the recipe, `otherwise` where the recipe says nothing."""
        return (self.recipe.get(section) or {}).get(key, otherwise)


def read_run(folder: Path) -> RunFiles:
    """Raises UserError where there is no run folder."""
    folder = Path(folder)
    if not folder.is_dir():
        what = "a file" if folder.exists() else "not there"
        raise UserError(f"RUN: {folder} is {what}; give the folder that `llm-dqn train` wrote to (train.output_dir)")
    if not any((folder / name).is_file() for name in ("recipe.yaml", "metrics.jsonl", "evaluation.json")):
        raise UserError(f"RUN: {folder} is no run folder: it holds neither recipe.yaml nor metrics.jsonl")
    notes: list[str] = []
    text = _text(folder / "recipe.yaml")
    lines = _rows(folder / EVALUATION_SAMPLES, notes)
    base = [line for line in lines if line.get("side") == "base"]
    tuned = [line for line in lines if line.get("side") == "tuned"]
    together = [(b, t) for b, t in zip(base, tuned, strict=False) if b["prompt"] == t["prompt"]]
    return RunFiles(
        name=folder.resolve().name,
        recipe_text=text,
        recipe=_recipe(text, notes),
        versions=[line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")],
        metrics=[row for row in _rows(folder / "metrics.jsonl", notes) if "step" in row],
        samples=_rows(folder / "samples.jsonl", notes),
        evaluation=_evaluation(folder / "evaluation.json", notes),
        base=[b for b, _ in together],
        tuned=[t for _, t in together],
        notes=notes,
    )


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _rows(file: Path, notes: list[str]) -> list[Row]:
    """The objects of a JSON Lines file. Lines that are none are counted in `notes`."""
    rows, torn = [], []
    lines = _text(file).splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            torn.append(number)
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            torn.append(number)
    if torn == [len(lines)]:
        notes.append(f"The last line of {file.name} is incomplete, as when it is just being written; it is left out.")
    elif torn:
        notes.append(
            f"{len(torn)} lines of {file.name} cannot be read (the first is line {torn[0]}); they are left out."
        )
    return rows


def _evaluation(file: Path, notes: list[str]) -> Row:
    text = _text(file)
    try:
        found = json.loads(text) if text else {}
    except json.JSONDecodeError:
        notes.append(f"{file.name} cannot be read; it is left out.")
        return {}
    return found if isinstance(found, dict) and {"base", "tuned"} <= found.keys() else {}


def _recipe(text: str, notes: list[str]) -> Row:
    try:
        found = yaml.safe_load(text) if text else {}
    except yaml.YAMLError:
        notes.append("recipe.yaml cannot be read; it is shown as it is.")
        return {}
    return found if isinstance(found, dict) else {}
