"""Each choice in the design against the default, on tuning prompts: what to change and what to leave."""

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np

from benchmarks.learning.cells import Cell
from benchmarks.learning.methods import TEXTBOOK
from benchmarks.learning.protocol import score
from benchmarks.learning.store import Store, among, run_missing

HALF = {"updates_per_collect": 16, "target_sync_steps": 32}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "nothing imagined": {"imagined": 0},
    "temperature 1 throughout": {"temperature": 1.0},
    "neither: as it was before": {"imagined": 0, "temperature": 1.0},
    "no trust region": {"target_kl": None},
    "trust region of 0.1 nats": {"target_kl": 0.1},
    "trust region of 0.4 nats": {"target_kl": 0.4},
    "no limit on successes": {"success_odds": 1e9},
    "no bound on reuse": {"target_kl": None, "success_odds": 1e9},
    "advantage weight 0": {"advantage_weight": 0.0},
    "advantage weight 1": {"advantage_weight": 1.0},
    "advantage weight 10": {"advantage_weight": 10.0},
    "learning rate / 2": {"learning_rate": 5e-5},
    "learning rate x 2": {"learning_rate": 2e-4},
    "half the updates": HALF,
    "twice the updates": {"updates_per_collect": 64},
    "as it was: 2e-5, weight 1, a quarter of the updates, neither bound": {
        **HALF,
        "prompts_per_collect": 64,
        "learning_rate": 2e-5,
        "advantage_weight": 1.0,
        "target_kl": None,
        "success_odds": 1e9,
    },
    "batch 32": {"per_device_train_batch_size": 32},
    "collects of 64, 64 updates each": {"prompts_per_collect": 64, "updates_per_collect": 64},
    "collects of 64, 32 updates each: as it was before": {"prompts_per_collect": 64},
    "learning from 32 on": {"learning_starts": 32},
    "beta 0.01": {"beta": 0.01},
    "beta 0.1": {"beta": 0.1},
    "lambda 1": {"lam": 1.0},
    "lambda 0.8": {"lam": 0.8},
    "right or wrong, whatever the rewards": {"negative_weight": 0.0, "success_share": 0.7},
    "grades, whatever the rewards": {"negative_weight": 1.0, "success_share": 0.0},
    "success share 0 (uniform replay)": {"success_share": 0.0},
    "success share 0.4": {"success_share": 0.4},
    "success share 0.9": {"success_share": 0.9},
    "prioritised replay": {"success_share": 0.0, "prioritized": True},
    "replay of 256": {"capacity": 256},
    "epsilon 1 to 0.05 in 32 steps": {"epsilon": {"start": 1.0, "end": 0.05, "steps": 32}},
    "4 completions a prompt": {"num_generations": 4, "prompts_per_collect": 16},
    "target lags the head only": {"target": "head"},
    "hard max over the prior's top 8": {"backup": "max", "support_top_k": 8},
    "double Q over the prior's top 8": {"backup": "max", "support_top_k": 8, "double": True},
    "one-step targets": {"n_step": 1},
    "uncorrected returns": {"corrected": False},
    "errors weigh the same however old": {"importance_sampling_cap": None},
    "uniform exploration": {"explore": "uniform"},
    "linear head, prior kept": {"q_head": "linear"},
    "the textbook, all switches": TEXTBOOK,
}


def cells(task: str, variant: str, seeds: int, budget: int) -> list[Cell]:
    marks = (budget // 4, budget // 2, budget)
    return [Cell(task, "online", "ours", VARIANTS[variant], seed, "tuning", marks) for seed in range(seeds)]


def run(
    store: Store, tasks: Sequence[str], variants: Sequence[str], seeds: int, budget: int, pool: Executor | None = None
) -> None:
    """Everything that is missing, variant after variant."""
    run_missing(store, [cell for name in variants for task in tasks for cell in cells(task, name, seeds, budget)], pool)


def table(store: Store, tasks: Sequence[str], seeds: int, budget: int, command: str) -> str:
    """Markdown: a row a variant that is through on any task."""
    known = store.read()
    marks = (budget // 4, budget)
    heads = ["variant", *(f"{task}, {mark:,}" for task in tasks for mark in marks), "KL a token"]
    lines = [
        f"`{command}`: score on tuning prompts after so many scored completions, mean over {seeds} seed(s) "
        "(least); each row changes only what it names.",
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    for variant in VARIANTS:
        found = {task: among(known, cells(task, variant, seeds, budget)) for task in tasks}
        through = {task: results for task, results in found.items() if results is not None}
        if not through:
            continue
        row = [_figures(through.get(task), place) for task in tasks for place in (0, -1)]
        kl = [result["points"][-1]["kl"] for results in through.values() for result in results]
        lines.append(f"| {' | '.join([variant, *row])} | {np.mean(kl):.2f} |")
    return "\n".join(lines)


def _figures(results: Sequence[dict[str, Any]] | None, place: int) -> str:
    if results is None:
        return ""
    scores = [score(result["points"][place]) for result in results]
    least = f" ({min(scores):.3f})" if len(scores) > 1 else ""
    return f"{np.mean(scores):.3f}{least}"
