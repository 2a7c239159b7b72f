"""A user's folder with everything that a small run needs, in which one thing at a time is wrong."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from llm_dqn import cli

REWARDS = """
def length(completions, **columns):
    return [float(len(text)) for text in completions]
"""
SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"model_name_or_path": "models/tiny"},
    "data": {"train": "prompts.jsonl"},
    "rollout": {"max_completion_length": 6, "prompts_per_collect": 8},
    "reward": {"funcs": ["judge.py:length"]},
    "replay": {"learning_starts": 8, "capacity": 64, "updates_per_collect": 2},
    "train": {
        "output_dir": "runs/x",
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "eval_steps": 0,
        "logging_steps": 1,
        "final_eval_prompts": 4,
        "learning_rate": 0.01,
    },
}


class Desk:
    """The folder `home`, which is the current one; what is written there is what `llm-dqn` gets."""

    def __init__(self, home: Path, model: str, monkeypatch: pytest.MonkeyPatch, capture: Any) -> None:
        self.home, self.capture = home, capture
        self.settings = {section: dict(keys) for section, keys in SETTINGS.items()}
        self.weights_opened = 0
        self.model("tiny", model)
        self.rows("prompts.jsonl", [{"prompt": f"the film {number}", "answer": "a"} for number in range(10)])
        self.write("judge.py", REWARDS)
        monkeypatch.chdir(home)
        original = AutoModelForCausalLM.from_pretrained

        def counted(*given: Any, **options: Any) -> Any:
            self.weights_opened += 1
            return original(*given, **options)

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)

    # --- what lies there ----------------------------------------------------------------------------------------------

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def rows(self, name: str, rows: list[Any]) -> str:
        self.write(name, "".join(json.dumps(row) + "\n" for row in rows))
        return name

    def judge(self, source: str) -> None:
        """Another `judge.py`."""
        self.write("judge.py", source)

    def model(self, name: str, source: str, **changes: dict[str, Any]) -> str:
        """A copy of a model folder; `changes`: keys of its JSON files that are set, or removed by None."""
        folder = self.home / "models" / name
        shutil.copytree(source, folder)
        for file, keys in changes.items():
            path = folder / f"{file}.json"
            content = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps({k: v for k, v in (content | keys).items() if v is not None}))
        return f"models/{name}"

    def set(self, **keys: Any) -> None:
        """Settings by `section__key`."""
        for name, value in keys.items():
            section, key = name.split("__")
            self.settings[section][key] = value

    # --- what is done there -------------------------------------------------------------------------------------------

    def command(self, *arguments: str) -> tuple[int, str, str]:
        """(exit code, standard output, standard error) of a command, run in this process."""
        self.write("r.yaml", yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True))
        self.capture.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main(list(arguments))
        shown = self.capture.readouterr()
        return int(left.value.code or 0), shown.out, shown.err

    def refused(self, key: str, **settings: Any) -> str:
        """What `check` and `train` both say of `key`, at its line, before a weight was opened for training."""
        self.set(**settings)
        said = {}
        for command in ("check", "train"):
            self.weights_opened = 0
            code, _, errors = self.command(command, "r.yaml")
            assert code == 2, (command, errors)
            said[command] = errors.splitlines()[-1]
        assert said["check"] == said["train"]
        assert self.weights_opened == 0 and not (self.home / "runs").exists()
        start = f"r.yaml:{self._line(key)}: {key}: "
        assert said["train"].startswith(start), (start, said["train"])
        return said["train"].removeprefix(start)

    def trained(self, **settings: Any) -> tuple[Path, str]:
        """(run folder, everything that was printed) of a run that ends well."""
        self.set(**settings)
        code, out, errors = self.command("train", "r.yaml")
        assert code == 0, errors
        return self.home / self.settings["train"]["output_dir"], out + errors

    def failed(self, **settings: Any) -> str:
        """The last line of a run that was well begun and fails."""
        self.set(**settings)
        code, _, errors = self.command("train", "r.yaml")
        assert code == 1, errors
        return errors.splitlines()[-1]

    def _line(self, key: str) -> int:
        section, leaf = key.split(".")
        lines = (self.home / "r.yaml").read_text().splitlines()
        start = lines.index(f"{section}:")
        return next(n for n in range(start, len(lines)) if lines[n].startswith(f"  {leaf}:")) + 1


def lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def forget_modules() -> None:
    """Drops what a `judge.py` left in the list of modules."""
    for name in [name for name in sys.modules if name.startswith("judge_")]:
        del sys.modules[name]
