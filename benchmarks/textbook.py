"""Every textbook switch against the default, on the quickstart's task at the same number of scored completions.

    python -m benchmarks.textbook --quick      # one seed, 512 completions, 128 prompts
    python -m benchmarks.textbook              # three seeds, 2,048 completions, 256 prompts

Writes `benchmarks/results/textbook.json` as it goes (finished runs are not run again) and the table in
`benchmarks/README.md`.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import write_table
from llm_dqn.recipe import load_recipe
from llm_dqn.trainer import DQNTrainer

RESULTS = Path(__file__).parent / "results" / "textbook.json"

TEXTBOOK = [
    "dqn.q_head=linear",
    "dqn.prior=uniform",
    "dqn.backup=max",
    "dqn.n_step=1",
    "dqn.loss=huber",
    "dqn.target=head",
    "dqn.advantage_weight=0",
    "replay.success_share=0",
    "replay.target_kl=null",
    "replay.updates_per_collect=16",
    "dqn.target_sync_steps=32",
    "rollout.explore=uniform",
    "rollout.temperature=0",
]
VARIANTS: dict[str, list[str]] = {
    "default": [],
    "one-step targets": ["dqn.n_step=1"],
    "uncorrected returns": ["dqn.corrected=false"],
    "hard max over the prior's top 8": ["dqn.backup=max", "dqn.support_top_k=8"],
    "double Q over the prior's top 8": ["dqn.backup=max", "dqn.support_top_k=8", "dqn.double=true"],
    "linear head, prior kept": ["dqn.q_head=linear"],
    "no advantage-weighted term": ["dqn.advantage_weight=0"],
    "uniform replay": ["replay.success_share=0"],
    "no trust region": ["replay.target_kl=null"],
    "prioritised replay": ["replay.success_share=0", "replay.prioritized=true"],
    "target lags the head only": ["dqn.target=head"],
    "uniform exploration": ["rollout.explore=uniform"],
    "Huber loss": ["dqn.loss=huber"],
    "the textbook, all switches": TEXTBOOK,
    "the textbook with double Q": [*TEXTBOOK, "dqn.double=true"],
}
FIGURES = ("reward", "reward_greedy", "kl", "perplexity", "length", "distinct_2")


def run(overrides: list[str], seed: int, completions: int, prompts: int) -> dict[str, Any]:
    """One training run; what its `evaluation.json` says, and its CPU seconds."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = [
            f"train.output_dir={folder}/run",
            f"train.seed={seed}",
            f"train.max_scored_completions={completions}",
            "train.max_steps=1000000",
            "rollout.prompts_per_collect=64",
            "train.eval_steps=0",
            "train.save_steps=0",
            f"train.final_eval_prompts={prompts}",
        ]
        trainer = DQNTrainer.from_recipe(load_recipe("quickstart", [*fixed, *overrides]))
        started = time.process_time()
        report = trainer.train()
        return {**report, "cpu_seconds": time.process_time() - started}


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="run everything again")
    parser.add_argument("--only", nargs="*", help="names of variants")
    options = parser.parse_args()
    seeds, completions, prompts = ([0], 512, 128) if options.quick else ([0, 1, 2], 2048, 256)
    results = {} if options.fresh or not RESULTS.exists() else json.loads(RESULTS.read_text())
    key = f"{completions} completions"
    done = results.setdefault(key, {"machine": machine(), "command": "python -m benchmarks.textbook", "runs": {}})
    if options.quick:
        done["command"] += " --quick"
    for name, overrides in VARIANTS.items():
        if options.only and name not in options.only:
            continue
        for seed in seeds:
            runs = done["runs"].setdefault(name, {})
            if str(seed) not in runs:
                runs[str(seed)] = run(overrides, seed, completions, prompts)
                RESULTS.parent.mkdir(exist_ok=True)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(name, seed, {figure: round(runs[str(seed)]["tuned"][figure], 3) for figure in FIGURES}, flush=True)
    write_table("textbook", table(key, done))


def table(key: str, done: dict[str, Any]) -> str:
    """Markdown: a row a variant, means over seeds with the worst seed beside the reward."""
    facts = done["machine"]
    base = [run["base"] for run in done["runs"]["default"].values()]
    lines = [
        f"`{done['command']}`, {key}, {len(base)} seed(s), {facts['cores']} cores, {facts['threads']} thread(s), "
        f"torch {facts['torch']}.",
        "",
        "| variant | reward, sampled | worst seed | reward, greedy | KL a token | perplexity | length | distinct-2 |",
        "|---|---|---|---|---|---|---|---|",
        _row("base model", base),
    ]
    lines += [_row(name, [run["tuned"] for run in runs.values()]) for name, runs in done["runs"].items()]
    return "\n".join(lines)


def _row(name: str, figures: list[dict[str, float]]) -> str:
    mean = {figure: sum(one[figure] for one in figures) / len(figures) for figure in FIGURES}
    cells = [f"{mean['reward']:.3f}", f"{min(one['reward'] for one in figures):.3f}", f"{mean['reward_greedy']:.3f}"]
    cells += [f"{mean['kl']:.2f}", f"{mean['perplexity']:.1f}", f"{mean['length']:.1f}", f"{mean['distinct_2']:.2f}"]
    return f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
