"""Scores completions by any number of reward functions, whatever these functions do.

A reward function is TRL's: `f(prompts, completions, **columns) -> list[float | None]`, plain or `async`, called with
keyword arguments. It gets copies, cannot change a random stream, and what comes out is a finite number or nothing.
"""

import asyncio
import copy
import inspect
import logging
import math
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from llm_dqn.errors import StepFailed, UserError
from llm_dqn.isolation import undisturbed
from llm_dqn.reward_cache import Answer, Plan, RewardCache, pick
from llm_dqn.reward_functions import RewardFunction, load_reward
from llm_dqn.reward_model import RewardModel
from llm_dqn.reward_worker import Worker, ignore, plain_list
from llm_dqn.types import Message

__all__ = ["RewardError", "RewardFunc", "RewardFunction", "RewardModel", "RewardResult", "Rewards", "load_reward"]

logger = logging.getLogger(__name__)

_CONSTANT_AFTER, _CONSTANT_AGAIN = 10, 50  # batches of equal rewards before a warning, and before each further one
_NEAR_NUMBERS = ("str", "Decimal", "Fraction")
_GRACE = 0.5  # seconds that a cancelled coroutine gets to end by itself
_RESERVED = {
    "prompt",
    "prompts",
    "completion",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
}


class RewardError(StepFailed):
    """A reward function failed, and the rule for that is to stop."""


class RewardFunc(Protocol):
    """One number a completion, None where the function does not apply."""

    def __call__(self, **arguments: Any) -> Sequence[float | None] | Awaitable[Sequence[float | None]]:
        """`prompts`, `completions`, `completion_ids` and every data column, each a list with one entry a completion."""


@dataclass(frozen=True)
class RewardResult:
    """What the functions say of one completion."""

    total: float | None  # weighted sum of those that answered; None = nobody did, the completion is not used
    each: dict[str, float | None]  # unweighted; None = abstained or failed


