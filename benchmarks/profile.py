"""Where a step of the quickstart spends its time.

    python -m benchmarks.profile             # 48 steps with three collects

Writes `benchmarks/results/profile.json` and the table in `benchmarks/README.md`. CPU seconds on one thread; a part that
is asked within another counts for itself only.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.tables import publish
from benchmarks.textbook import machine
from llm_dqn.recipe import load_recipe
from llm_dqn.trainer import DQNTrainer

STEPS = 48
ARITHMETIC = ("generation", "log-probabilities", "target pass", "online forward", "backward", "clip and AdamW", "KL")


class Clock:
    """CPU seconds by name; what runs within a named part and has a name itself is taken off that part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.open: list[float] = []  # seconds of named parts within each part that is running

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Counts the time of a method."""
        plain: Callable[..., Any] = getattr(owner, method)

        def timed(*given: Any, **named: Any) -> Any:
            started = time.process_time()
            self.open.append(0.0)
            try:
                return plain(*given, **named)
            finally:
                taken = time.process_time() - started
                within = self.open.pop()
                self.seconds[name] = self.seconds.get(name, 0.0) + taken - within
                if self.open:
                    self.open[-1] += taken

        setattr(owner, method, timed)


def profile() -> dict[str, float]:
    """CPU seconds of the loop of a short quickstart, by part."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"train.max_steps={STEPS}", "train.eval_steps=0", "train.save_steps=0", "train.logging_steps=16"]
        trainer = DQNTrainer.from_recipe(load_recipe("quickstart", [f"train.output_dir={folder}/run", *fixed]))
        trainer.begin(resume=False)
        parts, network = trainer.parts, trainer.network
        clock.wrap(network.roles.plain("online"), "generate", "generation")
        clock.wrap(network, "logprobs", "log-probabilities")
        clock.wrap(network, "target", "target pass")
        clock.wrap(network, "forward", "online forward")
        clock.wrap(network, "kl", "KL")
        clock.wrap(network, "sync_target", "target sync")
        clock.wrap(parts.accelerator, "backward", "backward")
        clock.wrap(parts.accelerator, "clip_grad_norm_", "clip and AdamW")
        clock.wrap(parts.optimizer, "step", "clip and AdamW")
        clock.wrap(parts.rewards, "score", "rewards")
        clock.wrap(parts.replay, "sample", "replay")
        clock.wrap(parts.replay, "add", "replay")
        clock.wrap(trainer, "save_checkpoint", "checkpoint")
        clock.wrap(trainer, "learn", "everything else")
        trainer.learn()
        trainer.logbook.close()
    return clock.seconds


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    seconds = profile()
    total = sum(seconds.values())
    results = {
        "model_arithmetic": sum(seconds[name] for name in ARITHMETIC) / total,
        "command": "python -m benchmarks.profile",
        "machine": machine(),
        "steps": STEPS,
        "seconds": seconds,
    }
    publish("profile", results, table(results))


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    total, facts = sum(results["seconds"].values()), results["machine"]
    ordered = sorted(results["seconds"].items(), key=lambda item: -item[1])
    return "\n".join(
        [
            f"`{results['command']}`: {results['steps']} steps, {total / results['steps'] * 1e3:.0f} ms each, "
            f"{facts['threads']} thread, torch {facts['torch']}. Model arithmetic (generation, log-probabilities and "
            f"update): {results['model_arithmetic']:.0%}.",
            "",
            "| part | share | ms a step |",
            "|---|---|---|",
            *(f"| {name} | {took / total:.1%} | {took / results['steps'] * 1e3:.1f} |" for name, took in ordered),
        ]
    )


if __name__ == "__main__":
    main()
