"""Writing while learning: the same completions scored and the same learner steps, with and without `rollout.overlap`.

    python -m benchmarks.overlap                # under three minutes on two free cores

The quickstart's model, prompts and judge, in its proportions (4 completions a learner step) but with collections half
as large, so that a short run has six of them. Two regimes: its own judge, which costs little, and a judge that takes 50
ms a completion, as one behind a network does. Only the loop is timed, the collectors' start within it. One thread a
process. Writes `benchmarks/results/overlap.json` and the table in `benchmarks/README.md`.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.apart import facts_of
from benchmarks.tables import publish
from benchmarks.textbook import machine

STEPS, UPDATES, PROMPTS = 48, 8, 32
SECONDS = 0.05  # a completion
JUDGE = "data/tiny_reward_model"
REGIMES = {
    "the quickstart's own judge": [JUDGE],
    f"a judge that takes {SECONDS * 1000:.0f} ms a completion": [JUDGE, "benchmarks/overlap.py:slow"],
}


def slow(completions: list[str], **columns: Any) -> list[float]:
    """Adds nothing to the reward but time, in which nobody computes."""
    time.sleep(SECONDS * len(completions))
    return [0.0] * len(completions)


def work(output: Path, overlap: int, rewards: str, steps: int) -> None:
    """One run; notes what its loop took."""
    import torch

    from llm_dqn.recipe import load_recipe
    from llm_dqn.trainer import DQNTrainer

    torch.set_num_threads(1)
    settings = [f"rollout.overlap={overlap}", f"reward.funcs=[{rewards}]", "reward.cache=false"]
    settings += [f"rollout.prompts_per_collect={PROMPTS}", f"replay.learning_starts={PROMPTS}"]
    settings += [f"replay.updates_per_collect={UPDATES}", f"train.max_steps={steps}", f"train.logging_steps={steps}"]
    settings += [f"train.output_dir={output}.run", "train.eval_steps=0", "train.save_steps=0"]
    settings += ["replay.target_kl=null"]  # collections at fixed steps: the same work with overlap and without
    run = DQNTrainer.from_recipe(load_recipe("quickstart", settings))
    with run.processes:
        run.begin(resume=False)
        busy, began = time.process_time(), time.perf_counter()
        with run.source_open():
            run.learn()
        facts = {"seconds": time.perf_counter() - began, "learner_processor_seconds": time.process_time() - busy}
    run.logbook.close()
    (line,) = (json.loads(text) for text in Path(f"{output}.run", "metrics.jsonl").read_text().splitlines())
    facts |= {"completions": run.scored_completions, "steps": run.step, "idle_share": line["train/idle_share"]}
    facts |= {"staleness": line.get("replay/staleness", 0.0), "replay_age": line["replay/age"]}
    output.write_text(json.dumps(facts))


def measure(overlap: int, rewards: list[str], steps: int) -> dict[str, Any]:
    """A run in processes of its own."""
    words = ["--overlap", str(overlap), "--rewards", ",".join(rewards), "--steps", str(steps)]
    return facts_of("-m", "benchmarks.overlap", *words)


def median(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.median(run[name] for run in runs)


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    rows, loads = [], []
    for regime, runs in results["runs"].items():
        for overlap, part in runs.items():
            loads += [run["load_before"] for run in part]
            ratio = median(part, "seconds") / median(runs["0"], "seconds")
            names = ("seconds", "learner_processor_seconds", "idle_share", "staleness")
            seconds, busy, idle, stale = (median(part, name) for name in names)
            rows.append(
                f"| {regime} | {overlap} | {seconds:.1f} | {ratio:.2f} | {busy:.1f} | {idle:.0%} | {stale:.1f} |"
            )
    facts, one = results["machine"], next(iter(results["runs"].values()))["0"][0]
    shared = " Other work was running beside it: a free machine is to be measured again." if max(loads) > 2.5 else ""
    return "\n".join(
        [
            f"`{results['command']}`: {one['completions']} completions, {one['steps']} learner steps, "
            f"{results['repeats']} run(s) each in turn, medians; {facts['cores']} cores, one thread a process, torch "
            f"{facts['torch']}; load average before the runs {min(loads):.1f} to {max(loads):.1f}.{shared}",
            "",
            "| rewards by | `rollout.overlap` | the loop, seconds | ratio | learner's processor seconds "
            "| learner idle | staleness, steps |",
            "|---|---|---|---|---|---|---|",
            *rows,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"learner steps; a collection every {UPDATES}")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--overlap", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rewards", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options.work, options.overlap, options.rewards, options.steps)
        return
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {regime: {"0": [], "1": []} for regime in REGIMES}
    for _ in range(options.repeats):
        for regime, rewards in REGIMES.items():
            for overlap in ("0", "1"):
                runs[regime][overlap].append(measure(int(overlap), rewards, options.steps))
                print(regime, overlap, json.dumps(runs[regime][overlap][-1]), flush=True)
    ratios = {regime: median(part["1"], "seconds") / median(part["0"], "seconds") for regime, part in runs.items()}
    results = {
        "command": "python -m benchmarks.overlap",
        "machine": machine(),
        "repeats": options.repeats,
        "time_ratio": ratios,
        "runs": runs,
    }
    publish("overlap", results, table(results))


if __name__ == "__main__":
    main()
