"""One process against two, for the same number of scored completions and the same learner steps.

    python -m benchmarks.processes                # 3 times each in turn; ten minutes on two free cores
    python -m benchmarks.processes --curves       # whole quickstarts of 3 seeds by one process and by two

The quickstart's model, prompts and judge; the batch of a learner step is 16 episodes on one process and 8 on each of
two. Only the loop is timed, not the start of Python. One thread a process. A collection of 64 completions, as the
quickstart has it, is one batch of 64 for one process and one of 32 for each of two; one of 256 is four batches and two.
Writes `benchmarks/results/processes.json` and the table in `benchmarks/README.md`; `--curves` is `process_curves`.
"""

import argparse
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import process_curves
from benchmarks.apart import facts_of
from benchmarks.tables import publish
from benchmarks.textbook import machine

BATCH, LEARNED = 16, 4  # episodes a learner step; how often a completion is learned from
COLLECTIONS = {64: 3, 256: 2}  # completions of a collection -> how many of these in a run
PHASES = {"collect": "writing and scoring", "learn_from": "learning", "report": "logging and checkpoints"}
BARS = {"total": 0.65, "rollouts": 1.8}


def work(output: Path, steps: int, collect: int) -> None:
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
        "replay.target_kl=null",  # collections at fixed steps: the same work for both
        f"rollout.prompts_per_collect={collect}",
        f"replay.updates_per_collect={collect * LEARNED // BATCH}",
    ]
    settings += [f"train.per_device_train_batch_size={BATCH // world}", f"replay.learning_starts={64 // world}"]
    run = DQNTrainer.from_recipe(load_recipe("quickstart", settings))
    spent, computed = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)
    messages: Counter[str] = Counter()
    phase: list[str] = []

    def timed(name: str) -> None:
        work = getattr(run, name)

        def timing(*given: Any) -> Any:
            began, busy = time.perf_counter(), time.process_time()
            phase.append(name)
            try:
                return work(*given)
            finally:
                phase.pop()
                spent[name] += time.perf_counter() - began
                computed[name] += time.process_time() - busy

        setattr(run, name, timing)

    for name in PHASES:
        timed(name)
    if world > 1:
        dist.all_reduce = counting(dist.all_reduce, phase, messages)
    with run.processes:
        run.begin(resume=False)
        if dist.is_initialized():
            dist.barrier()
        before, began = os.times(), time.perf_counter()
        run.learn()
        total, after = time.perf_counter() - began, os.times()
    run.logbook.close()
    facts = {
        "seconds": total,
        "processor_seconds": after.user + after.system - before.user - before.system,
        "completions": run.scored_completions,
        "phases": spent,
        "phases_processor": computed,
        "sums_a_step": messages["learn_from"] / steps,
        "bytes_a_step": messages["learn_from bytes"] / steps,
        "sums_a_collection": messages["collect"] / (steps * BATCH / LEARNED / collect),
        "gradient_bytes": sum(p.numel() * p.element_size() for p in run.parts.trainable),
        "gradients": len(run.parts.trainable),
    }
    if run.logbook.main:
        output.write_text(json.dumps(facts))


def counting(all_reduce: Callable[..., Any], phase: list[str], messages: Counter[str]) -> Callable[..., Any]:
    """The same, counting messages and their bytes under the phase that sends them."""

    def counted(tensor: Any, *given: Any, **options: Any) -> Any:
        if phase:
            messages[phase[-1]] += 1
            messages[f"{phase[-1]} bytes"] += tensor.numel() * tensor.element_size()
        return all_reduce(tensor, *given, **options)

    return counted


