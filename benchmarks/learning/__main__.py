"""Runs the learning benchmark; what is finished is not run again.

    python -m benchmarks.learning quick                     # 15 minutes: 2 tasks, 2 peers, 2 seeds
    python -m benchmarks.learning run --regime online       # everything: hours
    python -m benchmarks.learning table --regime online     # tables and charts from what is there
    python -m benchmarks.learning ablate --tasks sums       # each choice in the design against the default
    python -m benchmarks.learning try --tasks sums --methods ours --tuning 1024 --settings '{"beta": 0.1}'
    python -m benchmarks.learning bases                     # the base models alone

Tables go into `benchmarks/README.md`, charts into `benchmarks/results/`, cells into `benchmarks/results/learning.jsonl`
(of `quick`: into `benchmarks/.cache`).
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.learning import ablation, protocol, summary
from benchmarks.learning.bases import cache_folder
from benchmarks.learning.cells import Store
from benchmarks.learning.methods import REGIMES
from benchmarks.learning.protocol import Plan
from benchmarks.learning.tasks import TASKS
from benchmarks.tables import write_table

RESULTS = Path(__file__).parents[1] / "results"
FULL = {
    "online": Plan("online", tuple(TASKS), tuple(REGIMES["online"]), 5, 12, tuning=2048, budget=4096, reference=16384),
    "logged": Plan("logged", tuple(TASKS), tuple(REGIMES["logged"]), 5, 12, tuning=400, budget=1600, reference=1600),
}
QUICK = Plan("online", ("sums", "paths"), ("ours", "grpo", "filtered"), 2, 3, tuning=256, budget=512, reference=512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["quick", "run", "tune", "table", "ablate", "try", "bases"])
    parser.add_argument("--regime", choices=list(FULL), default="online")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=sorted({name for some in REGIMES.values() for name in some}))
    parser.add_argument("--variants", nargs="+", choices=list(ablation.VARIANTS), help="of ablate")
    parser.add_argument("--settings", type=json.loads, default={}, help="of try: a configuration, as JSON")
    for name in ("seeds", "configurations", "tuning", "budget", "reference"):
        parser.add_argument(f"--{name}", type=int, help="instead of the full plan's")
    parser.add_argument("--fresh", action="store_true", help="forget what the quick version has measured")
    options = parser.parse_args()
    if options.command == "bases":
        for name in options.tasks or TASKS:
            print(name, TASKS[name].base())
            TASKS[name].judge()
        return
    quick = options.command == "quick"
    plan = QUICK if quick else FULL[options.regime]
    for name in ("tasks", "methods", "seeds", "configurations", "tuning", "budget", "reference"):
        if (given := getattr(options, name)) is not None:
            plan = replace(plan, **{name: tuple(given) if isinstance(given, list) else given})
    store = Store(cache_folder("quick.jsonl") if quick else RESULTS / "learning.jsonl")
    if quick and options.fresh:
        store.file.unlink(missing_ok=True)
    shown = " ".join(["python -m benchmarks.learning", *(word for word in sys.argv[1:] if word != "--fresh")])
    if options.command == "ablate":
        where = (store, plan.tasks)
        ablation.run(*where, options.variants or list(ablation.VARIANTS), plan.seeds, plan.tuning)
        text = ablation.table(*where, plan.seeds, plan.tuning, shown.split(" --variants")[0])
        write_table("learning-ablation", text)
        print(text)
        return
    if options.command == "try":
        for result in protocol.attempt(plan, store, options.settings):
            for point in result["points"]:
                print(result["task"], result["method"], result["seed"], point)
        return
    if options.command == "tune":
        for task in plan.tasks:
            for method in plan.methods:
                print(task, method, dict(protocol.tune(plan, store, task, method)), flush=True)
        return
    results = protocol.finished(plan, store) if options.command == "table" else protocol.run(plan, store)
    name = "learning-quick" if quick else f"learning-{plan.regime}"
    text = summary.table(plan, results, shown.replace(" table", " run"))
    write_table(name, text)
    files = summary.draw(plan, results, cache_folder("charts") if quick else RESULTS)
    print(text, *files, sep="\n")


if __name__ == "__main__":
    main()
