"""What the rows of a table come to: ratios, leads, drift, time, the critic, and choosing among candidates."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.learning.figures import geometric_mean, lead, mean_score, ratio, spent, thresholds
from benchmarks.learning.methods import REGIMES
from benchmarks.learning.protocol import Plan, Results, at_mark, is_ours, score
from benchmarks.learning.search import PARTS

MARKS = ("50 %", "90 %")  # of what the best peer gains, as `figures.thresholds`
COSTS = (0.0, 0.1, 1.0)  # seconds that a reward call takes
WITHOUT_GROUPS = ("filtered", "reinforce")
RULES = {"sample": "any", "value": "V", "log_ratio": "sum of Q - V", "likelihood": "likelihood", "oracle": "the best"}


def verdicts(plan: Plan, results: Results) -> list[str]:
    """One line each, of all tasks."""
    lines = []
    for ours in (name for name in plan.methods if is_ours(name)):
        label = REGIMES[plan.regime].methods[ours].label
        for which, mark in enumerate(MARKS):
            lines += _ratios(results, ours, which, f"{label}, {mark}: the best peer needs")
        if REGIMES[plan.regime].online:
            alone = {
                task: {name: seeds for name, seeds in methods.items() if is_ours(name) or name in WITHOUT_GROUPS}
                for task, methods in results.items()
            }
            lines += _ratios(alone, ours, 1, f"{label}, one completion a prompt, no groups, 90 %: the best peer needs")
            said = f"{label}, 90 %, seconds where a reward call takes one: the best peer needs"
            lines += _ratios(results, ours, 1, said, cost=1.0)
        leads = {task: lead(methods, ours) for task, methods in results.items()}
        told = [f"{task} {x:+.3f} ({a:+.3f} to {b:+.3f})" for task, (x, a, b) in _known(leads).items()]
        if told:
            lines.append(f"{label}, score at its last mark less the best peer's there: {', '.join(told)}.")
        if not REGIMES[plan.regime].online:
            lines += _drift(results, ours, label)
    return [f"- {line}" for line in lines]


def _ratios(results: Results, ours: str, which: int, said: str, cost: float | None = None) -> list[str]:
    found = _known({task: ratio(methods, ours, which, cost) for task, methods in results.items()})
    if not found:
        return []
    each = ", ".join(f"{task} {value}" for task, value in found.items())
    mean = geometric_mean([value.value for value in found.values()])
    why = "> or <: one of the two never got there and counts with all it was given"
    return [f"{said} {mean:.2f} times as much (geometric mean; {each}; {why})."]


def _known(found: dict[str, Any]) -> dict[str, Any]:
    return {task: value for task, value in found.items() if value is not None}


def _drift(results: Results, ours: str, label: str) -> list[str]:
    each = []
    for task, seeds in ((task, methods[ours]) for task, methods in results.items() if ours in methods):
        last = seeds[0]["points"][-1]["at"]
        quarter = np.mean([score(at_mark(one, last // 4)) for one in seeds])
        each.append(f"{task} {quarter:.3f} after {last // 4:,}, {mean_score(seeds):.3f} after {last:,}")
    return [f"{label}, drift with updates: {'; '.join(each)}."] if each else []


def share_of_online(logged: Results, online: Results, ours: str = "ours") -> list[str]:
    """How much of the gain of fresh completions, at its last mark, the logged ones alone give."""
    each = []
    for task in (task for task in logged if ours in logged[task] and ours in online.get(task, {})):
        some, all_of_it = (mean_score(r[task][ours]) - mean_score(r[task][ours], 0) for r in (logged, online))
        if all_of_it > 0:
            each.append(
                f"{task} {some / all_of_it:.0%} of {all_of_it:.3f} at {online[task][ours][0]['points'][-1]['at']:,}"
            )
    return [f"- Share of the gain of fresh completions: {', '.join(each)}."] if each else []


def with_hindsight(plan: Plan, results: Results) -> list[str]:
    """The ratios if peers were chosen by the test prompts; results: of `protocol.by_hindsight`."""
    said = "{}, {}, each peer by whichever of its configurations that ran on test prompts is best there: it needs"
    labels = {ours: REGIMES[plan.regime].methods[ours].label for ours in plan.methods if is_ours(ours)}
    return [
        f"- {line}"
        for ours, label in labels.items()
        for which, mark in enumerate(MARKS)
        for line in _ratios(results, ours, which, said.format(label, mark))
    ]


def extras(plan: Plan, results: Results) -> list[str]:
    """Further tables, where there is something to put into them."""
    if not REGIMES[plan.regime].online:
        return []
    tables = (time_table(plan, results), critic_table(plan, results), search_table(plan, results))
    return [line for table in tables if table for line in ("", *table)]


def _rows(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    return [title, "", *(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))]


def time_table(plan: Plan, results: Results) -> list[str]:
    """Seconds to the upper mark where a reward call costs time."""
    rows = []
    for task, methods in results.items():
        limits = thresholds(methods)
        if limits is None:
            continue
        for method, seeds in methods.items():
            cells = []
            for cost in COSTS:
                each, there = spent(seeds, limits[1], cost)
                cells.append(f"{np.median(each):,.0f}" if there else f"> {np.median(each):,.0f}")
            rows.append([task, REGIMES[plan.regime].methods[method].label, *cells])
    title = "Seconds to the 90 % mark where a reward call takes that long: CPU seconds and calls, one after the other."
    return _rows(title, ["task", "method", *(f"{cost:g} s a call" for cost in COSTS)], rows)


def critic_table(plan: Plan, results: Results) -> list[str]:
    """How well V ranks what the policy writes, after so many completions and by the part of a completion seen."""
    rows = []
    for task, methods in results.items():
        for method, seeds in methods.items():
            points = list(zip(*(result["points"] for result in seeds), strict=True))
            for row in points[1:]:
                found = [point["critic"] for point in row if "critic" in point]
                if found:
                    rows.append([task, method, f"{row[0]['at']:,}", *_critic_cells(found)])
    title = (
        "The critic: AUC of V for ending above the mean reward, in brackets that of the true value where answers can "
        "be listed, by the part of the completion seen; R2 of V at the end."
    )
    return _rows(title, ["task", "method", "at", *(f"{part:.0%}" for part in PARTS), "R2"], rows)


def _critic_cells(found: Sequence[dict[str, float]]) -> list[str]:
    def mean(name: str) -> float:
        return float(np.mean([one[name] for one in found]))

    oracle = f"oracle_{PARTS[0]:g}" in found[0]
    cells = [
        f"{mean(f'auc_{part:g}'):.2f}" + (f" ({mean(f'oracle_{part:g}'):.2f})" if oracle else "") for part in PARTS
    ]
    return [*cells, f"{mean(f'r2_{PARTS[-1]:g}'):.2f}"]


def search_table(plan: Plan, results: Results) -> list[str]:
    """Mean reward of the one of four candidates that each rule chooses; all rules write the same number of tokens."""
    rows = []
    for task, methods in results.items():
        for method, seeds in methods.items():
            for who, name in (("tuned", "tuned policy"), ("base", "base model")):
                found = [result["search"][who] for result in seeds if "search" in result]
                if found:
                    cells = [f"{np.mean([one[rule] for one in found]):.3f}" for rule in RULES]
                    greedy = np.mean([result["points"][-1 if who == "tuned" else 0]["greedy"] for result in seeds])
                    rows.append([task, f"{method}, {name}", f"{greedy:.3f}", *cells])
    title = "Choosing among four sampled candidates: mean reward of what each rule picks; greedy beside it."
    return _rows(title, ["task", "candidates of", "greedy", *RULES.values()], rows)
