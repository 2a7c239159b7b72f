"""What the README says is so: its example runs, its commands, keys, metrics and files are those that exist."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from typer.main import get_command

from llm_dqn import DQNConfig, DQNTrainer
from llm_dqn.cli import app
from llm_dqn.recipe import FLAT_SECTIONS, Recipe, parse_recipe
from tests.networks import lora

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def block(language: str, after: str) -> str:
    """The first fenced block of a language after a heading."""
    return README.partition(f"\n{after}\n")[2].partition(f"```{language}\n")[2].partition("```")[0]


def table(header: str) -> list[list[str]]:
    """The rows, cell by cell, of the table whose first header cell begins like this."""
    lines = README.partition(f"\n| {header}")[2].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_python_example_runs(tmp_path: Path) -> None:
    example = block("python", "## In Python")
    assert sum(bool(line.strip()) for line in example.splitlines()) <= 12
    short = re.sub(
        r"max_steps=\d+", "max_steps=1, prompts_per_collect=8, learning_starts=8, final_eval_prompts=4", example
    )
    short = short.replace('"runs/twelve_words"', repr(str(tmp_path / "run")))
    assert short.count("max_steps=1,") == 1 and "runs/" not in short
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    ran = subprocess.run(
        [sys.executable, "-c", short], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=250
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()


def test_every_command_of_the_readme_exists_and_every_command_is_in_it() -> None:
    exist = set(get_command(app).commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"llm-dqn ([a-z]+)", README)) == exist
    assert {name for row in table("command") for name in re.findall(r"llm-dqn (\w+)", row[0])} == exist


def test_every_option_of_the_commands_exists() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for row in table("command"):
        command = commands[re.findall(r"llm-dqn (\w+)", row[0])[0]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", row[0])) <= known, row[0]


def test_every_recipe_key_exists() -> None:
    section = ""
    for first, default, _ in table("key"):
        if first.startswith("**"):
            section = first.strip("*")
            continue
        model = FLAT_SECTIONS.get(section) or Recipe.model_fields[section].annotation
        fields = getattr(model, "model_fields", None) or {"r": 0, "lora_alpha": 0, "target_modules": 0}
        assert set(names(first)) <= set(fields), (section, first)
        for name, value in zip(names(first), default.split(", "), strict=False):
            written = getattr(fields[name], "default", None)
            if isinstance(written, bool | int | float) and value not in ("none", "required"):
                assert json.loads(value) == written, f"{section}.{name} is {written} by default"


def test_every_switch_of_the_textbook_exists() -> None:
    for _, keys, *_ in table("idea"):
        for key in re.findall(r"`(\w+\.\w+)`", keys):
            section, leaf = key.split(".")
            assert leaf in FLAT_SECTIONS[section].model_fields, key


def test_the_recipe_can_be_read() -> None:
    assert parse_recipe(block("yaml", "### The recipe"), "README.md").train.output_dir == "runs/mine"


@pytest.fixture(scope="module")
def run(tiny_llama_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that logs everything that can be logged."""

    def long(completions: list[str], **columns: object) -> list[float]:
        return [float(len(text)) for text in completions]

    def spaces(completions: list[str], **columns: object) -> list[float]:
        return [float(text.count(" ")) for text in completions]

    folder = tmp_path_factory.mktemp("readme") / "run"
    rows = Dataset.from_list([{"prompt": f"the film {number}"} for number in range(10)])
    small = {"max_completion_length": 4, "prompts_per_collect": 4, "learning_starts": 4, "capacity": 32}
    args = DQNConfig(output_dir=str(folder), max_steps=4, eval_steps=2, logging_steps=1, **small)
    trainer = DQNTrainer(tiny_llama_path, [long, spaces], args, rows, peft_config=lora())
    trainer.logbook.add("train/td_loss", float("nan"))
    trainer.train()
    return folder


def test_every_metric_of_the_readme_is_written_and_every_metric_written_is_in_it(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    written = {name for line in lines for name in line}
    written = {re.sub(r"/(long|spaces)$", "/NAME", name) for name in written}
    assert {name for row in table("in `metrics.jsonl`") for name in names(row[0])} == written


def test_every_figure_of_an_evaluation_is_in_the_readme(run: Path) -> None:
    report = json.loads((run / "evaluation.json").read_text())
    described = {name for row in table("in `evaluation.json`") for name in names(row[0])}
    assert described == set(report["base"]) == set(report["tuned"])
    assert set(report) == {"base", "tuned", "win_rate", "win_rate_ci", "seeds", "split"}


def test_every_file_of_a_run_is_in_the_readme(run: Path) -> None:
    described = {name.partition("/")[0] for row in table("in `train.output_dir`") for name in names(row[0])}
    assert {path.name for path in run.iterdir()} == described - {"model"}


def test_the_file_tree_has_every_module_and_nothing_else() -> None:
    tree = block("", "## What is where")
    listed = re.findall(r"^  (\w+\.py) ", tree, re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (REPOSITORY / "llm_dqn").glob("*.py"))
    for name in re.findall(r"^([\w.]+/?) ", tree, re.MULTILINE):
        assert (REPOSITORY / name).exists(), name
