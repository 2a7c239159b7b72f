"""One cell of the benchmark, (task, regime, method, configuration, seed, prompts), and the file that remembers it."""

import fcntl
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.learning import dqn, fine_tuning, policy_gradients
from benchmarks.learning.bases import cache_folder, digest
from benchmarks.learning.course import Course
from benchmarks.learning.measure import write
from benchmarks.learning.methods import REGIMES, for_task
from benchmarks.learning.tasks import TASKS, Row, Task
from llm_dqn import DQNConfig

LOGGED_ROWS = 2000
# Settings of llm_dqn that decide what is learned. A key that the library gets later joins them once its default does.
DECISIVE = (
    *("num_generations", "prompts_per_collect", "temperature", "top_k", "top_p", "min_p", "epsilon", "explore"),
    *("q_head", "beta", "gamma", "backup", "double", "n_step", "lam", "corrected", "loss", "target"),
    *("target_sync_steps", "target_tau", "prior", "support_top_k", "advantage_weight", "expectile", "cql_weight"),
    *("truncated", "capacity", "learning_starts", "updates_per_collect", "prioritized", "success_share"),
    *("learning_rate", "value_learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "lr_scheduler_type"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
)


@dataclass(frozen=True)
class Cell:
    """What is run once. part: "tuning" or "test", the prompts it is measured on. marks: where it is measured; scored
    completions online (the last is the budget), updates on logged data.
    """

    task: str
    regime: str
    method: str
    settings: dict[str, Any]
    seed: int
    part: str
    marks: tuple[int, ...]

    @property
    def key(self) -> str:
        """Changes with anything that decides the outcome, the library's defaults among it."""
        facts: dict[str, Any] = {**asdict(self), "base": TASKS[self.task].base.name}
        if REGIMES[self.regime][self.method].kind == "dqn":
            resolved = DQNConfig(output_dir="-", **self.settings).model_dump()
            facts["settings"] = {name: resolved[name] for name in DECISIVE}
        return digest(facts)


def logged_rows(task: Task) -> list[Row]:
    """2,000 completions that the base model once wrote to the training prompts, with their rewards."""
    file = cache_folder(f"logged-{task.name}-{task.base.name}.jsonl")
    if not file.exists():
        tokenizer = AutoTokenizer.from_pretrained(task.base())
        model = AutoModelForCausalLM.from_pretrained(task.base())
        rows = [task.train[number % len(task.train)] for number in range(LOGGED_ROWS)]
        prompts = [row["prompt"] for row in rows]
        torch.manual_seed(17)
        written = write(model, tokenizer, prompts, task.length)
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        rewards = task.judge()(prompts=prompts, completions=texts, **columns)
        ended = ["eos" if ids[-1] == tokenizer.eos_token_id else "length" for ids in written]
        names = ("prompt", "completion", "reward", "ended")
        # an empty completion is the end-of-sequence token alone: nothing that a text could say again
        lines = [dict(zip(names, facts, strict=True)) for facts in zip(prompts, texts, rewards, ended, strict=True)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines if line["completion"]), encoding="utf-8")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def run(cell: Cell) -> dict[str, Any]:
    """Runs the cell: its facts, and the points of its course."""
    task, method = TASKS[cell.task], REGIMES[cell.regime][cell.method]
    settings = for_task(cell.settings, task)
    online = cell.regime == "online"
    rows = task.tuning if cell.part == "tuning" else task.test
    logged = [] if online else logged_rows(task)
    started = time.time()
    course = Course(task, rows, cell.marks, cell.seed)
    budget = cell.marks[-1] if online else 0
    if method.kind == "dqn":
        search_too = online and cell.part == "test"
        facts = dqn.train(task, course, settings, budget, cell.seed, logged, search_too)
    elif method.kind == "sft" and online:
        facts = fine_tuning.train_online(task, course, settings, budget, cell.seed)
    elif method.kind == "sft":
        facts = fine_tuning.train_logged(task, course, settings, logged, cell.seed)
    else:
        facts = policy_gradients.train(method.kind, task, course, settings, budget, cell.seed)
    if course.marks:
        raise RuntimeError(f"{cell} ended before its marks {course.marks}")
    return {**asdict(cell), **facts, "points": course.points, "wall": round(time.time() - started, 1)}


class Store:
    """A file of JSON lines, one a finished cell. Several processes may add to it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> dict[str, dict[str, Any]]:
        """Finished cells by key."""
        if not self.file.exists():
            return {}
        lines = [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]
        return {line["key"]: line for line in lines}

    def add(self, key: str, result: dict[str, Any]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as out:
            fcntl.flock(out, fcntl.LOCK_EX)
            out.write(json.dumps({"key": key, **result}) + "\n")
            out.flush()
            os.fsync(out.fileno())


def run_missing(store: Store, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The results of all cells, in order; those that are not in the store are run and put there."""
    results = []
    for number, cell in enumerate(cells, 1):
        known = store.read()
        key = cell.key
        if key not in known:
            store.add(key, run(cell))
            known = store.read()
            last = known[key]["points"][-1]
            print(
                f"{number}/{len(cells)} {cell.task} {cell.regime} {cell.method} {cell.part} seed {cell.seed} "
                f"{cell.settings}: reward {last['reward']:.3f}, greedy {last['greedy']:.3f}, "
                f"{last['seconds']:.0f} s",
                flush=True,
            )
        results.append(known[key])
    return results
