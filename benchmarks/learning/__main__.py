"""Runs the learning benchmark; what is finished is not run again.

    python -m benchmarks.learning quick --workers 2         # 15 minutes: 2 tasks, 2 peers, 2 seeds
    python -m benchmarks.learning run --regime all          # everything but what is asked for by name: six hours
    python -m benchmarks.learning run --regime online       # one part of it; the others: logged, stale_8, ...
    python -m benchmarks.learning run --long                # where the others get to with eight times as much
    python -m benchmarks.learning table --regime all        # tables and charts from what is there
    python -m benchmarks.learning ablate --tasks sums       # each choice in the design against the default
    python -m benchmarks.learning try --tasks sums --methods ours --tuning 1024 --settings '{"beta": 0.1}'
    python -m benchmarks.learning bases                     # the base models alone, and what they can do
    python -m benchmarks.learning hours                     # what all of it costs, from what is there

Tables go into `benchmarks/README.md`, charts into `benchmarks/results/`, cells into `benchmarks/results/learning.jsonl`
(of `quick`: into `benchmarks/.cache`).
"""

import argparse
import json
import sys
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.learning import ablation, hours, protocol, summary
from benchmarks.learning.bases import cache_folder
from benchmarks.learning.measure import about_base
from benchmarks.learning.methods import REGIMES
from benchmarks.learning.protocol import Plan, Results
from benchmarks.learning.store import Store, workers
from benchmarks.learning.tasks import DEAR, SEEN, TASKS, UNSEEN
from benchmarks.learning.verdicts import share_of_online, with_hindsight
from benchmarks.tables import write_table

RESULTS = Path(__file__).parents[1] / "results"
EVERYONE = {name: tuple(regime.methods) for name, regime in REGIMES.items()}
SHIPPED = {
    name: tuple(method for method in all_of_them if method not in ("ours_tuned", "ours_log_alone"))
    for name, all_of_them in EVERYONE.items()
}
FEW = ("sums", "rare_sums", "paths")  # where regimes beside the first two are measured
PREDICTABLE = tuple(name for name in SEEN if TASKS[name].predictable)
FULL = {
    "online": Plan("online", SEEN, SHIPPED["online"], 5, 12, tuning=512, budget=2048, reference=2048),
    "logged": Plan("logged", SEEN, SHIPPED["logged"], 5, 6, tuning=400, budget=1600, reference=1600),
    "logged_500": Plan("logged_500", PREDICTABLE, SHIPPED["logged_500"], 2, 6, tuning=400, budget=1600, reference=1600),
    "logged_online": Plan("logged_online", FEW, SHIPPED["logged_online"], 5, 6, 512, budget=2048, reference=2048),
    "stale_8": Plan("stale_8", FEW, SHIPPED["stale_8"], 5, 6, tuning=1024, budget=2048, reference=2048),
    "stale_32": Plan("stale_32", FEW[:2], SHIPPED["stale_32"], 5, 6, tuning=4096, budget=8192, reference=8192),
}
# The others go on to 16,384 completions, for the gain that is to be had in the end. Those of reviews and letters take
# long, and their amounts elsewhere are a quarter: one seed, of the peers that are best there.
FAR = ("sums", "rare_sums", "long_sums", "paths", "star")
LONG = (
    Plan("online", FAR, ("ours", "grpo", "filtered", "reinforce"), 2, 12, 512, budget=2048, reference=16384),
    Plan("online", ("reviews",), ("ours", "grpo", "best_of_n"), 1, 12, 512, 2048 * DEAR, reference=16384 * DEAR),
    Plan("online", ("letters",), ("ours", "rloo"), 1, 12, 512, budget=2048, reference=16384 * DEAR),
)


def in_six_hours(plan: Plan) -> Plan:
    """What of it the whole benchmark runs, which is to take six hours on two cores; the rest is asked for by name."""
    dear = {"grpo_predicted"} | set({LONG[0].tasks: ("reinforce",), LONG[1].tasks: ("grpo",)}.get(plan.tasks, ()))
    return replace(plan, methods=tuple(method for method in plan.methods if method not in dear))


WHOLE = {name: in_six_hours(plan) for name, plan in FULL.items() if name != "logged_500"}
QUICK = Plan("online", ("sums", "paths"), ("ours", "grpo", "filtered"), 2, 3, tuning=512, budget=1024, reference=1024)
AMOUNTS = ("seeds", "configurations", "tuning", "budget", "reference")  # of a plan, by options


def main() -> None:
    torch.set_num_threads(1)  # as workers have, so that one of them and two take the same CPU seconds
    options = _options(sys.argv[1:])
    if options.command == "bases":
        for name in options.tasks or TASKS:
            print(name, TASKS[name].base(), about_base(TASKS[name]), flush=True)
        return
    if options.command == "hours":
        plans = {**WHOLE, **{f"online, peers to 16,384: {', '.join(plan.tasks)}": in_six_hours(plan) for plan in LONG}}
        text = hours.table(plans, Store(RESULTS / "learning.jsonl"), "python -m benchmarks.learning hours")
        write_table("learning-hours", text)
        print(text)
        return
    store = Store(cache_folder("quick.jsonl") if options.command == "quick" else RESULTS / "learning.jsonl")
    if options.command == "quick" and options.fresh:
        store.file.unlink(missing_ok=True)
    with workers(options.workers) as pool:
        for part in _parts(sys.argv[1:]):
            _run(part, store, pool)


