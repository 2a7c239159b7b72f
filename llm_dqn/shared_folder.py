"""Episodes from collectors apart from the learner: taken from a shared folder as they come."""

import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llm_dqn import exchange
from llm_dqn.errors import RunError, StepFailed, UserError
from llm_dqn.exchange import Segment
from llm_dqn.processes import Processes
from llm_dqn.types import Episode

PERIOD = 0.2  # seconds between two looks into the folder
PATIENCE = 10.0  # seconds without a segment before a line says what is waited for


@dataclass(frozen=True)
class Taken:
    """What a process got: episodes young enough, how many completions were scored for them, ages in learner steps."""

    scored: int
    episodes: list[Episode]
    ages: list[int]


class SharedFolder:
    """The learner's side of a folder into which `llm-dqn collect` writes.

    run: the run's folder, where the policy is published below `policy/`. max_age: learner steps between an episode's
    policy and now beyond which it is refused; None takes all. timeout: seconds without a segment after which the run
    gives up, saved. Each segment is taken once, a worker's in its order; `state` remembers up to where.
    """

    def __init__(
        self,
        folder: Path,
        run: Path,
        processes: Processes,
        vocabulary: bytes,
        *,
        max_age: int | None,
        timeout: float,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.policy, self.processes, self.say = folder, run / "policy", processes, say
        self.vocabulary, self.max_age, self.timeout = vocabulary.hex(), max_age, timeout
        self.run = secrets.token_hex(8)  # tells this run's segments from those of another in the same folder
        self.next: dict[str, int] = {}  # worker -> number of the segment to take next
        self.refused = self.damaged = self.foreign = 0  # episodes too old; segments that were of no use

    def open(self) -> None:
        """Makes the folders and agrees on the name of the run."""
        self.run = self.processes.gather(self.run)[0]
        if self.processes.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.policy.mkdir(parents=True, exist_ok=True)
            (self.policy / exchange.FINISHED).unlink(missing_ok=True)

    def publish(self, step: int, epsilon: float, tensors: dict[str, Tensor]) -> None:
        """Shows collectors the online network. Those of the target stay out."""
        if self.processes.rank == 0:
            online = {name: value for name, value in tensors.items() if not name.startswith("target")}
            exchange.publish_policy(self.policy, exchange.Policy(self.run, step, epsilon, online))

    def close(self) -> None:
        """Tells collectors that nothing more is wanted."""
        if self.processes.rank == 0:
            (self.policy / exchange.FINISHED).touch()

    def take(self, step: int, wanted: int, stopping: Callable[[], bool]) -> Taken:
        """The oldest segments that were not taken yet, until so many completions were scored; waits for the first.

        Nothing where `stopping` says so while there is nothing. Raises StepFailed after `timeout` seconds.
        """
        chosen = self.processes.agree(lambda: self._wait(wanted, stopping) if self.processes.rank == 0 else [])
        chosen = self.processes.gather(chosen)[0]
        rank, world = self.processes.rank, self.processes.world
        before = (self.refused, self.damaged, self.foreign)
        # dealt on where the last deal ended: often there is one segment at a time, and the first process got the last
        dealt = enumerate(chosen, sum(self.next.values()))
        own = [segment for number, segment in dealt if number % world == rank]
        taken = self.processes.agree(lambda: self._read(own, step))
        mine = (self.refused - before[0], self.damaged - before[1], self.foreign - before[2])
        counts = [sum(part) for part in zip(*self.processes.gather(mine), strict=True)]
        self.refused, self.damaged, self.foreign = (was + more for was, more in zip(before, counts, strict=True))
        for segment in chosen:
            self.next[segment.worker] = segment.number + 1
        if rank == 0 and chosen:
            exchange.write_json(self.policy / exchange.TAKEN, self.next)
        return taken

    def _wait(self, wanted: int, stopping: Callable[[], bool]) -> list[Segment]:
        started, told = time.monotonic(), False
        while not (found := self._fresh(wanted)) and not stopping():
            waited = time.monotonic() - started
            if waited > self.timeout:
                raise StepFailed(
                    f"no collector wrote into {self.folder} for {self.timeout:g} s (rollout.collector_timeout); start "
                    f"one with: llm-dqn collect {self.policy.parent} --into {self.folder}"
                )
            if waited > PATIENCE and not told:
                told = True
                self.say(f"waiting for segments in {self.folder}: llm-dqn collect {self.policy.parent} --into ...")
            time.sleep(PERIOD)
        return found

    def _fresh(self, wanted: int) -> list[Segment]:
        """Segments in the order of taking. One that is there before its forerunner is seen waits for it."""
        expected, chosen, scored = dict(self.next), [], 0
        ready = exchange.segments(self.folder)
        while scored < wanted:
            following = next((s for s in ready if s.number == expected.get(s.worker, 0)), None)
            if following is None:
                break
            chosen.append(following)
            scored += following.scored
            expected[following.worker] = following.number + 1
        return chosen

    def _read(self, chosen: list[Segment], step: int) -> Taken:
        scored, episodes, ages = 0, [], []
        for segment in chosen:
            try:
                content = exchange.read_segment(segment)
            except RunError as error:
                self.damaged += 1
                self.say(f"a segment is left out: {error}")
                continue
            if content.run != self.run:
                self.foreign += 1
                continue
            if content.vocabulary != self.vocabulary:
                raise UserError(f"{segment.path} was written with another tokenizer; use one recipe for all")
            scored += segment.scored
            for episode in content.episodes:
                age = max(0, step - episode.policy_version)
                if age > (math.inf if self.max_age is None else self.max_age):
                    self.refused += 1
                else:
                    episodes.append(episode)
                    ages.append(age)
        return Taken(scored, episodes, ages)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that no segment is taken twice."""
        return {name: getattr(self, name) for name in ("run", "next", "refused", "damaged", "foreign")}

    def load_state(self, state: dict[str, Any]) -> None:
        """The reverse of `state`."""
        for name, value in state.items():
            setattr(self, name, value)
        self.next = dict(self.next)
