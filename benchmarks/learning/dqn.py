"""llm_dqn as anyone would use it: `DQNTrainer` with settings of the recipe, measured between collections."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig

from benchmarks.learning.course import Course
from benchmarks.learning.measure import Looked
from benchmarks.learning.search import critic, search
from benchmarks.learning.tasks import Row, Task
from llm_dqn import DQNConfig, DQNTrainer
from llm_dqn.types import Episode

FOREVER = 10**7  # learner steps; the budget of scored completions ends a run
OWN = {"logged_updates"}  # settings of the benchmark, not of the library


class Watched(DQNTrainer):
    """The trainer, looked at before it collects; its own evaluation at the end is left out.

    logged_updates: learner steps before the first new completion is written. stale: the policy that writes is
    refreshed every so many completions; 0: before each collection.
    """

    course: Course
    logged_only = False
    logged_updates = 0
    stale = 0
    _refreshed: tuple[int, dict[str, torch.Tensor]] | None = None
    _waiting = False

    def collect(self) -> None:
        self.look()
        self._waiting = self.step < self.logged_updates
        super().collect()
        self._waiting = False

    @property
    def budget_left(self) -> int:
        """Nothing while it learns from logged completions alone."""
        return 0 if self._waiting else super().budget_left

    def rollout(self) -> list[Episode]:
        """By a policy that may be old; what it makes of a token is then off-policy for the learner."""
        if not self.stale:
            return super().rollout()
        newest = {name: weight.detach().clone() for name, weight in self.network.checkpoint_state().items()}
        if self._refreshed is None or self.scored_completions - self._refreshed[0] >= self.stale:
            self._refreshed = (self.scored_completions, newest)
        self.network.load_checkpoint_state(self._refreshed[1])
        episodes = super().rollout()
        self.network.load_checkpoint_state(newest)
        return episodes

    def evaluate(self) -> dict[str, Any]:
        return {}

    def look(self) -> None:
        self.look_at_mark(self.step if self.logged_only else self.scored_completions)

    def look_at_mark(self, at: int) -> None:
        """At the policy that a run would have kept which ended now."""
        if not self.course.due(at):
            return
        stopping, now = self.parts.early_stopping, {}
        if stopping is not None and stopping.best:
            now = {name: weight.clone() for name, weight in self.network.checkpoint_state().items()}
            stopping.put_back()
        with self.network.writer("online") as model:
            self.course.look(at, self.step, lambda: model, self._critic)
        if now:
            self.network.load_checkpoint_state(now)

    def _critic(self, looked: Looked) -> dict[str, Any]:
        return {"critic": critic(self.network, self.course.tokenizer, self.course.task, self.course.rows, looked)}


def lora_of(task: Task) -> LoraConfig | None:
    """The adapter that every method tunes; None: all weights."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if task.tuned == "lora" else None


def written_log(logged: Sequence[Row], folder: Path) -> str:
    """The path of a file with these completions, for `warm_start`."""
    file = folder / "logged.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in logged), encoding="utf-8")
    return str(file)


def train(
    task: Task,
    course: Course,
    settings: Mapping[str, Any],
    budget: int,
    seed: int,
    logged: Sequence[Row] = (),
    stale: int = 0,
    search_too: bool = False,
) -> dict[str, Any]:
    """One run of `budget` scored completions; with logged rows and no budget, of the last mark's learner steps.

    settings: of `DQNConfig`, and logged_updates. stale: see `Watched`. search_too: has `search` look at the network
    afterwards.
    """
    chosen = dict(settings)
    logged_updates = chosen.pop("logged_updates", 0)
    with tempfile.TemporaryDirectory() as folder:
        given: dict[str, Any] = {
            "output_dir": f"{folder}/run",
            "max_completion_length": task.length,
            "max_scored_completions": budget,
            "max_steps": FOREVER if budget else course.marks[-1],
            **({} if budget else {"updates_per_collect": 25}),  # how often it is looked at
            "eval_steps": 0,
            "save_steps": 0,
            "cache": False,  # all methods pay for every completion, repeated ones too
            "seed": seed,
            **chosen,
        }
        if logged:
            given["warm_start"] = written_log(logged, Path(folder))
        trainer = Watched(
            str(task.base()),
            [course.scored],
            DQNConfig(**given),
            train_dataset=Dataset.from_list(task.train),
            eval_dataset=Dataset.from_list(task.tuning[:8]),
            peft_config=lora_of(task),
        )
        trainer.course, trainer.logged_only = course, budget == 0
        trainer.logged_updates, trainer.stale = logged_updates, stale
        trainer.train()
        trainer.look()
        for mark in list(course.marks) if trainer.logged_only else ():
            trainer.look_at_mark(mark)  # learning had stopped before
        if trainer.scored_completions != course.scored.count:
            raise RuntimeError(f"{trainer.scored_completions} completions counted, {course.scored.count} judged")
        if not search_too:
            return {}
        found = search(trainer.network, course.tokenizer, task, course.rows, seed=2000 + seed)
        return {"search": {role: {name: round(value, 4) for name, value in few.items()} for role, few in found.items()}}
