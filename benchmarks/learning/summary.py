"""Figures over seeds, the tables of `benchmarks/README.md`, and charts."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.learning.methods import REGIMES
from benchmarks.learning.protocol import Plan, Result, is_ours, score
from llm_dqn import charts

Results = dict[str, dict[str, list[Result]]]  # task -> method -> seeds
Read = Callable[[dict[str, Any]], float]
COSTS = (0.0, 0.1, 1.0)  # seconds that a reward call takes


def interval(values: Sequence[float], resamples: int = 4000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over seeds."""
    rows = np.asarray(values, dtype=float)
    picks = np.random.default_rng(0).integers(len(rows), size=(resamples, len(rows)))
    low, high = np.percentile(rows[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def mean_score(results: Sequence[Result], index: int = -1) -> float:
    return float(np.mean([score(result["points"][index]) for result in results]))


def at_mark(result: Result, mark: int) -> dict[str, Any]:
    """The point at a mark, the first one after it, or the last."""
    return next((point for point in result["points"] if point["at"] >= mark), result["points"][-1])


def reached(result: Result, threshold: float, along: str = "at") -> float:
    """How far along the run had to go until its score first reached the threshold, straight between two marks; inf if
    it never did.
    """
    before = None
    for point in result["points"]:
        if score(point) >= threshold:
            if before is None:
                return float(point[along])
            share = (threshold - score(before)) / (score(point) - score(before))
            return float(before[along] + share * (point[along] - before[along]))
        before = point
    return math.inf


def peers(methods: dict[str, list[Result]]) -> dict[str, list[Result]]:
    return {name: results for name, results in methods.items() if not is_ours(name)}


def thresholds(methods: dict[str, list[Result]]) -> tuple[float, float] | None:
    """Scores at 50 % and 90 % of the gain of the best peer at its last mark; None where no peer gained anything."""
    base = mean_score(next(iter(methods.values())), 0)
    gains = [mean_score(results) - base for results in peers(methods).values()]
    gain = max(gains, default=0.0)
    return (base + 0.5 * gain, base + 0.9 * gain) if gain > 0 else None


def _span(values: Sequence[float], digits: int = 3) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    low, high = interval(values)
    return f"{np.mean(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def needed(results: Sequence[Result], threshold: float, along: str = "at") -> float:
    """Median over seeds; inf where half of them or more never got there."""
    return float(np.median([reached(result, threshold, along) for result in results]))


def _needed(results: Sequence[Result], threshold: float) -> str:
    each = [reached(result, threshold) for result in results]
    middle, missed = needed(results, threshold), sum(map(math.isinf, each))
    if math.isinf(middle):
        return f"not by {results[0]['points'][-1]['at']:,}"
    span = f"{middle:,.0f}"
    if len(each) > 1:
        span += f" ({min(each):,.0f} to {'never' if missed else f'{max(each):,.0f}'})"
    return span


def _settings(result: Result) -> str:
    usual = {"q_head", "prior", "backup", "n_step", "target", "explore", "temperature", "gamma", "target_tau"}
    told = {key: value for key, value in result["settings"].items() if key not in usual}
    return ", ".join(f"{key} {value}" for key, value in told.items()) or "as shipped"


def table(plan: Plan, results: Results, command: str) -> str:
    """Markdown: how it was measured, a row a task and method, and what the rows come to."""
    unit = "scored completions" if REGIMES[plan.regime].online else "updates on 2,000 logged base completions"
    marks = [mark for mark in (256, 1024) if mark < plan.budget] if REGIMES[plan.regime].online else [100]
    steps = "completions" if REGIMES[plan.regime].online else "updates"
    heads = ["task", "method", *(f"score at {mark:,}" for mark in marks), "at the last mark", "worst seed"]
    heads += ["reward, sampled", "greedy", "KL a token", "distinct-2", f"{steps} to 50 %", "to 90 %", "CPU s"]
    lines = [
        f"`{command}`: {plan.seeds} seeds; tuned methods chose among {plan.configurations} configurations of "
        f"{plan.tuning:,} {unit} on tuning prompts; {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), "
        f"torch {torch.__version__}. Score: exact probability of a right completion; of reviews and letters the mean "
        "reward of sampled ones. Means over seeds (95 % bootstrap); 50 % and 90 % are shares of what the best peer "
        f"gains until its last mark, {steps} to them the median (least to most). CPU seconds of learning alone.",
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    for task, methods in results.items():
        first = next(iter(methods.values()))
        start = [result["points"][0] for result in first]
        cells = [f"{mean_score(first, 0):.3f}"] * len(marks) + ["", ""]
        lines.append(_row(task, "base model", cells, start, ["", "", ""]))
        limits = thresholds(methods)
        for method, seeds in methods.items():
            ends = [result["points"][-1] for result in seeds]
            cells = [
                _span([score(at_mark(result, mark) or result["points"][-1]) for result in seeds]) for mark in marks
            ]
            cells += [f"{_span([score(point) for point in ends])} at {ends[0]['at']:,}", f"{min(map(score, ends)):.3f}"]
            needs = ["", ""] if limits is None else [_needed(seeds, limit) for limit in limits]
            label = f"{REGIMES[plan.regime].methods[method].label} ({_settings(seeds[0])})"
            lines.append(_row("", label, cells, ends, [*needs, f"{np.mean([p['seconds'] for p in ends]):.0f}"]))
    return "\n".join([*lines, "", *_verdicts(plan, results)])


def _row(task: str, label: str, cells: list[str], points: Sequence[dict[str, Any]], rest: list[str]) -> str:
    figures = [f"{np.mean([point[name] for point in points]):.3f}" for name in ("reward", "greedy")]
    figures += [f"{np.mean([point[name] for point in points]):.2f}" for name in ("kl", "distinct_2")]
    return f"| {' | '.join([task, label, *cells, *figures, *rest])} |"


def ratio(methods: dict[str, list[Result]], ours: str, which: int, cost: float | None = None) -> float | None:
    """Best peer's scored completions (or seconds, with a cost a call) to a threshold over ours; None if unknown."""
    limits = thresholds(methods)
    if limits is None or ours not in methods:
        return None

    def spent(results: Sequence[Result]) -> float:
        if cost is None:
            return needed(results, limits[which])
        each = [reached(r, limits[which], "seconds") + cost * reached(r, limits[which]) for r in results]
        return float(np.median(each))

    best, mine = min(map(spent, peers(methods).values())), spent(methods[ours])
    return None if math.isinf(best) and math.isinf(mine) else best / mine


def _verdicts(plan: Plan, results: Results) -> list[str]:
    lines = []
    for ours in (name for name in plan.methods if is_ours(name)):
        label = REGIMES[plan.regime].methods[ours].label
        for which, mark in enumerate(("50 %", "90 %")):
            found = {task: ratio(methods, ours, which) for task, methods in results.items()}
            known = {task: value for task, value in found.items() if value is not None}
            if known:
                each = ", ".join(f"{task} {value:.1f}" for task, value in known.items())
                mean = math.exp(np.mean([math.log(max(value, 1e-9)) for value in known.values()])) if known else 0
                lines.append(f"{label}, {mark}: the best peer needs {mean:.2f} times as much (geometric mean; {each}).")
        if REGIMES[plan.regime].online:
            lines += _times(results, ours, label)
    return [f"- {line}" for line in lines]


def _times(results: Results, ours: str, label: str) -> list[str]:
    parts = []
    for cost in COSTS:
        each = {task: ratio(methods, ours, 1, cost) for task, methods in results.items()}
        told = ", ".join(f"{task} {value:.2f}" for task, value in each.items() if value is not None)
        parts.append(f"{cost:g} s a call: {told}")
    return [f"{label}, time to 90 %, the best peer's over ours, one process; {'; '.join(parts)}."]


def draw(plan: Plan, results: Results, folder: Path) -> list[Path]:
    """A chart a task: score against what was spent, mean and interval over seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for task, methods in results.items():
        series = []
        for kind, (method, seeds) in enumerate(list(methods.items())[: charts.KINDS]):
            points = list(zip(*(result["points"] for result in seeds), strict=True))[1:]
            spans = [interval([score(point) for point in row]) for row in points]
            series.append(
                charts.Series(
                    REGIMES[plan.regime].methods[method].label,
                    [math.log2(row[0]["at"]) for row in points],
                    [float(np.mean([score(point) for point in row])) for row in points],
                    [low for low, _ in spans],
                    [high for _, high in spans],
                    kind=kind,
                )
            )
        axis = "scored completions" if REGIMES[plan.regime].online else "updates"
        file = folder / f"{plan.regime}-{task}.svg"
        picture = charts.line_chart(
            series, task, charts.Axis(f"{axis}, log2"), charts.Axis("score"), size=(640, 320), standalone=True
        )
        file.write_text(picture, encoding="utf-8")
        files.append(file)
    return files