def _options(words: list[str], whole: bool = False) -> argparse.Namespace:
    """whole: a part of `--regime all`, which leaves out what is asked for by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["quick", "run", "tune", "table", "ablate", "try", "bases", "hours"])
    parser.add_argument(
        "--regime", choices=[*FULL, "all"], default="online", help="all: what takes six hours, --long with it"
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    known = sorted({name for some in EVERYONE.values() for name in some})
    parser.add_argument("--methods", nargs="+", choices=known, metavar="METHOD", help=", ".join(known))
    parser.add_argument("--variants", nargs="+", choices=list(ablation.VARIANTS), metavar="NAME", help="rows of ablate")
    parser.add_argument("--settings", type=json.loads, default={}, help="of try: a configuration, as JSON")
    for name in AMOUNTS:
        parser.add_argument(f"--{name}", type=int, help="instead of the full plan's")
    parser.add_argument("--workers", type=int, default=1, help="cells that run at a time, one thread each")
    parser.add_argument("--unseen", action="store_true", help="tasks on which nothing was chosen")
    parser.add_argument("--long", action="store_true", help="online, peers with 16,384 completions")
    parser.add_argument("--fresh", action="store_true", help="forget what the quick version has measured")
    options = parser.parse_args(words)
    narrowed = options.unseen or options.long or options.tasks or options.methods
    if options.long and options.unseen:
        parser.error("--long is of the tasks that the design was chosen on")
    if options.regime == "all" and (options.command not in ("run", "table") or narrowed):
        parser.error("--regime all is for run and table, and takes no --tasks, --methods, --unseen or --long")
    options.whole = whole
    options.shown = " ".join(["python -m benchmarks.learning", *(word for word in words if word != "--fresh")])
    return options


def _parts(words: list[str]) -> list[argparse.Namespace]:
    """The options of each part of the benchmark that is meant, as if it had been asked for by itself."""
    options = _options(words)
    if options.regime != "all":
        return [options]
    parts: list[tuple[str, list[str]]] = [(regime, []) for regime in WHOLE]
    parts.insert(1, ("online", ["--long"]))
    return [
        _options(
            [word.replace("all", regime) if word in ("all", "--regime=all") else word for word in words] + more,
            whole=True,
        )
        for regime, more in parts
    ]


def _plans(options: argparse.Namespace) -> list[Plan]:
    """What is asked for: one plan; with --long several, as not all tasks get the same."""
    if options.long:
        plans = [
            replace(plan, tasks=_asked(plan.tasks, options.tasks), methods=_asked(plan.methods, options.methods))
            for plan in LONG
        ]
    else:
        plan = QUICK if options.command == "quick" else FULL[options.regime]
        tasks = options.tasks or (UNSEEN if options.unseen else plan.tasks)
        plans = [replace(plan, tasks=tuple(tasks), methods=tuple(options.methods or plan.methods))]
    amounts = {name: getattr(options, name) for name in AMOUNTS if getattr(options, name) is not None}
    return [replace(plan, **amounts) for plan in plans if plan.tasks and plan.methods]


def _asked(there: tuple[str, ...], names: list[str] | None) -> tuple[str, ...]:
    return tuple(name for name in there if names is None or name in names)


def _run(options: argparse.Namespace, store: Store, pool: Executor | None) -> None:
    plans = _plans(options)
    if options.command == "ablate":
        _ablate(options, plans[0], store, pool)
    elif options.command == "try":
        for result in protocol.attempt(plans[0], store, options.settings, pool):
            for point in result["points"]:
                print(result["task"], result["method"], result["seed"], point)
    elif options.command == "tune":
        for plan in plans:
            protocol.prepare(plan)
            for task, method in plan.pairs():
                print(task, method, protocol.settled(plan, task, method, protocol.run_by(store, pool)), flush=True)
    else:
        _measure(options, plans, store, pool)


def _ablate(options: argparse.Namespace, plan: Plan, store: Store, pool: Executor | None) -> None:
    protocol.prepare(plan)
    ablation.run(store, plan.tasks, options.variants or list(ablation.VARIANTS), plan.seeds, plan.tuning, pool)
    text = ablation.table(store, plan.tasks, plan.seeds, plan.tuning, options.shown.split(" --variants")[0])
    write_table("learning-ablation", text)
    print(text)


def _measure(options: argparse.Namespace, plans: list[Plan], store: Store, pool: Executor | None) -> None:
    """Runs what is missing, of `table` nothing; writes tables and charts of what is there."""
    plan, quick = plans[0], options.command == "quick"
    results: Results = {}
    for part in plans:
        if options.command != "table":
            protocol.run(in_six_hours(part) if options.whole else part, store, pool)
        results |= protocol.finished(part, store)
    further: list[str] = []
    if plan.regime == "logged":
        further = share_of_online(results, protocol.finished(replace(FULL["online"], tasks=plan.tasks), store))
    elif plan.regime == "online" and not quick:
        hindsight = [
            protocol.by_hindsight(part, {t: results[t] for t in part.tasks if t in results}, store) for part in plans
        ]
        further = with_hindsight(plan, {task: methods for one in hindsight for task, methods in one.items()})
    text = summary.table(plan, results, options.shown.replace(" table", " run"), further)
    kind = "long-" * options.long + "unseen-" * options.unseen
    write_table("learning-quick" if quick else f"learning-{kind}{plan.regime}", text)
    files = summary.draw(plan, results, cache_folder("charts") if quick else RESULTS, "long-" * options.long)
    print(text, *files, sep="\n")


if __name__ == "__main__":
    main()
