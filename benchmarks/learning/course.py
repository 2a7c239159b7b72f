"""The course of one run: figures at given marks, with scored completions and CPU seconds up to there."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from benchmarks.learning.measure import Looked, measure
from benchmarks.learning.tasks import Counted, Row, Task

disable_progress_bar()


class Course:
    """Watches a run. Marks are scored completions, or learner updates where nothing new is scored.

    Measuring is kept out of the seconds (CPU time of the process) and out of the count of scored completions.
    """

    def __init__(self, task: Task, rows: Sequence[Row], marks: Sequence[int], seed: int) -> None:
        self.task, self.rows, self.marks, self.seed = task, rows, list(marks), seed
        self.scored = Counted(task.judge())
        self.tokenizer = AutoTokenizer.from_pretrained(task.base())
        self.base = AutoModelForCausalLM.from_pretrained(task.base()).eval()
        self.points: list[dict[str, Any]] = []
        self._started = time.process_time()
        self._aside = 0.0

    def due(self, at: int) -> bool:
        """Whether a mark has been reached that was not measured yet."""
        return bool(self.marks) and at >= self.marks[0]

    def look(
        self,
        at: int,
        updates: int,
        model: Callable[[], PreTrainedModel],
        more: Callable[[Looked], dict[str, Any]] | None = None,
    ) -> None:
        """Measures where it is due; `model` is asked for only then. more: further facts for the point."""
        if not self.due(at):
            return
        before = time.process_time()
        seconds = before - self._started - self._aside
        facts = {"at": at, "scored": self.scored.count, "updates": updates, "seconds": round(seconds, 2)}
        looked = measure(model(), self.base, self.tokenizer, self.task, self.rows, seed=1000 + self.seed)
        self.points.append({**facts, **looked.figures, **(more(looked) if more is not None else {})})
        self.marks = [mark for mark in self.marks if mark > at]
        self._aside += time.process_time() - before
