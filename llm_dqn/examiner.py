"""What is measured on held-out prompts during and after training, the work dealt out over the processes of the run."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from llm_dqn import evaluation
from llm_dqn.evaluation import Hands, Measured, Pair
from llm_dqn.judging import Judged, Judges
from llm_dqn.processes import Processes
from llm_dqn.rollout import Writer
from llm_dqn.types import Episode, Prompt

T = TypeVar("T")
Written = Callable[[Callable[[Writer], Any], int], Any]  # (work, rows): in halves when memory runs out


class Examiner(Hands):
    """The policies of a run before their examiners. All processes ask together and hear the same.

    Sampled and greedy completions of base and tuned model, and each strength between them, are written by one process
    each: with several the figures are those of one, sooner.
    """

    def __init__(self, writer: Writer, processes: Processes, judges: Judges, written: Written, seed: int) -> None:
        super().__init__(writer, lambda episodes: judges.common([episodes])[0])
        self.processes, self.judges, self.written, self.seed = processes, judges, written, seed
        self._rows = 1

    def do(self, jobs: Sequence[Callable[[Writer], T]]) -> list[T]:
        """What each job returns, in order; each runs on one of the processes."""
        return self.processes.share([partial(self.written, job, self._rows) for job in jobs])

    def judge(self, batches: Sequence[list[Episode]]) -> list[Judged]:
        """Each batch with its rewards, which are asked for it as a whole."""
        return self.judges.common(batches)

    def look(self, prompts: Sequence[Prompt]) -> Measured:
        """The tuned policy as it stands."""
        self._rows = len(prompts)
        return evaluation.measure(self.writer, prompts, self._judge, [self.seed], hands=self)

    def compare(
        self, prompts: Sequence[Prompt], scales: Sequence[float], scale_prompts: int
    ) -> tuple[dict[str, Any], list[Pair]]:
        """Base against tuned: what `evaluation.json` holds, and pairs of completions."""
        self._rows = len(prompts)
        return evaluation.base_and_tuned(
            self.writer,
            prompts,
            self._judge,
            [self.seed],
            scales=scales,
            scale_prompts=scale_prompts,
            hands=self,
        )
