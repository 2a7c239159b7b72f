"""Spares a reward function what it has answered before, once it has shown that it answers the same again."""

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

TRIAL = 32  # repeated requests on which a function must agree with itself
CAPACITY = 100_000  # answers kept, of some 150 bytes each; the longest unused go first


@dataclass(frozen=True)
class Answer:
    """One function's rewards, and why rows have none: {row: exception}."""

    values: list[float | None]
    faults: dict[int, Exception]


@dataclass(frozen=True)
class Plan:
    """Which rows of a call are asked, and where the answer of each row comes from."""

    keys: list[bytes | None]
    asked: list[int]
    places: list[int | None]  # of each row among those asked; None: it is known
    known: dict[int, float]  # row -> reward


class RewardCache:
    """What one function said of which request: its prompt, completion and whatever else it is given of a row.

    At first everything is asked, and repeats are compared bit for bit: a function that is random, keeps a state or
    looks at the whole batch disagrees with itself and is never spared anything. in_batches: of a reward model, whose
    last digits depend on what shares a batch, so that only repeats within a call are spared: what is remembered of
    earlier calls would be another number in a run that was stopped and goes on. Only finite numbers are remembered.
    """

    def __init__(self, name: str, in_batches: bool) -> None:
        self.name, self.in_batches = name, in_batches
        self.trial = 0 if in_batches else TRIAL  # repeats still to be compared
        self.disagreed = False
        self._known: OrderedDict[bytes, float] = OrderedDict()

    def plan(self, arguments: dict[str, Any], count: int) -> Plan:
        """What to ask of a call with `count` rows; arguments that are lists have an entry for each."""
        everything = list(range(count))
        keys = _keys([value for value in arguments.values() if isinstance(value, list)], everything)
        if self.trial or self.disagreed:
            return Plan(keys, everything, [*everything], {})
        asked: list[int] = []
        known: dict[int, float] = {}
        first: dict[bytes, int] = {}
        places: list[int | None] = []
        for row, key in enumerate(keys):
            if key is not None and key in self._known:
                self._known.move_to_end(key)
                known[row] = self._known[key]
                places.append(None)
            elif key is not None and key in first:
                places.append(first[key])
            else:
                if key is not None:
                    first[key] = len(asked)
                places.append(len(asked))
                asked.append(row)
        return Plan(keys, asked, places, known)

    def complete(self, plan: Plan, answer: Answer) -> Answer:
        """The answer of all rows from that of the rows that were asked."""
        for row, value in zip(plan.asked, answer.values, strict=True):
            self._learn(plan.keys[row], value)
        places = enumerate(plan.places)
        values = [plan.known[row] if place is None else answer.values[place] for row, place in places]
        faults = {row: answer.faults[place] for row, place in enumerate(plan.places) if place in answer.faults}
        return Answer(values, faults)

    def _learn(self, key: bytes | None, value: float | None) -> None:
        if key is None or value is None or self.in_batches or self.disagreed:
            return
        if key not in self._known:
            self._known[key] = value
            if len(self._known) > CAPACITY:
                self._known.popitem(last=False)
        elif self.trial and self._known[key] == value:
            self.trial -= 1
        elif self.trial:
            self.disagreed = True
            logger.info("reward '%s': two values for one request, so every one is scored anew", self.name)
            self._known.clear()


def pick(arguments: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The arguments of some rows of a call."""
    return {
        name: [value[row] for row in rows] if isinstance(value, list) else value for name, value in arguments.items()
    }


def _keys(columns: list[list[Any]], rows: Sequence[int]) -> list[bytes | None]:
    """A digest of each row; None where an entry is no JSON, such as an image, and nothing can be told of it."""
    return [_digest([column[row] for column in columns]) for row in rows]


def _digest(row: list[Any]) -> bytes | None:
    try:
        text = json.dumps(row)
    except (TypeError, ValueError, RecursionError):
        return None
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
