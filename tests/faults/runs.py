"""What tests of whole runs share: cutting them short, comparing them, starting them in processes."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_dqn import checkpoint
from tests.test_trainer import metrics

ROOT = Path(__file__).parents[2]
QUIET = {"eval_steps": 0, "save_steps": 0, "final_eval_prompts": 2}
WEIGHTS = ("adapter/adapter_model.safetensors", "adapter/q_head.safetensors")
FILES = ("samples.jsonl", "evaluation.json", *WEIGHTS)
SLOW = """
import os, time
def slow(completions, **columns):
    time.sleep(float(os.environ.get("SLOW", "0")))
    return [float(len(text)) for text in completions]
"""


class Cut(Exception):
    """Stands for whatever ends a run in the middle of a step."""


def cut_at(run: Any, step: int) -> None:
    """Lets a run fail in its update of one step."""
    update = run.update

    def failing(batches: Any) -> None:
        if run.step == step:
            raise Cut
        update(batches)

    run.update = failing
    with pytest.raises(Cut):
        run.train()


def logged(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics without what depends on the clock or on when the process began."""
    of_the_process = ("seconds", "tokens_per_second", "train/idle_share", "reward/cached")
    return [{k: v for k, v in line.items() if k not in of_the_process} for line in metrics(folder)]


def equal_checkpoints(one: Path, other: Path) -> bool:
    """The same parts bit for bit; what is left of the state is the same but for seconds."""
    (state, parts), (other_state, other_parts) = checkpoint.read(one), checkpoint.read(other)
    for found in (state, other_state):
        found["logbook"]["metrics"].pop("seconds")
        for part in found["logbook"]["metrics"]["open"]:
            part["rates"].clear()
            part["means"].pop("train/idle_share", None)
        found["recipe"].pop("train.output_dir")
    same = parts.keys() == other_parts.keys() and state == other_state
    return same and all(
        parts[name].keys() == other_parts[name].keys()
        and all(torch.equal(value, other_parts[name][key]) for key, value in parts[name].items())
        for name in parts
    )


def start(*command: str, **environment: str) -> subprocess.Popen[str]:
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": os.environ["PATH"]}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=own | {"HF_HUB_OFFLINE": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)
