"""The file that remembers finished cells, and the running of those that are missing, several at a time."""

import fcntl
import json
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.learning.cells import Cell, run


class Store:
    """A file of JSON lines, one a finished cell. Several processes may add to it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> dict[str, dict[str, Any]]:
        """Finished cells by key."""
        if not self.file.exists():
            return {}
        with self.file.open(encoding="utf-8") as stored:
            fcntl.flock(stored, fcntl.LOCK_SH)
            lines = [json.loads(line) for line in stored]
        return {line["key"]: line for line in lines}

    def add(self, key: str, result: dict[str, Any]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as out:
            fcntl.flock(out, fcntl.LOCK_EX)
            out.write(json.dumps({"key": key, **result}) + "\n")
            out.flush()
            os.fsync(out.fileno())


def among(known: Mapping[str, dict[str, Any]], cells: Sequence[Cell]) -> list[dict[str, Any]] | None:
    """The results of cells, in order; None where not all of them are known."""
    keys = [cell.key for cell in cells]
    return [known[key] for key in keys] if set(keys) <= known.keys() else None


@contextmanager
def workers(count: int) -> Iterator[Executor | None]:
    """So many processes of one thread each that run cells; None where the calling process is to do it alone.

    After an error nothing new is begun, and what is under way is finished and kept.
    """
    if count == 1:
        yield None
        return
    pool = ProcessPoolExecutor(
        count, mp_context=multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def run_missing(store: Store, cells: Sequence[Cell], pool: Executor | None = None) -> list[dict[str, Any]]:
    """The results of all cells, in order; those that are not in the store are run and put there."""
    known = store.read()
    missing = [cell for cell in cells if cell.key not in known]
    if pool is None:
        for cell in missing:
            _run_and_keep(store, cell)
    else:
        for future in [pool.submit(_run_and_keep, store, cell) for cell in missing]:
            future.result()
    known = store.read()
    return [known[cell.key] for cell in cells]


def _run_and_keep(store: Store, cell: Cell) -> None:
    key = cell.key
    if key in store.read():  # another process was faster
        return
    result = run(cell)
    store.add(key, result)
    last = result["points"][-1]
    print(
        f"{cell.task} {cell.regime} {cell.method} {cell.part} seed {cell.seed} {cell.settings}: "
        f"reward {last['reward']:.3f}, greedy {last['greedy']:.3f}"
        + (f", exact {last['exact']:.3f}" if "exact" in last else "")
        + f", {last['seconds']:.0f} s of CPU, {result['wall']:.0f} s",
        flush=True,
    )
