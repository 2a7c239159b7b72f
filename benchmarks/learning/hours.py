"""What the whole benchmark costs in processor time, from the cells that are there."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.learning.cells import Cell
from benchmarks.learning.protocol import Plan, Result, is_ours, through
from benchmarks.learning.store import Store

Kind = tuple[str, str, bool]  # task, prompts, ours: what the cost of a look depends on


def measuring(results: Sequence[Result]) -> dict[Kind, float]:
    """Median CPU seconds of one look, from cells that kept all their seconds and not only those of learning."""
    found: dict[Kind, list[float]] = defaultdict(list)
    for one in results:
        if "cpu" in one:
            found[kind_of(one)].append((one["cpu"] - one["points"][-1]["seconds"]) / len(one["points"]))
    return {kind: statistics.median(each) for kind, each in found.items()}


def kind_of(result: Result) -> Kind:
    return result["task"], result["part"], is_ours(result["method"])


def seconds(result: Result, looks: Mapping[Kind, float]) -> float:
    """CPU seconds of a cell; of one that kept those of learning alone, looks as they cost other cells of its kind."""
    if "cpu" in result:
        return float(result["cpu"])
    task, part, ours = kind_of(result)
    look = looks.get((task, part, ours), looks.get((task, part, not ours), statistics.median(looks.values())))
    return float(result["points"][-1]["seconds"]) + look * len(result["points"])


def cells_of(plan: Plan, known: Mapping[str, Result]) -> tuple[dict[str, Result], int]:
    """(cells of the plan that are there, by key, and how many are not). What follows a choice that cannot be made yet
    is not counted.
    """
    there: dict[str, Result] = {}
    missing: set[str] = set()

    def measured(cells: Sequence[Cell]) -> list[Result] | None:
        keys = [cell.key for cell in cells]
        there.update({key: known[key] for key in keys if key in known})
        missing.update(key for key in keys if key not in known)
        return [known[key] for key in keys] if set(keys) <= known.keys() else None

    for pair in plan.pairs():
        through(plan, *pair, measured)
    return there, len(missing)


def table(plans: Mapping[str, Plan], store: Store, command: str) -> str:
    """Markdown: cells and processor hours of each plan; a cell that several share counts for the first."""
    known: dict[str, dict[str, Any]] = store.read()
    looks = measuring(list(known.values()))
    lines = [
        f"`{command}`: processor hours of the full plans' cells, learning and looking; cells from before they kept "
        "what looks cost are counted with what these cost others of the same task.",
        "",
        "| regime | cells there | not yet | processor hours |",
        "|---|---|---|---|",
    ]
    total = 0.0
    counted: set[str] = set()
    for name, plan in plans.items():
        there, missing = cells_of(plan, known)
        there = {key: one for key, one in there.items() if key not in counted}
        counted |= there.keys()
        hours = sum(seconds(one, looks) for one in there.values()) / 3600
        total += hours
        lines.append(f"| {name} | {len(there)} | {missing} | {hours:.2f} |")
    return "\n".join([*lines, f"| all | | | {total:.2f} |"])
