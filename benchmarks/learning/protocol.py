"""What is run: tuning with the same budget for everyone, then several seeds of the chosen configuration."""

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.learning.cells import Cell, logged_rows
from benchmarks.learning.methods import REGIMES, Settings
from benchmarks.learning.store import Store, among, run_missing
from benchmarks.learning.tasks import TASKS

Result = dict[str, Any]
Results = dict[str, dict[str, list[Result]]]  # task -> method -> seeds
Measured = Callable[[Sequence[Cell]], list[Result] | None]  # the results of cells; None: not all of them are there


@dataclass(frozen=True)
class Plan:
    """What is to be measured. Tasks whose completions take long get a part of the three amounts, see `Task.costs`.

    tasks, methods: names, in the order of the tables. configurations: how many of each grid are tried. tuning: scored
    completions (updates on logged data) of a tuning run. budget, reference: the same of a test run of llm_dqn and of a
    peer, whose last mark says what there is to be gained.
    """

    regime: str
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: int
    configurations: int
    tuning: int
    budget: int
    reference: int

    def amount(self, kind: str, task: str) -> int:
        """Of `tuning`, `budget` or `reference`, what this task gets."""
        return getattr(self, kind) // TASKS[task].costs

    def pairs(self) -> list[tuple[str, str]]:
        """Tasks with the methods that take part in them."""
        taking_part = REGIMES[self.regime].methods
        return [
            (task, method)
            for task in self.tasks
            for method in self.methods
            if TASKS[task].predictable or not taking_part[method].predicts
        ]


def is_ours(method: str) -> bool:
    return method.startswith("ours")


def spread(grid: Sequence[Settings], count: int) -> list[Settings]:
    """`count` configurations from all over the grid: every fifth of twelve meets all choices soon."""
    stride = next(step for step in (5, 7, 1) if math.gcd(step, len(grid)) == 1)
    return [grid[number * stride % len(grid)] for number in range(min(count, len(grid)))]


def doubling(first: int, last: int) -> tuple[int, ...]:
    """0, first, twice that, ... and the last."""
    marks = [0]
    while first < last:
        marks.append(first)
        first *= 2
    return (*marks, last)


def score(point: dict[str, Any]) -> float:
    """The exact probability of a right completion where the task has one, else the mean reward of sampled ones."""
    return point.get("exact", point["reward"])


def at_mark(result: Result, mark: int) -> dict[str, Any]:
    """The point at a mark, the first one after it, or the last."""
    return next((point for point in result["points"] if point["at"] >= mark), result["points"][-1])


