"""An update of the output layer alone, with its hidden states computed each time and with them kept.

    python -m benchmarks.head_only --quick   # 2 layers, two rounds; a minute, 5 GB
    python -m benchmarks.head_only           # 12 layers, five rounds; 8 GB

The quickstart's model, and Qwen2.5-0.5B's shapes with fewer layers and random weights, float32, one thread. The
variants of a head take turns in one process: CPU seconds, medians over the rounds, ratios within a round. Writes
`benchmarks/results/head_only.json` and the table in `benchmarks/README.md`.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.tables import publish
from benchmarks.textbook import machine
from benchmarks.update import batch, learning, model
from llm_dqn.models import load_causal_lm
from llm_dqn.network import QNetwork
from llm_dqn.types import PrefixBatch

STILL = {"learning_rate": 0.0, "value_learning_rate": 0.0}  # every update is of the same network
LIMIT = 10**9  # bytes of kept states, more than these batches need
COMPUTED, FIRST, KEPT = "states computed", "states computed and kept", "kept states"
ALL_LAYERS = "adapters in all layers"
# head -> (settings, modules with an adapter)
HEADS: dict[str, tuple[dict[str, Any], list[str]]] = {"lm": ({}, ["lm_head"]), "linear": ({"q_head": "linear"}, [])}


@dataclass(frozen=True)
class Shape:
    """A model and the episodes of one update."""

    base: Callable[[], PreTrainedModel]
    tokens: int
    episodes: int
    prompt: int
    completion: int
    updates: int  # timed together

    def batch(self) -> PrefixBatch:
        """Random episodes of equal length."""
        return batch(self.tokens, self.episodes, self.prompt, self.completion)


def shapes(layers: int) -> dict[str, Shape]:
    """By the name that the table shows."""
    tiny = partial(load_causal_lm, "data/tiny_lm")
    qwen = partial(model, 151_936, layers)
    return {
        "quickstart": Shape(tiny, 1_792, episodes=16, prompt=8, completion=32, updates=8),
        f"Qwen2.5-0.5B, {layers} layers": Shape(qwen, 151_936, episodes=4, prompt=128, completion=128, updates=1),
    }


def measure(shape: Shape, head: str, rounds: int) -> dict[str, Any]:
    """Seconds of every variant, round after round, and bytes that an episode's states take."""
    settings, modules = HEADS[head]
    settings = settings | STILL
    network, step = learning(shape.base(), shape.tokens, settings, modules)
    given = shape.batch()

    def computed() -> None:
        network.hidden_cache = None
        step(given)

    def first() -> None:
        keep(network)
        step(given)

    def kept() -> None:
        step(given)  # by what `first` left

    variants = {COMPUTED: computed, FIRST: first, KEPT: kept}
    if head == "lm":
        whole = learning(shape.base(), shape.tokens, settings)[1]
        variants = {ALL_LAYERS: partial(whole, given), **variants}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-1, rounds):
        for name, work in variants.items():
            started = time.process_time()
            for _ in range(shape.updates):
                work()
            if number >= 0:  # the first round warms up
                seconds[name].append((time.process_time() - started) / shape.updates)
    cache = network.hidden_cache
    assert cache is not None
    return {
        "seconds": {name: statistics.median(taken) for name, taken in seconds.items()},
        "ratios": {
            name: statistics.median(mine / base for mine, base in zip(taken, seconds[COMPUTED], strict=True))
            for name, taken in seconds.items()
        },
        "rounds": seconds,
        "bytes_an_episode": cache.held // len(cache),
    }


def keep(network: QNetwork) -> None:
    """Nothing is kept yet."""
    network.hidden_cache = None
    if not network.keep_hidden_states(LIMIT):
        raise RuntimeError("the trunk is tuned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, about itself
    layers, rounds = options.layers or (2 if options.quick else 12), options.rounds or (2 if options.quick else 5)
    measured = {name: {head: measure(shape, head, rounds) for head in HEADS} for name, shape in shapes(layers).items()}
    results = {
        "command": " ".join(["python -m benchmarks.head_only", *sys.argv[1:]]),
        "machine": machine(),
        "rounds": rounds,
        "shapes": measured,
    }
    publish("head_only", results, table(results))


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    facts, measured = results["machine"], results["shapes"]
    lines = [
        f"`{results['command']}`: 16 episodes of 8 and 32 tokens by the quickstart's model, 4 of 128 and 128 by the "
        f"other, float32, {results['rounds']} rounds, {facts['threads']} thread, torch {facts['torch']}; CPU seconds "
        f"of an update, and the ratio to that with {COMPUTED}.",
        "",
        "| | " + " | ".join(measured) + " |",
        "|---" * (1 + len(measured)) + "|",
    ]
    for head in HEADS:
        for variant in next(iter(measured.values()))[head]["seconds"]:
            found = [one[head] for one in measured.values()]
            cells = [f"{one['seconds'][variant]:.3f} s, {one['ratios'][variant]:.2f}" for one in found]
            what = variant if variant == ALL_LAYERS else f"output layer alone, {variant}"
            lines.append(f"| {head}, {what} | " + " | ".join(cells) + " |")
    sizes = [f"{one['lm']['bytes_an_episode'] / 1e3:,.0f} kB" for one in measured.values()]
    lines.append("| what is kept of an episode | " + " | ".join(sizes) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
