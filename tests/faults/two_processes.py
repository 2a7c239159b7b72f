"""One of the two processes of `test_processes`: goes through faults that need two, and notes what came of each."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llm_dqn import reduction
from llm_dqn.errors import RunError, UserError
from llm_dqn.lock import RunLock
from llm_dqn.types import PrefixBatch
from tests.test_trainer import letters, trainer

FEW = {"learning_starts": 4, "per_device_train_batch_size": 4, "eval_steps": 0, "final_eval_prompts": 2}


# With a rate of 0 the weights are those of any other such run, however many processes it has.
EXAMINED = FEW | {"learning_rate": 0.0, "value_learning_rate": 0.0, "final_eval_prompts": 4}
EXAMINED |= {"final_beta_scales": [0.5, 2.0], "eval_steps": 1, "max_steps": 1}


def main(path: str, home: str) -> None:
    torch.set_num_threads(1)
    notes: dict[str, Any] = {}
    scenes = (whole_and_cut, nan_on_one, reward_fails_on_one, folder_in_use, more_processes, asked_by_main, examined)
    scenes = (*scenes, memory_runs_out_on_one, memory_runs_out_for_good, some_gradients)
    for scene in (*scenes, code_fails_on_one):
        started = time.monotonic()
        notes[scene.__name__] = scene(path, Path(home))
        notes[scene.__name__]["seconds"] = time.monotonic() - started
        rank = torch.distributed.get_rank()
        (Path(home) / f"notes-{rank}.json").write_text(json.dumps(notes))


def rank_of(run: Any) -> int:
    return run.parts.accelerator.process_index


def failure(run: Any) -> list[str]:
    try:
        run.train()
    except (RunError, UserError) as error:
        return [type(error).__name__, str(error)]
    return ["none", ""]


def whole_and_cut(path: str, home: Path) -> dict[str, Any]:
    """The same run twice: once in one go, once cut after a step that no checkpoint has."""
    options = FEW | {"max_steps": 5, "save_steps": 2, "logging_steps": 3, "lr_scheduler_type": "linear"}
    trainer(path, home / "whole", **options).train()
    cut = trainer(path, home / "cut", **options)
    update = cut.update

    def failing(batches: Any) -> None:
        if cut.step == 3:
            raise RunError("cut")
        update(batches)

    cut.update = failing  # type: ignore[method-assign]
    said = failure(cut)
    trainer(path, home / "cut", **options).train(resume=True)
    return {"said": said}


def nan_on_one(path: str, home: Path) -> dict[str, Any]:
    run = trainer(path, home / "nan", **FEW, max_steps=3, save_steps=0)
    poisoned = run.parts.trainable[0]
    poisoned.register_hook(
        lambda gradient: gradient * float("nan") if run.step == 1 and rank_of(run) == 1 else gradient
    )
    run.train()
    weights = [parameter.detach().sum().item() for parameter in run.parts.trainable]
    return {"skipped": run.nonfinite.total, "weights": weights}


def reward_fails_on_one(path: str, home: Path) -> dict[str, Any]:
    """In the second collection, on process 1 alone."""
    calls = []

    def reward(prompts: Any, completions: Any, wanted: Any, **columns: Any) -> list[float]:
        calls.append(len(completions))
        if len(calls) == 2 and torch.distributed.get_rank() == 1:
            raise KeyError("judge")
        return letters(prompts, completions, wanted)

    first = trainer(path, home / "fails", reward, **FEW, max_steps=4, save_steps=0)
    said = failure(first)
    again = trainer(path, home / "fails", reward, **FEW, max_steps=4, save_steps=0)
    again.train(resume=True)
    return {"said": said, "saved_at": first.step, "scored": again.scored_completions}


def folder_in_use(path: str, home: Path) -> dict[str, Any]:
    run = trainer(path, home / "held", **FEW, max_steps=1)
    other = RunLock(home / "held")
    if rank_of(run) == 0:
        other.acquire()
    said = failure(run)
    other.release()
    return {"said": said}


def more_processes(path: str, home: Path) -> dict[str, Any]:
    """Goes on from what one process alone has saved."""
    run = trainer(path, home / "alone", **FEW, max_steps=3)
    run.begin(resume=True)
    return {"step": run.step, "rewards": run.replay.rewards.tolist()}


def asked_by_main(path: str, home: Path) -> dict[str, Any]:
    """The reward is called on process 0 alone, once a collection, for what both wrote."""
    calls: list[int] = []

    def reward(prompts: Any, completions: Any, wanted: Any, **columns: Any) -> list[float | None]:
        calls.append(len(completions))
        return [None, *(float(row) for row in range(1, len(completions)))]  # the first of all, which process 0 wrote

    run = trainer(path, home / "main", reward, **(FEW | {"learning_starts": 3}), max_steps=2, called_by="main")
    run.train()
    stored, settings = len(run.replay), [run.scored_completions, run.epsilon, run.budget_left, run.step]
    rewards = run.replay.rewards.tolist()
    return {"calls": calls, "stored": stored, "settings": settings, "rewards": rewards}


def examined(path: str, home: Path) -> dict[str, Any]:
    """A policy that learned nothing measured by both, each doing a part."""
    written: list[int] = []
    run = trainer(path, home / "examined", **(EXAMINED | {"max_steps": 1}))
    write = run.examiner.written
    run.examiner.written = lambda work, rows: (written.append(rows), write(work, rows))[1]  # type: ignore[func-returns-value]
    return {"report": run.train(), "parts": len(written)}


def starved(run: Any, place: str, until: float) -> list[tuple[int, int]]:
    """Lets memory run out on process 1, in its second piece of step 1, where more than `until` rows go at a time.

    Returns what grows to (step, rows) of each piece; `place` is td_target, in which no gradient flows, or the loss.
    """
    work = run.td_target if place == "td_target" else run.parts.objective
    pieces: list[tuple[int, int]] = []

    def starving(*given: Any) -> Any:
        rows = next(len(one.slots) for one in given if isinstance(one, PrefixBatch))
        second = bool(pieces) and pieces[-1] == (run.step, rows)
        pieces.append((run.step, rows))
        result = work(*given)
        if run.step == 1 and rank_of(run) == 1 and rows > until and second:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return result

    if place == "td_target":
        run.td_target = starving
    else:
        run.learner.parts = replace(run.parts, objective=starving)
    return pieces


def memory_runs_out_on_one(path: str, home: Path) -> dict[str, Any]:
    """In a target, and in a loss after its first piece had gone backward: beside a run that had memory enough."""
    options = FEW | {"max_steps": 3, "save_steps": 0, "gradient_accumulation_steps": 2, "target_sync_steps": 1}
    weights, pieces, messages = {}, {}, {}
    for place in ("enough", "td_target", "loss"):
        run = trainer(path, home / f"memory-{place}", **options)
        before = weights_of(run)
        pieces[place] = starved(run, place, until=2) if place != "enough" else []
        with counted(run) as messages[place]:
            run.train()
        weights[place] = weights_of(run)
    apart = {place: (found - weights["enough"]).abs().max().item() for place, found in weights.items()}
    moved = (weights["enough"] - before).abs().max().item()
    return {"apart": apart, "moved": moved, "pieces": pieces["loss"], "messages": messages["enough"]}


def weights_of(run: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in run.parts.trainable])


@contextmanager
def counted(run: Any) -> Iterator[list[int]]:
    """Sums over processes in each learner step, and in what comes before the next one."""
    messages: list[int] = []
    every, update = dist.all_reduce, run.update

    def counting(*given: Any, **options: Any) -> Any:
        if messages:
            messages[-1] += 1
        return every(*given, **options)

    def updating(batches: Any) -> None:
        messages.append(0)
        update(batches)

    dist.all_reduce, run.update = counting, updating
    run.evaluate = dict
    try:
        yield messages
    finally:
        dist.all_reduce = every


def memory_runs_out_for_good(path: str, home: Path) -> dict[str, Any]:
    """Half of the rows are too many, too: both end alike, and save."""
    run = trainer(path, home / "starved", **FEW, max_steps=3, save_steps=0, gradient_accumulation_steps=2)
    starved(run, "loss", until=0)
    said = failure(run)
    again = trainer(path, home / "starved", **FEW, max_steps=3, save_steps=0, gradient_accumulation_steps=2)
    again.train(resume=True)
    return {"said": said, "saved_at": run.step, "step": again.step}


def some_gradients(path: str, home: Path) -> dict[str, Any]:
    """One that both have, one of another type, one that process 1 has alone, transposed, and one that nobody has."""
    rank, bucket = dist.get_rank(), reduction.BUCKET
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3,), (2,), (2, 2), (1,))]
    parameters[1] = torch.nn.Parameter(parameters[1].detach().bfloat16())
    parameters[0].grad = torch.full((3,), rank + 1.0)
    parameters[1].grad = torch.full((2,), 0.5, dtype=torch.bfloat16)
    if rank == 1:
        parameters[2].grad = torch.arange(4.0).view(2, 2).T
    reduction.BUCKET = 32  # bytes: several messages
    told = reduction.sum_gradients(parameters, torch.tensor([1.0, float(rank)]))
    reduction.BUCKET = bucket
    gradients = [None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters]
    return {"told": told.tolist(), "gradients": gradients}


def code_fails_on_one(path: str, home: Path) -> dict[str, Any]:
    """Inside a step, while the other process waits in a collective; the one that fails leaves."""
    run = trainer(path, home / "code", **FEW, max_steps=4)
    update = run.update

    def failing(batches: Any) -> None:
        if run.step == 2 and rank_of(run) == 1:
            raise ZeroDivisionError("of process 1")
        update(batches)

    run.update = failing  # type: ignore[method-assign]
    return {"said": failure(run)}


if __name__ == "__main__":
    main(*sys.argv[1:])