def measure(world: int, steps: int, collect: int) -> dict[str, Any]:
    """A run in processes of its own."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    return facts_of(*launch, "-m", "benchmarks.processes", "--steps", str(steps), "--collect", str(collect))


def median(runs: list[dict[str, Any]], *path: str) -> float:
    """Of what lies under these keys."""
    values = []
    for run in runs:
        value: Any = run
        for key in path:
            value = value[key]
        values.append(value)
    return statistics.median(values)


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The two ratios of the bars by medians, by pairs, and by processor time, which other work disturbs least."""
    one, two = runs["1"], runs["2"]
    return {
        "total": median(two, "seconds") / median(one, "seconds"),
        "rollouts": median(one, "phases", "collect") / median(two, "phases", "collect"),
        "total_by_pair": [b["seconds"] / a["seconds"] for a, b in zip(one, two, strict=True)],
        "rollouts_by_pair": [a["phases"]["collect"] / b["phases"]["collect"] for a, b in zip(one, two, strict=True)],
        "total_processor": median(two, "processor_seconds") / median(one, "processor_seconds"),
        "rollouts_processor": median(one, "phases_processor", "collect") / median(two, "phases_processor", "collect"),
    }


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    facts = results["machine"]
    lines = []
    for collect, part in results["workloads"].items():
        one, two, ratios = part["runs"]["1"], part["runs"]["2"], part["ratios"]
        rows = [("the loop, seconds", median(one, "seconds"), median(two, "seconds"))]
        rows += [(f"{said}, seconds", median(one, "phases", n), median(two, "phases", n)) for n, said in PHASES.items()]
        processor = "processor time of a process"
        both = [median(runs, "processor_seconds") for runs in (one, two)]
        rows.append((f"{processor}, seconds", both[0], both[1]))
        for name in ("collect", "learn_from"):
            both = [median(runs, "phases_processor", name) for runs in (one, two)]
            rows.append((f"{PHASES[name]}, {processor}", both[0], both[1]))
        loads = [run["load_before"] for run in (*one, *two)]
        busy = " Other work was running beside it: a free machine is to be measured again." if max(loads) > 2.5 else ""
        lines += [
            f"`{results['command']}`, collections of {collect}: {one[0]['completions']} completions, {part['steps']} "
            f"learner steps, {len(one)} runs each in turn, medians; {facts['cores']} cores, one thread a process, "
            f"torch {facts['torch']}; load average before the runs {min(loads):.1f} to {max(loads):.1f}.{busy}",
            "",
            "| | 1 process | 2 processes | ratio |",
            "|---|---|---|---|",
            *(f"| {name} | {a:.1f} | {b:.1f} | {b / a:.2f} |" for name, a, b in rows),
            "",
            f"Two processes take {ratios['total']:.2f} of the time of one (bar: at most {BARS['total']}) and write "
            f"{ratios['rollouts']:.2f} times as fast (bar: at least {BARS['rollouts']}); by processor time "
            f"{ratios['total_processor']:.2f} and {ratios['rollouts_processor']:.2f}. They sum over processes "
            f"{two[0]['sums_a_step']:.0f} times a learner step, {two[0]['sums_a_collection']:.1f} times a collection.",
            "",
        ]
    return "\n".join(lines[:-1])


def compare(repeats: int, collections: dict[int, int]) -> dict[str, Any]:
    """Runs of one process and of two in turn, for each size of a collection."""
    workloads = {}
    for collect, count in collections.items():
        runs: dict[str, list[dict[str, Any]]] = {"1": [], "2": []}
        steps = count * collect * LEARNED // BATCH
        for _ in range(repeats):
            for world, part in runs.items():
                part.append(measure(int(world), steps, collect))
                print(collect, world, json.dumps(part[-1]), flush=True)
        workloads[str(collect)] = {"steps": steps, "runs": runs, "ratios": summary(runs)}
    return {"command": "python -m benchmarks.processes", "machine": machine(), "workloads": workloads, "bars": BARS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one collection of each size, printed and not written")
    parser.add_argument("--curves", action="store_true", help="learning curves instead of times")
    parser.add_argument("--seeds", type=int, default=3, help="of --curves")
    parser.add_argument("--steps", type=int, help="of --curves: instead of the quickstart's; then nothing is written")
    parser.add_argument("--collect", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options.work, options.steps, options.collect)
    elif options.curves:
        process_curves.compare(options.seeds, options.steps)
    elif options.quick:
        print(table(compare(options.repeats, dict.fromkeys(COLLECTIONS, 1))))
    else:
        results = compare(options.repeats, COLLECTIONS)
        publish("processes", results, table(results))


if __name__ == "__main__":
    main()
