"""llm_dqn as anyone would use it: `DQNTrainer` with settings of the recipe, measured between collections."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig

from benchmarks.learning.course import Course
from benchmarks.learning.search import search
from benchmarks.learning.tasks import Row, Task
from llm_dqn import DQNConfig, DQNTrainer

FOREVER = 10**7  # learner steps; the budget of scored completions ends a run


class Watched(DQNTrainer):
    """The trainer, looked at before it collects; its own evaluation at the end is left out."""

    course: Course
    logged_only = False

    def collect(self) -> None:
        self.look()
        super().collect()

    def evaluate(self) -> dict[str, Any]:
        return {}

    def look(self) -> None:
        at = self.step if self.logged_only else self.scored_completions
        if self.course.due(at):
            with self.network.writer("online") as model:
                self.course.look(at, self.step, lambda: model)


def lora_of(task: Task) -> LoraConfig | None:
    """The adapter that every method tunes; None: all weights."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if task.tuned == "lora" else None


def train(
    task: Task,
    course: Course,
    settings: Mapping[str, Any],
    budget: int,
    seed: int,
    logged: Sequence[Row] = (),
    search_too: bool = False,
) -> dict[str, Any]:
    """One run of `budget` scored completions; with logged rows and no budget, of the last mark's learner steps.

    search_too: has `search` look at the network afterwards.
    """
    with tempfile.TemporaryDirectory() as folder:
        given: dict[str, Any] = {
            "output_dir": f"{folder}/run",
            "max_completion_length": task.length,
            "max_scored_completions": budget,
            "max_steps": FOREVER if budget else course.marks[-1],
            **({} if budget else {"updates_per_collect": 25}),  # how often it is looked at
            "eval_steps": 0,
            "save_steps": 0,
            "seed": seed,
            **settings,
        }
        if logged:
            file = Path(folder) / "logged.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in logged), encoding="utf-8")
            given["warm_start"] = str(file)
        trainer = Watched(
            str(task.base()),
            [course.scored],
            DQNConfig(**given),
            train_dataset=Dataset.from_list(task.train),
            eval_dataset=Dataset.from_list(task.tuning[:8]),
            peft_config=lora_of(task),
        )
        trainer.course, trainer.logged_only = course, budget == 0
        trainer.train()
        trainer.look()
        if trainer.scored_completions != course.scored.count:
            raise RuntimeError(f"{trainer.scored_completions} completions counted, {course.scored.count} judged")
        if not search_too:
            return {}
        found = search(trainer.network, course.tokenizer, task, course.rows, seed=2000 + seed)
        return {"search": {role: {name: round(value, 4) for name, value in few.items()} for role, few in found.items()}}
