"""What a replay costs as it grows: adding, drawing a batch, saving, loading, bytes a transition, and memory.

    python -m benchmarks.replay --quick      # up to 10,000 episodes of 256 tokens, and as many on disk
    python -m benchmarks.replay              # up to 100,000, and a million on disk; 7 GB of disk

Writes `benchmarks/results/replay.json` and the table in `benchmarks/README.md`. Medians; CPU seconds but for the disk.
Each size in a process of its own. Memory is what the process takes beside that of an empty buffer: pages of its own,
which it cannot do without; pages of mapped files are the system's cache and not counted (Linux).
`benchmarks.checkpoint` measures what a run waits for.
"""

import argparse
import multiprocessing
import shutil
import statistics
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import (
    BATCH,
    COMPLETION,
    FRESH,
    PROMPT,
    RULES,
    Run,
    bytes_a_transition,
    collect,
    seconds,
    written,
)
from benchmarks.tables import publish
from benchmarks.textbook import machine
from llm_dqn.checkpoint import checkpoint_folder
from llm_dqn.saver import Saver

QUICK = ((1_000, "memory"), (10_000, "memory"), (10_000, "disk"))
WHERE = {"memory": "in memory", "disk": "on disk"}
FULL = ((1_000, "memory"), (10_000, "memory"), (100_000, "memory"), (100_000, "disk"), (1_000_000, "disk"))


def own_pages() -> float:
    """MB of memory of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e3


class Watch:
    """The most memory that was seen while it was on."""

    def __enter__(self) -> "Watch":
        self.peak, self._end = own_pages(), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._end.wait(0.05):
            self.peak = max(self.peak, own_pages())

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def measure(episodes: int, storage: str, folder: Path) -> dict[str, float]:
    """Milliseconds, bytes and MB at a size."""
    run = Run(folder / "checkpoints", episodes, storage == "disk")
    empty = own_pages()
    with Watch() as filling:
        took = seconds(collect, run.replay, episodes, run.rng)
    figures = {"fill it, random numbers included": 1e3 * took}
    fresh = written(FRESH, run.rng)
    started = time.process_time()
    run.replay.add(fresh)
    figures["add an episode"] = 1e3 * (time.process_time() - started) / FRESH
    sampling = run.sampling(50)
    figures |= {f"a batch of {BATCH}, {name}": 1e3 * sampling[name] for name in RULES}
    saves, loads = [], []
    with Watch() as saving:
        for _ in range(1 if episodes > 100_000 else 3):
            shutil.rmtree(run.root, ignore_errors=True)
            saver = Saver(run.root, keep=1)
            saves.append(seconds(run.save, saver))
            loads.append(seconds(run.restore, checkpoint_folder(run.root, run.step)))
    figures["save, with 26 MB of weights"] = 1e3 * statistics.median(saves)
    collect(run.replay, FRESH, run.rng)
    figures[f"save again, after {FRESH} episodes"] = 1e3 * seconds(run.save, saver)
    figures["check, read and restore"] = 1e3 * statistics.median(loads)
    sizes = bytes_a_transition(run, checkpoint_folder(run.root, run.step))
    figures |= {f"bytes a transition, {name}": value for name, value in sizes.items()}
    figures["MB of a checkpoint"] = sizes["in a checkpoint"] * len(run.replay) * COMPLETION / 1e6
    figures["MB of memory, filled"] = filling.peak - empty
    return figures | {"MB of memory, saved and loaded beside it": saving.peak - empty}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    measured = {}
    for size, storage in QUICK if options.quick else FULL:
        folder = Path(tempfile.mkdtemp())
        try:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                measured[f"{size:,} {WHERE[storage]}"] = process.submit(measure, size, storage, folder).result()
        finally:
            shutil.rmtree(folder)
    results = {
        "command": "python -m benchmarks.replay" + (" --quick" if options.quick else ""),
        "machine": machine(),
        "tokens_an_episode": PROMPT + COMPLETION,
        "episodes": measured,
    }
    publish("replay", results, table(results))


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    facts, measured = results["machine"], results["episodes"]
    lines = [
        f"`{results['command']}`: episodes of {results['tokens_an_episode']} tokens, {facts['cores']} cores, "
        f"{facts['threads']} thread(s); milliseconds, and bytes or MB where it says so.",
        "",
        "| episodes | " + " | ".join(measured) + " |",
        "|---" * (1 + len(measured)) + "|",
    ]
    first = next(iter(measured.values()))
    for name in first:
        digits = 1 if name.startswith(("bytes", "MB")) else 2
        lines.append(f"| {name} | " + " | ".join(f"{one[name]:,.{digits}f}" for one in measured.values()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
