"""What is run: tuning with the same budget for everyone, then several seeds of the chosen configuration."""

import math
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from benchmarks.learning.cells import Cell, logged_rows
from benchmarks.learning.methods import REGIMES, Settings
from benchmarks.learning.store import Store, run_missing
from benchmarks.learning.tasks import TASKS

Result = dict[str, Any]


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
    marks = (plan.tuning // 4, plan.tuning // 2, plan.tuning)
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


def sharper_cells(plan: Plan, task: str, method: str, settings: Settings) -> list[Cell]:
    """What is tried beside the best of the grid."""
    marks = tuning_cells(plan, task, method)[0].marks
    further = REGIMES[plan.regime].methods[method].then
    return [Cell(task, plan.regime, method, {**settings, **more}, 0, "tuning", marks) for more in further]


def test_cells(plan: Plan, task: str, method: str, settings: Settings) -> list[Cell]:
    first = 128 if REGIMES[plan.regime].online else 25
    marks = doubling(first, plan.amount("budget" if is_ours(method) else "reference", task))
    return [Cell(task, plan.regime, method, dict(settings), seed, "test", marks) for seed in range(plan.seeds)]


def tune(plan: Plan, store: Store, task: str, method: str, pool: Executor | None = None) -> Settings:
    """The configuration that the method goes on with."""
    cells = tuning_cells(plan, task, method)
    if not cells:
        return REGIMES[plan.regime].methods[method].grid[0]
    settings = best(run_missing(store, cells, pool))
    return best(run_missing(store, [*cells, *sharper_cells(plan, task, method, settings)], pool))


def run(plan: Plan, store: Store, pool: Executor | None = None) -> dict[str, dict[str, list[Result]]]:
    """Everything that is missing; test results by task and method.

    With a pool a method is tested as soon as it is tuned, whatever the others do.
    """
    pairs = plan.pairs()

    def through(pair: tuple[str, str]) -> list[Result]:
        settings = tune(plan, store, *pair, pool)
        return run_missing(store, test_cells(plan, *pair, settings), pool)

    prepare(plan)
    if pool is None:
        found = [through(pair) for pair in pairs]
    else:
        with ThreadPoolExecutor(len(pairs)) as threads:
            found = list(threads.map(through, pairs))
    results: dict[str, dict[str, list[Result]]] = {task: {} for task in plan.tasks}
    for (task, method), some in zip(pairs, found, strict=True):
        results[task][method] = some
    return results


def prepare(plan: Plan) -> None:
    """Builds what several processes would otherwise build at the same time."""
    for name in plan.tasks:
        TASKS[name].base()
        TASKS[name].judge()
        if REGIMES[plan.regime].logged:
            logged_rows(TASKS[name])


def finished(plan: Plan, store: Store) -> dict[str, dict[str, list[Result]]]:
    """As `run`, of what is in the store already; methods that are not through are left out."""
    known = store.read()
    found: dict[str, dict[str, list[Result]]] = {}
    for task, method in plan.pairs():
        tried = [known.get(cell.key) for cell in tuning_cells(plan, task, method)]
        if None in tried:
            continue
        if tried:
            tried += [known.get(cell.key) for cell in sharper_cells(plan, task, method, best(tried))]
            if None in tried:
                continue
        settings = best(tried) if tried else REGIMES[plan.regime].methods[method].grid[0]
        results = [known.get(cell.key) for cell in test_cells(plan, task, method, settings)]
        if None not in results:
            found.setdefault(task, {})[method] = results
    return found
