"""Where the replay keeps its episodes: facts in columns by slot, tokens in segments that a checkpoint writes once."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llm_dqn.errors import RunError, UserError

logger = logging.getLogger(__name__)

# What is known of a stored episode, by slot: a column each. Starts are places in the arrays of its segment.
COLUMNS: dict[str, type] = {
    "lengths": np.int64,  # of prompt and completion together
    "prompt_lengths": np.int64,
    "token_starts": np.int64,
    "action_starts": np.int64,
    "rewards": np.float64,
    "ended": np.uint8,
    "versions": np.int64,
    "source": np.uint8,
    "priorities": np.float64,
}
PLACES = ("token_starts", "action_starts")
# One value a token of prompt and completion, or one an action, of the episodes of a segment one behind the other.
FLAT: dict[str, type] = {"tokens": np.int32, "ref_logprobs": np.float32, "behaviour_logprobs": np.float32}
SEGMENT = "segment-"  # begins the names of those entries of a snapshot that only ever grow at their end


class Growing:
    """A flat array that grows at its end. A view of what is in it stays as it is while it grows."""

    def __init__(self, dtype: type, values: np.ndarray | None = None) -> None:
        self._room: np.ndarray = np.empty(16, dtype) if values is None else values.astype(dtype, copy=False)
        self.size = 0 if values is None else len(values)

    @property
    def values(self) -> np.ndarray:
        return self._room[: self.size]

    def extend(self, values: np.ndarray) -> None:
        end = self.size + len(values)
        if end > len(self._room):
            room = np.empty(max(end, 2 * len(self._room)), self._room.dtype)
            room[: self.size] = self.values
            self._room = room
        self._room[self.size : end] = values
        self.size = end

    def trim(self) -> None:
        """Gives back the room that was kept for growing."""
        self._room = self.values.copy()


Segment = dict[str, Growing]  # by name in `FLAT`


class EpisodeStore:
    """A ring of `capacity` episodes. The `n`-th episode ever added lies in slot `n % capacity`.

    Tokens and log-probabilities lie in segments of `segment_size` episodes in order of adding. A full segment never
    changes, and goes when all its episodes are overwritten.

    vocabulary: identifies the tokenizer of the tokens; empty where that is not known. scratch: a file name on the disk
    that full segments go to, so that memory holds the columns and one segment; None keeps all in memory.
    """

    def __init__(
        self, capacity: int, segment_size: int = 1024, vocabulary: bytes = b"", scratch: Path | None = None
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 episode, got {capacity}")
        if segment_size < 1:
            raise ValueError(f"segment_size must be at least 1 episode, got {segment_size}")
        self.capacity, self.segment_size, self.vocabulary, self.scratch = capacity, segment_size, vocabulary, scratch
        self._clear()

    def _clear(self) -> None:
        self.added = 0  # episodes ever added
        self._columns = {name: Growing(dtype) for name, dtype in COLUMNS.items()}
        self._segments: dict[int, Segment] = {}  # the `n`-th episode lies in segment `n // segment_size`

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored."""
        flat = [part for segment in self._segments.values() for part in segment.values()]
        return sum(part.values.nbytes for part in [*flat, *self._columns.values()])

    def column(self, name: str) -> np.ndarray:
        """(n,) one of `COLUMNS`, by slot; a view into the store."""
        return self._columns[name].values

    def rows(self, slots: np.ndarray) -> dict[str, np.ndarray]:
        """All columns at these slots."""
        return {name: column.values[slots] for name, column in self._columns.items()}

    def numbers(self, slots: np.ndarray) -> np.ndarray:
        """How many episodes were added before each of those in `slots`."""
        return slots + self.capacity * ((self.added - 1 - slots) // self.capacity)

    def flat(self, slots: np.ndarray, names: Iterable[str] = tuple(FLAT)) -> dict[str, np.ndarray]:
        """Tokens, log-probabilities of the episodes in `slots`, one behind the other."""
        segments = [self._segments[key] for key in (self.numbers(slots) // self.segment_size).tolist()]
        facts = self.rows(slots)
        joined: dict[str, np.ndarray] = {}
        for name in names:
            starts = facts["token_starts" if name == "tokens" else "action_starts"]
            counts = facts["lengths"] if name == "tokens" else facts["lengths"] - facts["prompt_lengths"]
            places = zip(segments, starts.tolist(), (starts + counts).tolist(), strict=True)
            pieces = [segment[name].values[start:end] for segment, start, end in places]
            joined[name] = np.concatenate(pieces) if pieces else np.zeros(0, FLAT[name])
        return joined

    def put(self, facts: dict[str, np.ndarray], flat: dict[str, np.ndarray]) -> None:
        """Adds k episodes: (k,) columns but for their places, which follow, and the arrays of `FLAT`.

        Raises RunError when a segment that is full cannot be written to `scratch`.
        """
        counts = {name: facts["lengths"] - (0 if name == "tokens" else facts["prompt_lengths"]) for name in FLAT}
        bounds = {name: np.concatenate([[0], np.cumsum(values)]) for name, values in counts.items()}
        first, last = 0, len(facts["lengths"])
        while first < last:  # pieces that lie in one segment, and in slots one behind the other
            room = min(self.capacity - self.added % self.capacity, self.segment_size - self.added % self.segment_size)
            piece = slice(first, min(last, first + room))
            starts = {name: bounds[name][piece] - bounds[name][first] for name in FLAT}
            self._put_piece(
                {name: values[piece] for name, values in facts.items()},
                {name: values[bounds[name][first] : bounds[name][piece.stop]] for name, values in flat.items()},
                {"token_starts": starts["tokens"], "action_starts": starts["ref_logprobs"]},
            )
            first = piece.stop

    def _put_piece(
        self, facts: dict[str, np.ndarray], flat: dict[str, np.ndarray], starts: dict[str, np.ndarray]
    ) -> None:
        """starts: (k,) places in `flat`, by name in `PLACES`."""
        segment = self._segments.setdefault(self.added // self.segment_size, {n: Growing(d) for n, d in FLAT.items()})
        places = {
            "token_starts": starts["token_starts"] + segment["tokens"].size,
            "action_starts": starts["action_starts"] + segment["ref_logprobs"].size,
        }
        for name, values in flat.items():
            segment[name].extend(values)
        slot = self.added % self.capacity
        for name, values in (facts | places).items():
            column = self._columns[name]
            if slot < column.size:
                column.values[slot : slot + len(values)] = values
            else:
                column.extend(values)
        self.added += len(facts["lengths"])
        if self.added % self.segment_size == 0:
            self._seal(segment)
        self._segments.pop((self.added - len(self)) // self.segment_size - 1, None)

    def _seal(self, segment: Segment) -> None:
        """Nothing is added to it any more."""
        if self.scratch is None:
            for part in segment.values():
                part.trim()
            return
        try:
            self.scratch.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: torch.from_numpy(part.values) for name, part in segment.items()}, self.scratch)
            # Mapped, not read. The file lives on without its name as long as that, and no kill leaves one behind.
            mapped = load_file(self.scratch)
            self.scratch.unlink()
        except (OSError, SafetensorError) as error:
            self.scratch.unlink(missing_ok=True)
            raise RunError(
                f"stored episodes could not be written to {self.scratch.parent} ({error}); make room there, or keep "
                "them in memory (replay.storage: memory)"
            ) from error
        segment.update({name: Growing(FLAT[name], values.numpy()) for name, values in mapped.items()})

    # --- to disk and back -------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, np.ndarray]:
        """Everything as named arrays, which stay as they are while the store goes on; costs a copy of the columns.

        Entries `segment-000012/NAME` are views into segment 12: the same memory of the same length holds the same.
        """
        arrays = {
            "added": np.array([self.added]),
            "segment_size": np.array([self.segment_size]),
            "vocabulary": np.frombuffer(self.vocabulary, np.uint8).copy(),
        }
        arrays |= {name: column.values.copy() for name, column in self._columns.items()}
        for key, segment in self._segments.items():
            arrays |= {f"{SEGMENT}{key:06d}/{name}": part.values for name, part in segment.items()}
        return arrays

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Replaces the content by what `snapshot` returned.

        Episodes whose segment is missing are left out. Where the capacity is another, the newest that fit are kept.
        Raises UserError for tokens of another tokenizer, RunError for arrays that do not fit together.
        """
        found = arrays["vocabulary"].tobytes()
        if self.vocabulary and found and self.vocabulary != found:
            raise UserError(
                f"the stored episodes were written with another tokenizer (vocabulary {found.hex()[:12]}, this one is "
                f"{self.vocabulary.hex()[:12]}): their token ids would mean other words"
            )
        other = EpisodeStore(max(1, len(arrays["lengths"])), int(arrays["segment_size"][0]))
        other.added = int(arrays["added"][0])
        other._columns = {name: Growing(dtype, arrays[name].copy()) for name, dtype in COLUMNS.items()}
        other._segments = _segments_in(arrays)
        here = other._checked()
        if not here.all():
            logger.warning(
                "%d of %d stored episodes are left out: their segments are missing", (~here).sum(), len(here)
            )
        if here.all() and other.segment_size == self.segment_size and len(other) == min(other.added, self.capacity):
            self.added, self._columns, self._segments = other.added, other._columns, other._segments
        else:
            self._clear()
            self._take_over(other, np.flatnonzero(here), first=0)

    def flat_arrays(self) -> dict[str, np.ndarray]:
        """The whole content by slot, without segments: `load_flat` gives back an equal store."""
        columns = {name: self.column(name).copy() for name in COLUMNS if name not in PLACES}
        return {"added": np.array([self.added]), **columns, **self.flat(np.arange(len(self)))}

    def load_flat(self, arrays: dict[str, np.ndarray]) -> None:
        """Replaces the content by what `flat_arrays` returned; the newest that fit where the capacity is another."""
        count, added = len(arrays["lengths"]), int(arrays["added"][0])
        lengths = arrays["lengths"].astype(np.int64)
        actions = lengths - arrays["prompt_lengths"]
        facts = arrays | {"token_starts": lengths.cumsum() - lengths, "action_starts": actions.cumsum() - actions}
        other = EpisodeStore(max(1, count), segment_size=max(1, added))
        other.added = added
        other._columns = {name: Growing(dtype, facts[name]) for name, dtype in COLUMNS.items()}
        other._segments = {0: {name: Growing(dtype, arrays[name]) for name, dtype in FLAT.items()}}
        other._checked()
        self._clear()
        self._take_over(other, np.arange(count), first=0 if count < min(added, self.capacity) else added - count)

    def _take_over(self, other: "EpisodeStore", slots: np.ndarray, first: int) -> None:
        """Adds the newest episodes in these slots of another store, the oldest first and numbered from `first`."""
        slots = slots[np.argsort(other.numbers(slots), kind="stable")]
        self.added = first + max(0, len(slots) - self.capacity)
        if self.added:  # then the ring was or becomes full, and its slots are filled from somewhere in its middle
            for name, column in self._columns.items():
                column.extend(np.zeros(self.capacity, COLUMNS[name]))
        slots = slots[-self.capacity :]
        for begin in range(0, len(slots), self.segment_size):
            piece = slots[begin : begin + self.segment_size]
            facts = {name: column for name, column in other.rows(piece).items() if name not in PLACES}
            self.put(facts, other.flat(piece))

    def _checked(self) -> np.ndarray:
        """(n,) whether the segment of each slot is here. Raises RunError where columns and segments do not fit."""
        facts = {name: column.values for name, column in self._columns.items()}
        count = len(self)
        if any(len(values) != count for values in facts.values()):
            raise _unusable(f"columns of {sorted({len(v) for v in facts.values()})} rows for {count} episodes")
        if not (np.isfinite(facts["rewards"]).all() and np.isfinite(facts["priorities"]).all()):
            raise _unusable("it holds rewards or priorities that are not finite")
        actions = facts["lengths"] - facts["prompt_lengths"]
        if (actions < 1).any() or any((facts[name] < 0).any() for name in ("prompt_lengths", *PLACES)):
            raise _unusable("it holds lengths that cannot be")
        keys = self.numbers(np.arange(count)) // self.segment_size
        known = np.array(sorted(self._segments), dtype=np.int64)
        here = np.isin(keys, known)
        places = np.searchsorted(known, keys[here])
        for name in FLAT:
            ends = facts["token_starts"] + facts["lengths"] if name == "tokens" else facts["action_starts"] + actions
            sizes = np.array([self._segments[key][name].size for key in known.tolist()], dtype=np.int64)
            if (ends[here] > sizes[places]).any():
                raise _unusable(f"a segment has fewer {name} than its episodes")
        return here


def _unusable(why: str) -> RunError:
    return RunError(f"the stored replay cannot be used: {why}")


def _segments_in(arrays: dict[str, np.ndarray]) -> dict[int, Segment]:
    names: Sequence[str] = sorted({name.partition("/")[0] for name in arrays if name.startswith(SEGMENT)})
    return {
        int(name.removeprefix(SEGMENT)): {part: Growing(d, arrays[f"{name}/{part}"]) for part, d in FLAT.items()}
        for name in names
    }
