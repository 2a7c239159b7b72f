"""Whether two processes learn what one does: whole quickstarts of several seeds by one process and by two.

`python -m benchmarks.processes --curves` writes `benchmarks/results/process_curves.json` and the table in
`benchmarks/README.md`. Two processes have half the batch, half the replay and half of `learning_starts` each. Their
random streams are others than those of one process, so that curves differ as those of two seeds do: the question is
whether their means differ by more than that.
"""

import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.apart import run_apart
from benchmarks.tables import publish
from benchmarks.textbook import machine
from llm_dqn.recipe import load_recipe

STUDENT = {2: 4.303, 3: 2.776, 4: 2.447, 5: 2.306, 6: 2.228, 8: 2.145, 10: 2.101}  # seeds -> 97.5 %, 2 (seeds - 1) d.f.
MEASURES = {"curve": "reward, mean over the curve", "final": "reward, sampled, at the end", "greedy": "reward, greedy"}


def train(world: int, seed: int, steps: int | None, folder: Path) -> dict[str, Any]:
    """One run: its curve of held-out rewards by step, and the rewards of the tuned model at its end."""
    whole = load_recipe("quickstart")
    shares = {"train.per_device_train_batch_size": whole.train.per_device_train_batch_size}
    shares |= {"replay.capacity": whole.replay.capacity, "replay.learning_starts": whole.replay.learning_starts}
    settings = [f"{key}={value // world}" for key, value in shares.items()]
    settings += [f"train.seed={seed}", f"train.output_dir={folder}", "train.final_beta_scales=[]"]
    if steps is not None:
        few = ["train.final_eval_prompts=8", "train.eval_prompts=8", "rollout.prompts_per_collect=16"]
        settings += [f"train.max_steps={steps}", f"train.eval_steps={max(1, steps // 2)}", *few]
    launch = ["--num-processes", str(world)] if world > 1 else []
    run_apart("-m", "llm_dqn", "train", "quickstart", *settings, *launch)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = {line["step"]: line["eval/reward"] for line in lines if "eval/reward" in line}
    tuned = json.loads((folder / "evaluation.json").read_text())["tuned"]
    return {
        "seed": seed,
        "curve": curve,
        "final": tuned["reward"],
        "greedy": tuned["reward_greedy"],
        "completions": lines[-1]["scored_completions"],
        "seconds": lines[-1]["seconds"],
    }


def verdict(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """For each measure: means of one process and of two, and the difference that seeds alone make in 19 of 20 cases."""
    found = {}
    for name in MEASURES:
        values = {
            world: [statistics.mean(run[name].values()) if name == "curve" else run[name] for run in part]
            for world, part in runs.items()
        }
        seeds = len(values["1"])
        spread = math.sqrt(sum(statistics.variance(part) for part in values.values()) / seeds)
        one, two = (statistics.mean(values[world]) for world in ("1", "2"))
        noise = STUDENT[seeds] * spread
        found[name] = {"one": one, "two": two, "noise": noise, "inside": abs(two - one) <= noise, "values": values}
    return found


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    runs, found, facts = results["runs"], results["verdict"], results["machine"]
    steps = list(runs["1"][0]["curve"])
    rows = []
    for world, part in runs.items():
        for run in part:
            measured = [*(run["curve"][step] for step in steps), run["final"], run["greedy"]]
            cells = [world, str(run["seed"]), *(f"{value:.3f}" for value in measured), f"{run['seconds']:.0f}"]
            rows.append(f"| {' | '.join(cells)} |")
    inside = all(part["inside"] for part in found.values())
    return "\n".join(
        [
            f"`{results['command']}`: {runs['1'][0]['completions']} completions a run, {facts['cores']} cores, one "
            f"thread a process, torch {facts['torch']}.",
            "",
            f"| processes | seed | {' | '.join(f'step {step}' for step in steps)} | end | end, greedy | seconds |",
            "|" + "---|" * (len(steps) + 5),
            *rows,
            "",
            "| | 1 process | 2 processes | difference | what seeds alone make (95 %) | inside |",
            "|---|---|---|---|---|---|",
            *(
                f"| {said} | {found[name]['one']:.3f} | {found[name]['two']:.3f} | "
                f"{found[name]['two'] - found[name]['one']:+.3f} | {found[name]['noise']:.3f} | "
                f"{'yes' if found[name]['inside'] else 'no'} |"
                for name, said in MEASURES.items()
            ),
            "",
            f"Two processes learn {'what one does, within' if inside else 'otherwise than one does, beyond'} the "
            "spread of the seeds.",
        ]
    )


def compare(seeds: int, steps: int | None) -> dict[str, Any]:
    """Runs of one process and of two in turn; written where they are whole quickstarts."""
    if seeds not in STUDENT:
        raise SystemExit(f"--seeds must be one of {sorted(STUDENT)}, got {seeds}")
    runs: dict[str, list[dict[str, Any]]] = {"1": [], "2": []}
    with tempfile.TemporaryDirectory() as home:
        for seed in range(seeds):
            for world, part in runs.items():
                part.append(train(int(world), seed, steps, Path(home) / f"{world}-{seed}"))
                print(world, json.dumps(part[-1]), flush=True)
    runs = json.loads(json.dumps(runs))
    results = {
        "command": "python -m benchmarks.processes --curves",
        "machine": machine(),
        "runs": runs,
        "verdict": verdict(runs),
    }
    if steps is None:
        publish("process_curves", results, table(results))
    else:
        print(table(results))
    return results