def tuning_cells(plan: Plan, task: str, method: str) -> list[Cell]:
    grid = REGIMES[plan.regime].methods[method].grid
    if len(grid) == 1:
        return []
    most = plan.amount("tuning", task)
    marks = (most // 4, most // 2, most)
    chosen = spread(grid, plan.configurations)
    return [Cell(task, plan.regime, method, dict(settings), 0, "tuning", marks) for settings in chosen]


def attempt(plan: Plan, store: Store, settings: Settings, pool: Executor | None = None) -> list[Result]:
    """One configuration, of a grid or not, on the tuning prompts."""
    prepare(plan)
    marks: tuple[int, ...] = (plan.tuning // 4, plan.tuning // 2, plan.tuning)
    if not REGIMES[plan.regime].online:
        marks = doubling(25, plan.tuning)
    cells = [
        Cell(task, plan.regime, method, dict(settings), seed, "tuning", marks)
        for task, method in plan.pairs()
        for seed in range(plan.seeds)
    ]
    return run_missing(store, cells, pool)


def best(results: Sequence[Result]) -> Settings:
    """The settings with the highest score, the mean over the three marks of the tuning run: early and late count.

    Who collects more at a time than the first mark is looked at later, and counts with that.
    """
    return max(results, key=lambda one: sum(score(at_mark(one, mark)) for mark in one["marks"]))["settings"]


def further_cells(plan: Plan, task: str, method: str, settings: Settings) -> list[Cell]:
    """What is tried beside the best of the grid; where a judge grades, no smaller collections, as llm_dqn has none."""
    further = REGIMES[plan.regime].methods[method].then
    if TASKS[task].graded:
        further = tuple(more for more in further if "completions" not in more)
    return _on_top(plan, task, method, settings, further)


def counted_cells(plan: Plan, task: str, method: str, settings: Settings) -> list[Cell]:
    """What is tried beside the best of these, where rewards are counted."""
    further = REGIMES[plan.regime].methods[method].of_counts if TASKS[task].counted else ()
    return _on_top(plan, task, method, settings, further)


def _on_top(plan: Plan, task: str, method: str, settings: Settings, further: Sequence[Settings]) -> list[Cell]:
    marks = tuning_cells(plan, task, method)[0].marks
    return [Cell(task, plan.regime, method, {**settings, **more}, 0, "tuning", marks) for more in further]


def test_cells(plan: Plan, task: str, method: str, settings: Settings) -> list[Cell]:
    first = 128 if REGIMES[plan.regime].online else 25
    marks = doubling(first, plan.amount("budget" if is_ours(method) else "reference", task))
    return [Cell(task, plan.regime, method, dict(settings), seed, "test", marks) for seed in range(plan.seeds)]


def settled(plan: Plan, task: str, method: str, measured: Measured) -> Settings | None:
    """The configuration that the method goes on with; None while something is missing that decides it."""
    cells = tuning_cells(plan, task, method)
    if not cells:
        return REGIMES[plan.regime].methods[method].grid[0]
    tried = measured(cells)
    for further in (further_cells, counted_cells):
        if tried is None:
            return None
        cells += further(plan, task, method, best(tried))
        tried = measured(cells)
    return None if tried is None else best(tried)


def through(plan: Plan, task: str, method: str, measured: Measured) -> list[Result] | None:
    """From its grid to its test results; None while something is missing."""
    settings = settled(plan, task, method, measured)
    return None if settings is None else measured(test_cells(plan, task, method, settings))


def run(plan: Plan, store: Store, pool: Executor | None = None) -> Results:
    """Everything that is missing; test results by task and method.

    With a pool a method is tested as soon as it is tuned, whatever the others do.
    """
    prepare(plan)
    pairs, measured = plan.pairs(), run_by(store, pool)
    if pool is None:
        return _by_task(pairs, [through(plan, task, method, measured) for task, method in pairs])
    with ThreadPoolExecutor(len(pairs)) as threads:
        return _by_task(pairs, list(threads.map(lambda pair: through(plan, pair[0], pair[1], measured), pairs)))


def finished(plan: Plan, store: Store) -> Results:
    """As `run`, of what is in the store already; methods that are not through are left out."""
    measured = partial(among, store.read())
    pairs = plan.pairs()
    return _by_task(pairs, [through(plan, task, method, measured) for task, method in pairs])


def by_hindsight(plan: Plan, results: Results, store: Store) -> Results:
    """As `results`, but every configuration of a peer that has been through all test runs stands for itself, chosen on
    tuning prompts or not: what peers would come to if they were chosen by the very prompts they are measured on.
    """
    tested = [row for row in store.read().values() if row["regime"] == plan.regime and row["part"] == "test"]
    found: Results = {}
    for task, methods in results.items():
        found[task] = {name: each for name, each in methods.items() if is_ours(name)}
        for method in (name for name in methods if not is_ours(name)):
            marks = methods[method][0]["marks"]
            seeds: dict[str, dict[int, Result]] = {}
            for row in tested:
                if (row["task"], row["method"], row["marks"]) == (task, method, marks):
                    seeds.setdefault(json.dumps(row["settings"], sort_keys=True), {})[row["seed"]] = row
            for settings, rows in sorted(seeds.items()):
                if set(range(plan.seeds)) <= rows.keys():
                    found[task][f"{method} {settings}"] = [rows[seed] for seed in range(plan.seeds)]
    return found


def run_by(store: Store, pool: Executor | None = None) -> Measured:
    """Has cells run that are missing."""
    return lambda cells: run_missing(store, cells, pool)


def _by_task(pairs: Sequence[tuple[str, str]], found: Sequence[list[Result] | None]) -> Results:
    results: Results = {}
    for (task, method), some in zip(pairs, found, strict=True):
        if some is not None:
            results.setdefault(task, {})[method] = some
    return results


def prepare(plan: Plan) -> None:
    """Builds what several processes would otherwise build at the same time."""
    for name in plan.tasks:
        TASKS[name].base()
        TASKS[name].judge()
        if REGIMES[plan.regime].logged:
            logged_rows(TASKS[name])
