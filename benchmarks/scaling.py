"""What an update costs as completions, batches and vocabularies grow, with the exponent of each.

    python -m benchmarks.scaling             # one layer of Qwen2.5-0.5B, head lm

Writes `benchmarks/results/scaling.json` and the table in `benchmarks/README.md`. CPU seconds on one thread, the least
of three repeats: what other work on the machine adds is no part of the law.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch

from benchmarks.tables import publish
from benchmarks.textbook import machine
from benchmarks.update import Step, batch, ours
from llm_dqn.types import PrefixBatch

TOKENS, EPISODES, PROMPT, COMPLETION = 8_000, 4, 16, 64
GROWING: dict[str, list[int]] = {
    "completion tokens": [32, 64, 128, 256, 512],
    "episodes": [2, 4, 8, 16, 32],
    "vocabulary": [8_000, 16_000, 32_000, 64_000, 128_000],
}


def seconds(step: Step, given: PrefixBatch) -> float:
    """The least CPU seconds of three updates."""
    taken = []
    for _ in range(3):
        started = time.process_time()
        step(given)
        taken.append(time.process_time() - started)
    return min(taken)


def grown_vocabulary(tokens: int) -> float:
    """An update's CPU seconds at another vocabulary."""
    step = ours(tokens, 1, {})
    step(batch(tokens, 1, 2, 2))
    return seconds(step, batch(tokens, EPISODES, PROMPT, COMPLETION))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    step = ours(TOKENS, 1, {})
    step(batch(TOKENS, 1, 2, 2))
    measured = {
        "completion tokens": {
            n: seconds(step, batch(TOKENS, EPISODES, PROMPT, n)) for n in GROWING["completion tokens"]
        },
        "episodes": {n: seconds(step, batch(TOKENS, n, PROMPT, COMPLETION)) for n in GROWING["episodes"]},
        "vocabulary": {n: grown_vocabulary(n) for n in GROWING["vocabulary"]},
    }
    exponents = {
        name: float(np.polyfit(np.log(list(taken)), np.log(list(taken.values())), 1)[0])
        for name, taken in measured.items()
    }
    results = {
        "exponents": exponents,
        "command": "python -m benchmarks.scaling",
        "machine": machine(),
        "otherwise": {"vocabulary": TOKENS, "episodes": EPISODES, "prompt": PROMPT, "completion tokens": COMPLETION},
        "seconds": measured,
    }
    publish("scaling", results, table(results))


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    facts, rest = results["machine"], results["otherwise"]
    lines = [
        f"`{results['command']}`: one layer, head lm, {rest['episodes']} episodes of {rest['prompt']} prompt and "
        f"{rest['completion tokens']} completion tokens and a vocabulary of {rest['vocabulary']:,} unless it is what "
        f"grows; {facts['threads']} thread, torch {facts['torch']}.",
        "",
        "| what grows | CPU seconds | exponent |",
        "|---|---|---|",
    ]
    for name, taken in results["seconds"].items():
        cells = ", ".join(f"{int(size):,}: {took:.2f}" for size, took in taken.items())
        lines.append(f"| {name} | {cells} | {results['exponents'][name]:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
