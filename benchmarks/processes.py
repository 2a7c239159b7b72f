"""One process against two, for the same number of scored completions and the same learner steps.

    python -m benchmarks.processes                # 3 times each in turn; a few minutes on two free cores

The quickstart's model, prompts and judge; the batch of a learner step is 16 episodes on one process and 8 on each of
two. Only the loop is timed, not the start of Python. One thread a process. Writes `benchmarks/results/processes.json`
and the table in `benchmarks/README.md`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.tables import write_table
from benchmarks.textbook import machine

RESULTS = Path(__file__).parent / "results" / "processes.json"
STEPS, BATCH = 48, 16
PHASES = {"collect": "writing and scoring", "learn_from": "learning", "report": "logging and checkpoints"}
BARS = {"total": 0.65, "rollouts": 1.8}


def work(output: Path, steps: int) -> None:
    """One process of a run; the main one notes the seconds of each phase."""
    import torch
    import torch.distributed as dist

    from llm_dqn.recipe import load_recipe
    from llm_dqn.trainer import DQNTrainer

    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    settings = [
        f"train.output_dir={output}.run",
        f"train.max_steps={steps}",
        "train.eval_steps=0",
        "train.save_steps=0",
    ]
    settings += [f"train.per_device_train_batch_size={BATCH // world}", f"replay.learning_starts={64 // world}"]
    run = DQNTrainer.from_recipe(load_recipe("quickstart", settings))
    spent, computed = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)

    def timed(name: str) -> None:
        phase = getattr(run, name)

        def timing(*given: Any) -> Any:
            began, busy = time.perf_counter(), time.process_time()
            try:
                return phase(*given)
            finally:
                spent[name] += time.perf_counter() - began
                computed[name] += time.process_time() - busy

        setattr(run, name, timing)

    for name in PHASES:
        timed(name)
    reduced: list[int] = []  # bytes of each bucket of gradients that all processes sum
    if world > 1:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def counting(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            reduced.append(bucket.buffer().numel() * bucket.buffer().element_size())
            return allreduce_hook(group, bucket)

        run.parts.model.register_comm_hook(None, counting)  # type: ignore[operator, union-attr]
    with run.processes:
        run.begin(resume=False)
        if dist.is_initialized():
            dist.barrier()
        before, began = os.times(), time.perf_counter()
        run.learn()
        total, after = time.perf_counter() - began, os.times()
    run.logbook.close()
    used = after.user + after.system - before.user - before.system
    facts = {
        "seconds": total,
        "processor_seconds": used,
        "completions": run.scored_completions,
        "phases": spent,
        "phases_processor": computed,
        "reduced_bytes_a_step": sum(reduced) / steps,
        "buckets_a_step": len(reduced) / steps,
        "gradient_bytes": sum(p.numel() * p.element_size() for p in run.parts.trainable),
    }
    if run.logbook.main:
        output.write_text(json.dumps(facts))


def measure(world: int, steps: int) -> dict[str, Any]:
    """A run in processes of its own."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "facts.json"
        command = [sys.executable, *launch, "-m", "benchmarks.processes", "--work", str(output), "--steps", str(steps)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        load = os.getloadavg()[0]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        if ran.returncode != 0:
            raise RuntimeError(ran.stdout[-2000:] + ran.stderr[-4000:])
        return json.loads(output.read_text()) | {"load_before": load}


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians, and the two ratios of the bars."""
    total = {n: statistics.median(run["seconds"] for run in part) for n, part in runs.items()}
    collect = {n: statistics.median(run["phases"]["collect"] for run in part) for n, part in runs.items()}
    per_run = [two["seconds"] / one["seconds"] for one, two in zip(runs["1"], runs["2"], strict=True)]
    return {"total": total["2"] / total["1"], "rollouts": collect["1"] / collect["2"], "total_by_pair": per_run}


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    runs, ratios, facts = results["runs"], results["ratios"], results["machine"]

    def median(world: str, *path: str) -> float:
        values = []
        for run in runs[world]:
            value: Any = run
            for key in path:
                value = value[key]
            values.append(value)
        return statistics.median(values)

    rows = [("the loop, seconds", median("1", "seconds"), median("2", "seconds"))]
    rows += [(f"{said}, seconds", median("1", "phases", n), median("2", "phases", n)) for n, said in PHASES.items()]
    processor = "processor time of a process"
    rows.append((f"{processor}, seconds", median("1", "processor_seconds"), median("2", "processor_seconds")))
    name, both = "phases_processor", ("collect", "learn_from")
    if name in runs["1"][0]:
        rows += [(f"{PHASES[n]}, {processor}", median("1", name, n), median("2", name, n)) for n in both]
    loads = [run["load_before"] for part in runs.values() for run in part]
    busy = " Other work was running beside it: a free machine is to be measured again." if max(loads) > 2.5 else ""
    return "\n".join(
        [
            f"`{results['command']}`: {runs['1'][0]['completions']} completions, {results['steps']} learner steps, "
            f"{len(runs['1'])} runs each in turn, medians; {facts['cores']} cores, one thread a process, torch "
            f"{facts['torch']}; load average before the runs {min(loads):.1f} to {max(loads):.1f}.{busy}",
            "",
            "| | 1 process | 2 processes | ratio |",
            "|---|---|---|---|",
            *(f"| {name} | {one:.1f} | {two:.1f} | {two / one:.2f} |" for name, one, two in rows),
            "",
            f"Two processes take {ratios['total']:.2f} of the time of one (bar: at most {BARS['total']}) and write "
            f"{ratios['rollouts']:.2f} times as fast (bar: at least {BARS['rollouts']}).",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS, help="learner steps; a collection every 16")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options.work, options.steps)
        return
    runs: dict[str, list[dict[str, Any]]] = {"1": [], "2": []}
    for _ in range(options.repeats):
        for world, part in runs.items():
            part.append(measure(int(world), options.steps))
            print(world, json.dumps(part[-1]), flush=True)
    results = {
        "command": "python -m benchmarks.processes",
        "machine": machine(),
        "steps": options.steps,
        "runs": runs,
        "ratios": summary(runs),
        "bars": BARS,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_table("processes", table(results))
    print(table(results))


if __name__ == "__main__":
    main()
