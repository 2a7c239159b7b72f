"""The tables of `benchmarks/README.md`, and charts."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.learning.figures import interval, mean_score, needed, reached, thresholds
from benchmarks.learning.methods import REGIMES
from benchmarks.learning.protocol import Plan, Result, Results, at_mark, score
from benchmarks.learning.verdicts import extras, verdicts
from llm_dqn import charts


def _span(values: Sequence[float], digits: int = 3) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    low, high = interval(values)
    return f"{np.mean(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


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
    usual = {"q_head", "prior", "backup", "n_step", "target", "explore", "gamma", "target_tau"}
    told = {key: value for key, value in result["settings"].items() if key not in usual}
    return ", ".join(f"{key} {value}" for key, value in told.items()) or "as shipped"


def _seeds(plan: Plan, results: Results) -> str:
    """How many; of which tasks there are fewer, or less of everything."""
    fewer, dear = [], []
    for task, methods in results.items():
        if (seeds := len(next(iter(methods.values())))) != plan.seeds:
            fewer.append(f"{task}: {seeds}")
        if max(each[0]["points"][-1]["at"] for each in methods.values()) < max(plan.budget, plan.reference) / 2:
            dear.append(task)
    told = fewer + ([f"{', '.join(dear)}: a quarter of all amounts"] if dear else [])
    return f"{plan.seeds} seeds" + (f" ({', '.join(told)})" if told else "")


def table(plan: Plan, results: Results, command: str, further: Sequence[str] = ()) -> str:
    """Markdown: how it was measured, a row a task and method, and what the rows come to, with further lines of that."""
    regime = REGIMES[plan.regime]
    unit = "scored completions" if regime.online else f"updates on {regime.logged:,} logged base completions"
    marks = [mark for mark in (256, 1024) if mark < plan.budget] if regime.online else [100]
    steps = "completions" if regime.online else "updates"
    heads = ["task", "method", *(f"score at {mark:,}" for mark in marks), "at the last mark", "worst seed"]
    heads += ["reward, sampled", "greedy", "KL a token", "distinct-2", f"{steps} to 50 %", "to 90 %", "CPU s"]
    lines = [
        f"`{command}`: {_seeds(plan, results)}; tuned methods chose among {plan.configurations} configurations of "
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
            cells = [_span([score(at_mark(result, mark)) for result in seeds]) for mark in marks]
            cells += [f"{_span([score(point) for point in ends])} at {ends[0]['at']:,}", f"{min(map(score, ends)):.3f}"]
            needs = ["", ""] if limits is None else [_needed(seeds, limit) for limit in limits]
            label = f"{REGIMES[plan.regime].methods[method].label} ({_settings(seeds[0])})"
            lines.append(_row("", label, cells, ends, [*needs, f"{np.mean([p['seconds'] for p in ends]):.0f}"]))
    return "\n".join([*lines, "", *verdicts(plan, results), *further, *extras(plan, results)])


def _row(task: str, label: str, cells: list[str], points: Sequence[dict[str, Any]], rest: list[str]) -> str:
    figures = [f"{np.mean([point[name] for point in points]):.3f}" for name in ("reward", "greedy")]
    figures += [f"{np.mean([point[name] for point in points]):.2f}" for name in ("kl", "distinct_2")]
    return f"| {' | '.join([task, label, *cells, *figures, *rest])} |"


def draw(plan: Plan, results: Results, folder: Path, prefix: str = "") -> list[Path]:
    """A chart a task: score against what was spent, mean and interval over seeds. prefix: of the files' names."""
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
        file = folder / f"{prefix}{plan.regime}-{task}.svg"
        picture = charts.line_chart(
            series, task, charts.Axis(f"{axis}, log2"), charts.Axis("score"), size=(640, 320), standalone=True
        )
        file.write_text(picture, encoding="utf-8")
        files.append(file)
    return files
