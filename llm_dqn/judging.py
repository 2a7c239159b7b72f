"""Who asks the rewards when several processes run: each for what it wrote, or the main one for all of them."""

from collections.abc import Callable, Sequence
from functools import partial

from llm_dqn.evaluation import judged_in_place
from llm_dqn.processes import Processes
from llm_dqn.rewards import Rewards
from llm_dqn.types import Episode

Judged = list[Episode | None]  # with rewards, in the order given; None where every reward abstained


class Judges:
    """The rewards of a run, seen from one of its processes.

    on_main: only process 0 calls them, once for what all processes wrote, and tells the others: for a judge behind a
    rate limit, or one of which there is a single copy. Otherwise every process calls them for its own part.
    All processes call these methods together; what fails on one of them fails on all, naming it, but for `own` where
    each calls for itself: it may then be part of something longer on which the processes agree once.
    """

    def __init__(self, rewards: Rewards, processes: Processes, on_main: bool) -> None:
        self.rewards, self.processes = rewards, processes
        self.on_main = on_main and processes.world > 1

    def own(self, episodes: Sequence[Episode]) -> Judged:
        """What the rewards say of this process's episodes, which differ from those of the others."""
        if not self.on_main:
            return judged_in_place(self.rewards, episodes)
        everyone = self.processes.gather(list(episodes))
        judged = self._by_main([episode for part in everyone for episode in part])
        start = sum(len(part) for part in everyone[: self.processes.rank])
        return judged[start : start + len(episodes)]

    def after(
        self, write: Callable[[], list[Episode]], judge: Callable[[list[Episode]], list[Episode]]
    ) -> tuple[int, list[Episode]]:
        """(how many `write` gives, what `judge`, which calls `own`, makes of them). The processes agree on both at once
        where they can: one that has written need not wait for the others before it asks its judge.
        """
        if self.on_main:
            episodes = self.processes.agree(write)
            return len(episodes), judge(episodes)

        def both() -> tuple[int, list[Episode]]:
            episodes = write()
            return len(episodes), judge(episodes)

        return self.processes.agree(both)

    def common(self, batches: Sequence[Sequence[Episode]]) -> list[Judged]:
        """What they say of whole batches that all processes have alike; the answer is the same on all."""
        if self.on_main:
            return [self._by_main(batch) for batch in batches]
        return self.processes.share([partial(judged_in_place, self.rewards, batch) for batch in batches])

    def _by_main(self, episodes: Sequence[Episode]) -> Judged:
        here = self.processes.rank == 0
        return self.processes.gather(
            self.processes.agree(lambda: judged_in_place(self.rewards, episodes) if here else [])
        )[0]
