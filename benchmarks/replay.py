"""What a replay costs as it grows: adding, drawing a batch, saving, loading, and bytes a transition.

    python -m benchmarks.replay --quick      # up to 10,000 episodes of 256 tokens
    python -m benchmarks.replay              # up to 100,000; 1 GB of disk

Writes `benchmarks/results/replay.json` and the table in `benchmarks/README.md`. Medians; CPU seconds but for the disk.
`benchmarks.checkpoint` measures what a run waits for.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import BATCH, COMPLETION, FRESH, PROMPT, RULES, Run, bytes_a_transition, collect, seconds
from benchmarks.tables import write_table
from benchmarks.textbook import machine
from llm_dqn.saver import Saver

RESULTS = Path(__file__).parent / "results" / "replay.json"
SIZES = (1_000, 10_000, 100_000)


def measure(episodes: int, folder: Path) -> dict[str, float]:
    """Milliseconds and bytes at a size."""
    run = Run(folder / str(episodes), episodes)
    started = time.process_time()
    collect(run.replay, FRESH, run.rng)
    figures = {"add an episode": 1e3 * (time.process_time() - started) / FRESH}
    sampling = run.sampling(50)
    figures |= {f"a batch of {BATCH}, {name}": 1e3 * sampling[name] for name in RULES}
    saved = run.save(Saver(run.root, keep=1))
    loads = [seconds(run._restore, saved) for _ in range(3)]
    shutil.rmtree(run.root)
    saves = []
    for _ in range(3):
        saves.append(seconds(run.save, Saver(run.root, keep=1)))
        saved = run.root / sorted(path.name for path in run.root.iterdir() if path.is_dir())[-1]
        sizes = bytes_a_transition(run, saved)
        shutil.rmtree(run.root)
    figures["save, with 26 MB of weights"] = 1e3 * statistics.median(saves)
    figures["check, read and restore"] = 1e3 * statistics.median(loads)
    return figures | {f"bytes a transition, {name}": value for name, value in sizes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        measured = {str(size): measure(size, folder) for size in (SIZES[:2] if options.quick else SIZES)}
    finally:
        shutil.rmtree(folder)
    results = {
        "command": "python -m benchmarks.replay" + (" --quick" if options.quick else ""),
        "machine": machine(),
        "tokens_an_episode": PROMPT + COMPLETION,
        "episodes": measured,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_table("replay", table(results))
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    facts, measured = results["machine"], results["episodes"]
    lines = [
        f"`{results['command']}`: episodes of {results['tokens_an_episode']} tokens, {facts['cores']} cores, "
        f"{facts['threads']} thread(s); milliseconds, and bytes where it says so.",
        "",
        "| | " + " | ".join(f"{int(size):,} episodes" for size in measured) + " |",
        "|---" * (1 + len(measured)) + "|",
    ]
    first = next(iter(measured.values()))
    for name in first:
        digits = 1 if name.startswith("bytes") else 2
        lines.append(f"| {name} | " + " | ".join(f"{one[name]:,.{digits}f}" for one in measured.values()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