class Rewards:
    """Several reward functions as one.

    funcs: callables, names as `load_reward` takes them, or what it gave. weights: one a function, 1 by default.
    on_error: "fail" raises `RewardError`, "skip" leaves the completion out, a number stands in for the failed function.
    timeout: seconds a call; functions that are not `async` then run in a process of their own, which is ended when it
    takes longer, so they must live in an importable file. Reward models know no timeout.
    cache: no request is scored twice by a function that has shown to be deterministic (`RewardCache`).
    """

    def __init__(
        self,
        funcs: Sequence[Any],
        weights: Sequence[float] | None = None,
        on_error: str | float = "fail",
        timeout: float | None = None,
        cache: bool = True,
    ) -> None:
        if not funcs:
            raise UserError("reward: no reward function given")
        if weights is not None and len(weights) != len(funcs):
            raise UserError(f"reward weights: {len(weights)} weights for {len(funcs)} functions")
        if weights is not None and not all(math.isfinite(weight) for weight in weights):
            raise UserError(f"reward weights: {list(weights)} must be finite numbers")
        if isinstance(on_error, bool) or not (on_error in ("fail", "skip") or _is_finite_number(on_error)):
            raise UserError(f"reward on_error: {on_error!r} is not 'fail', 'skip' or a finite number")
        if timeout is not None and not timeout > 0:
            raise UserError(f"reward timeout: {timeout!r} must be a positive number of seconds")
        self.functions = [load_reward(func) for func in funcs]
        self.weights = [1.0] * len(funcs) if weights is None else [float(weight) for weight in weights]
        self.on_error, self.timeout = on_error, timeout
        self.names = _distinct([function.name for function in self.functions])
        self.calls = 0  # completions scored
        self.failed = 0  # rows for which a function failed, under "skip" or a number
        self.last_fault = ""  # of these, in one sentence
        self._requests, self._cached = 0, 0  # to all functions since `cached_share` was asked
        self._caches = [RewardCache(name, f.is_model) if cache else None for name, f in self._named()]
        self._constant_batches = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._callers = [self._caller(function) for function in self.functions]

    def _named(self) -> list[tuple[str, RewardFunction]]:
        return list(zip(self.names, self.functions, strict=True))

    def _caller(self, function: RewardFunction) -> Callable[..., Any]:
        """The function itself, or its stand-in that runs it in a process which can be ended."""
        if self.timeout is None or function.is_model or function.is_async:
            return function
        if function.location is None:
            raise UserError(
                f"reward timeout: '{function.name}' cannot be stopped, since no other process can import it; put it at "
                "the top level of a file and name it 'file.py:function', make it async, or set no timeout"
            )
        return Worker(function.location, self.timeout)

    def check_columns(self, columns: Sequence[str], table: str = "the data") -> None:
        """`UserError` if a function needs an argument that is no column of the data."""
        arguments = _arguments([""], [""], [dict.fromkeys(columns)], None)
        for function in self.functions:
            function.select(arguments, table)

    def score(
        self,
        prompts: Sequence[str | list[Message]],
        completions: Sequence[str],
        columns: Sequence[dict[str, Any]] | None = None,
        completion_ids: Sequence[list[int]] | None = None,
    ) -> list[RewardResult]:
        """One result a completion. `columns` holds the other data columns row by row."""
        if not prompts:
            return []
        arguments = _arguments(prompts, completions, columns or [{}] * len(prompts), completion_ids)
        with undisturbed():
            answers = self._ask(arguments, len(prompts))
        self.calls += len(prompts)
        before = self.failed
        for name, answer in zip(self.names, answers, strict=True):
            self._consider(name, answer, prompts)
        results = [self._combine(row, answers) for row in range(len(prompts))]
        if len(str(self.failed)) > len(str(before)) or (self.failed and not before):  # at 1, 10, 100 ... rows
            deed = "left out" if self.on_error == "skip" else f"given {self.on_error}"
            logger.warning("%d of %d completions %s: %s", self.failed, self.calls, deed, self.last_fault)
        self._watch([result.total for result in results if result.total is not None])
        return results

    def _ask(self, arguments: dict[str, Any], count: int) -> list[Answer]:
        """Calls every function for what is not known; the async ones wait together."""
        everything = Plan([None] * count, list(range(count)), list(range(count)), {})
        results: list[Any] = []
        plans: list[Plan] = []
        for function, caller, cache in zip(self.functions, self._callers, self._caches, strict=True):
            chosen = function.select(arguments)
            plans.append(cache.plan(chosen, count) if cache else everything)
            asked = plans[-1].asked
            try:
                results.append(caller(**copy.deepcopy(pick(chosen, asked))) if asked else [])
            except (Exception, SystemExit) as error:  # what follows from it is on_error's to say
                results.append(error)
        waiting = [index for index, result in enumerate(results) if inspect.isawaitable(result)]
        for index, outcome in zip(waiting, self._await([results[index] for index in waiting]), strict=True):
            results[index] = outcome
        answers = [_read(result, len(plan.asked)) for result, plan in zip(results, plans, strict=True)]
        self._requests += count * len(plans)
        self._cached += sum(count - len(plan.asked) for plan in plans)
        return [
            cache.complete(plan, answer) if cache else answer
            for cache, plan, answer in zip(self._caches, plans, answers, strict=True)
        ]

    def cached_share(self) -> float:
        """Share of the requests since this was last asked that no function was called for."""
        share = self._cached / max(self._requests, 1)
        self._requests, self._cached = 0, 0
        return share

    def _await(self, coroutines: list[Awaitable[Any]]) -> list[Any]:
        """Results or exceptions. One event loop serves all calls, as a client in a reward file belongs to it."""
        if not coroutines:
            return []
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True, name="async-rewards").start()

        async def together() -> list[Any]:
            limited = [asyncio.wait_for(coroutine, self.timeout) for coroutine in coroutines]
            return await asyncio.gather(*limited, return_exceptions=True)

        waiting = asyncio.run_coroutine_threadsafe(together(), self._loop)
        try:
            outcomes = waiting.result(None if self.timeout is None else self.timeout + _GRACE)
        except TimeoutError:  # a coroutine that never yields blocks its loop: leave both behind
            self._loop = None
            outcomes = [TimeoutError()] * len(coroutines)
        late = TimeoutError(f"no answer within {self.timeout} s")
        own = self.timeout is None  # then a TimeoutError is the function's own
        return [late if isinstance(outcome, TimeoutError) and not own else outcome for outcome in outcomes]

    def _consider(self, name: str, answer: Answer, prompts: Sequence[Any]) -> None:
        """Stops at a fault, or keeps it to be told."""
        if answer.faults:
            self.last_fault = _fault_said(name, answer, prompts)
            if self.on_error == "fail":
                cure = "set on_error to skip or to a number to go on all the same"
                raise RewardError(f"{self.last_fault}; {cure}") from next(iter(answer.faults.values()))

    def _combine(self, row: int, answers: list[Answer]) -> RewardResult:
        each = {name: answer.values[row] for name, answer in zip(self.names, answers, strict=True)}
        failing = [name for name, answer in zip(self.names, answers, strict=True) if row in answer.faults]
        if failing:
            self.failed += 1
            if isinstance(self.on_error, str):
                return RewardResult(None, each)
            each.update(dict.fromkeys(failing, float(self.on_error)))
        paid = [weight * value for weight, value in zip(self.weights, each.values(), strict=True) if value is not None]
        total = sum(paid)
        if not math.isfinite(total):
            if self.on_error == "fail":
                raise RewardError(f"the weighted sum of rewards is {total} in row {row + 1}: {each}")
            self.failed += 1
            self.last_fault = f"the weighted sum of rewards is {total}: {each}"
            return RewardResult(None, each)
        return RewardResult(total if paid else None, each)

    def _watch(self, totals: list[float]) -> None:
        """Warns when all completions are worth the same for a while: nothing can be learned from that."""
        if len(totals) < 2:
            return
        self._constant_batches = self._constant_batches + 1 if len(set(totals)) == 1 else 0
        since = self._constant_batches - _CONSTANT_AFTER
        if since >= 0 and since % _CONSTANT_AGAIN == 0:
            logger.warning(
                "the reward was the same (%g) for every completion in each of the last %d batches",
                totals[0],
                self._constant_batches,
            )

    @property
    def silence(self) -> str:
        """Why completions have no reward."""
        return self.last_fault or "every reward function abstained (None) on every one"

    def close(self) -> None:
        """Ends the processes of functions with a timeout; they start again when needed."""
        for caller in self._callers:
            if isinstance(caller, Worker):
                caller.close()


