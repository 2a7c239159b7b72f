"""What safety costs: checkpoints of a large replay, and drawing batches from it.

    python -m benchmarks.checkpoint             # 100,000 episodes of 256 tokens; 2 GB of disk, about two minutes

A ring of episodes (32 prompt and 224 completion tokens) is filled and saved with the weights of a LoRA adapter. Then
512 more are collected, which overwrite the oldest, and it is saved again, as between two checkpoints of a run: once
while everything waits for it, and once beside a training that goes on. Writes `benchmarks/results/checkpoint.json` and
the table in `benchmarks/README.md`.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.tables import publish
from benchmarks.textbook import machine
from llm_dqn import checkpoint
from llm_dqn.replay import PrefixReplay, SamplingRule, prioritized, success_biased, uniform
from llm_dqn.saver import Saver
from llm_dqn.types import Episode

PROMPT, COMPLETION, FRESH, BATCH = 32, 224, 512, 32
WEIGHTS = 2_200_000  # LoRA of rank 16 on a model of half a billion parameters
RULES: dict[str, SamplingRule] = {
    "uniform": uniform(),
    "success-biased": success_biased(0.5),
    "prioritised": prioritized(),
}


def seconds(work: Callable[..., Any], *given: Any) -> float:
    """How long it takes."""
    started = time.perf_counter()
    work(*given)
    return time.perf_counter() - started


def written(count: int, rng: np.random.Generator) -> list[Episode]:
    """Random episodes."""
    ids = torch.from_numpy(rng.integers(0, 151_936, (count, PROMPT + COMPLETION)))
    logprobs = torch.from_numpy(rng.standard_normal((count, COMPLETION), dtype=np.float32))
    return [
        Episode("", "", row[:PROMPT], row[PROMPT:], of_row, of_row, "length", reward=float(rng.random()))
        for row, of_row in zip(ids, logprobs, strict=True)
    ]


def collect(replay: PrefixReplay, count: int, rng: np.random.Generator) -> None:
    """Adds random episodes, as many at a time as a run does."""
    for start in range(0, count, FRESH):
        replay.add(written(min(FRESH, count - start), rng))


class Run:
    """A replay and weights, saved as a run saves them."""

    def __init__(self, root: Path, episodes: int, on_disk: bool = False) -> None:
        self.rng, self.root = np.random.default_rng(0), root
        self.scratch = root.with_name(root.name + ".segment") if on_disk else None
        self.replay = PrefixReplay(episodes, scratch=self.scratch)
        self.weights = torch.randn(WEIGHTS)
        self.moments = torch.randn(2, WEIGHTS)
        self.step = 0

    def save(self, saver: Saver, beside: bool = False) -> Path:
        """The next checkpoint, with a copy of all that changes in place."""
        self.step += 1
        parts = {
            "network": {"weights": self.weights.clone()},
            "optimizer": {"moments": self.moments.clone()},
            "replay-00000": checkpoint.as_tensors(self.replay.snapshot()),
        }
        saver.save(self.step, {}, parts, {}, beside)
        return checkpoint.checkpoint_folder(self.root, self.step)

    def measure(self, repeats: int) -> dict[str, list[float]]:
        """Seconds, a list a quantity."""
        taken: dict[str, list[float]] = {}

        def note(name: str, value: float) -> None:
            taken.setdefault(name, []).append(value)

        for _ in range(repeats):
            shutil.rmtree(self.root, ignore_errors=True)
            saver = Saver(self.root, keep=2)
            note("first checkpoint", seconds(self.save, saver))
            collect(self.replay, FRESH, self.rng)
            note("next checkpoint", seconds(self.save, saver))
            collect(self.replay, FRESH, self.rng)
            quiet = [seconds(_train) for _ in range(20)]
            note("training waits", seconds(self.save, saver, True))
            busy = []
            while saver._thread is not None and saver._thread.is_alive():
                busy.append(seconds(_train))
            saver.finish()
            note("a step of training", statistics.median(quiet))
            note("the same while one is written", statistics.median(busy or quiet))
            newest = checkpoint.checkpoint_folder(self.root, self.step)
            note("checked, read and restored", seconds(self.restore, newest))
        return taken

    def restore(self, folder: Path) -> None:
        """As a run that goes on from there."""
        _, parts = checkpoint.read(folder)
        checkpoint.restore_replay(PrefixReplay(self.replay.capacity, scratch=self.scratch), parts, rank=0, world=1)

    def sampling(self, repeats: int) -> dict[str, float]:
        """Seconds a batch by rule."""
        rngs = [np.random.default_rng(i) for i in range(repeats)]
        return {
            name: statistics.median(seconds(self.replay.sample, BATCH, rng, rule) for rng in rngs)
            for name, rule in RULES.items()
        }


def _train(size: int = 700) -> None:
    """Some arithmetic, as long as a step on a very small model."""
    matrix = torch.ones(size, size)
    for _ in range(4):
        matrix = matrix @ matrix / size


def bytes_a_transition(run: Run, folder: Path) -> dict[str, float]:
    """As stored and in a checkpoint, beside the token ids alone and a buffer that stores each prefix by itself."""
    transitions = len(run.replay) * COMPLETION
    on_disk = sum(file.stat().st_size for file in folder.glob("replay-*"))
    prefixes = sum(4 * (PROMPT + t) for t in range(1, COMPLETION + 1)) / COMPLETION
    return {
        "stored": run.replay.store.nbytes / transitions,
        "in a checkpoint": on_disk / transitions,
        "token ids alone": 4 * (PROMPT + COMPLETION) / COMPLETION,
        "every prefix by itself": prefixes + 4 + 4,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one otherwise")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        run = Run(folder / "checkpoints", options.episodes)
        collect(run.replay, options.episodes, run.rng)
        taken = run.measure(options.repeats)
        newest = checkpoint.checkpoint_folder(run.root, run.step)
        results = {
            "command": "python -m benchmarks.checkpoint",
            "machine": machine(),
            "episodes": options.episodes,
            "tokens_an_episode": PROMPT + COMPLETION,
            "seconds": {name: statistics.median(values) for name, values in taken.items()},
            "all_seconds": taken,
            "sampling_seconds": run.sampling(50),
            "bytes_a_transition": bytes_a_transition(run, newest),
            "checkpoint_bytes": sum(file.stat().st_size for file in newest.iterdir()),
            "new_bytes": sum(file.stat().st_size for file in newest.iterdir() if file.stat().st_nlink == 1),
        }
    finally:
        shutil.rmtree(folder)
    publish("checkpoint", results, table(results))


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    took, sizes, facts = results["seconds"], results["bytes_a_transition"], results["machine"]
    drawn = results["sampling_seconds"]
    rows = [
        (
            "first checkpoint, waited for",
            f"{took['first checkpoint']:.2f} s, {results['checkpoint_bytes'] / 1e6:.0f} MB",
        ),
        (
            f"next one, after {FRESH} episodes",
            f"{took['next checkpoint']:.2f} s, {results['new_bytes'] / 1e6:.0f} MB new",
        ),
        ("next one beside the training: training waits", f"{1e3 * took['training waits']:.0f} ms"),
        (
            "a step of 10 to 50 ms of arithmetic, alone and while one is written",
            f"{1e3 * took['a step of training']:.0f} ms, {1e3 * took['the same while one is written']:.0f} ms",
        ),
        ("checked, read and restored", f"{took['checked, read and restored']:.2f} s"),
        *((f"a batch of {BATCH}, {name}", f"{1e3 * value:.2f} ms") for name, value in drawn.items()),
        *((f"bytes a transition, {name}", f"{value:.1f}") for name, value in sizes.items()),
    ]
    lines = [
        f"`{results['command']}`: {results['episodes']:,} episodes of {results['tokens_an_episode']} tokens, "
        f"{facts['cores']} cores, {facts['threads']} thread(s), torch {facts['torch']}; medians.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