def _arguments(
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Sequence[dict[str, Any]],
    completion_ids: Sequence[list[int]] | None,
) -> dict[str, Any]:
    """The keyword arguments of a TRL reward function; completions of conversations are messages."""
    spoken = [
        [{"role": "assistant", "content": completion}] if isinstance(prompt, list) else completion
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    names = dict.fromkeys(name for row in columns for name in row if name not in _RESERVED)
    return {
        "prompts": list(prompts),
        "completions": spoken,
        "completion_ids": list(completion_ids) if completion_ids is not None else [None] * len(prompts),
        **{name: [row.get(name) for row in columns] for name in names},
        "trainer_state": None,
        "log_extra": ignore,
        "log_metric": ignore,
    }


def _read(result: Any, count: int) -> Answer:
    """Sorts what a function returned into rewards and faults. A fault of the call is one of every row."""
    try:
        if isinstance(result, Exception):
            raise result
        if isinstance(result, BaseException):
            raise RuntimeError(f"ended by {type(result).__name__}: {result}") from result
        rows = plain_list(result)
        if len(rows) != count:
            raise ValueError(f"returned {len(rows)} rewards for {count} completions")
        faults = {row: fault for row, value in enumerate(rows) if (fault := _fault_of(value)) is not None}
        values = [None if value is None or row in faults else float(value) for row, value in enumerate(rows)]
    except Exception as error:  # also of values that fail when they are looked at
        return Answer([None] * count, dict.fromkeys(range(count), error))
    return Answer(values, faults)


def _fault_of(value: Any) -> Exception | None:
    if value is None or _is_finite_number(value):
        return None
    if isinstance(value, int | float):
        return ValueError(f"returned {_cut(value)}; expected a finite number or None")
    kind = type(value).__name__
    cure = "; write float(...) around it" if kind in _NEAR_NUMBERS else ""
    return TypeError(f"returned {_cut(value)} ({kind}); expected a number or None{cure}")


def _is_finite_number(value: Any) -> bool:
    if not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value))  # what it will be used as, whatever a subclass of float holds
    except OverflowError:  # an integer beyond float
        return False


def _fault_said(name: str, answer: Answer, prompts: Sequence[Any]) -> str:
    """The first fault of a function: its name, the row, the process and the prompt."""
    row, error = next(iter(answer.faults.items()))
    prompt = prompts[row] if isinstance(prompts[row], str) else prompts[row][-1].get("content")
    which = "" if len(answer.faults) == len(prompts) else f"in row {row + 1} of {len(prompts)} "
    if torch.distributed.is_initialized():
        which += f"on process {torch.distributed.get_rank()} "
    return f"the reward '{name}' failed {which}(prompt {prompt!r:.60}): {_described(error)}"


def _described(error: Exception) -> str:
    text = _cut(error, str, 500)
    plain = isinstance(error, TypeError | ValueError) and text.startswith("returned ")
    return text if plain else f"{type(error).__name__}: {text}"


def _cut(value: Any, spell: Callable[[Any], str] = repr, length: int = 40) -> str:
    """A value as text of bounded length, also where it cannot spell itself."""
    try:
        text = spell(value)
    except Exception as error:
        return f"<{type(value).__name__} that cannot be shown ({type(error).__name__})>"
    return text if len(text) <= length else text[: length - 3] + "..."


def _distinct(names: list[str]) -> list[str]:
    """The same names, with _2, _3 ... where one comes again."""
    taken: list[str] = []
    for name in names:
        number, candidate = 1, name
        while candidate in taken:
            number += 1
            candidate = f"{name}_{number}"
        taken.append(candidate)
    return taken
