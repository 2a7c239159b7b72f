"""A collector that a run starts beside itself: does the orders of its learner, and ends with it.

    python -m llm_dqn.overlap_worker RUN FOLDER INDEX COUNT RANK WORLD DEVICE

Its input is a pipe whose other end the learner holds: when that closes, the learner is gone, however it ended.
"""

import multiprocessing
import os
import sys
import threading
import time
import traceback
from pathlib import Path

import torch

from llm_dqn import data, exchange
from llm_dqn.assembly import stream_seed
from llm_dqn.attempts import Attempts
from llm_dqn.collector import Actor
from llm_dqn.errors import RunError, UserError
from llm_dqn.inputs import inputs_of
from llm_dqn.overlap import PERIOD, failure_file, worker_name
from llm_dqn.recipe import load_recipe
from llm_dqn.trainer import COLLECT


def work(run: Path, folder: Path, index: int, count: int, rank: int, world: int, device: str) -> None:
    """Does every `count`-th order, the `index`-th first, until the learner has finished."""
    args, inputs = inputs_of(load_recipe(run / "recipe.yaml"))
    actor = Actor(args, inputs, torch.device(device), print)
    stream = data.PromptStream(inputs.train_prompts, args.seed, args.num_generations, rank, world)
    done = -1
    try:
        while not (folder / exchange.FINISHED).exists():
            mine = [(n, file) for n, file in exchange.orders(folder) if n % count == index and n > done]
            if not mine:
                time.sleep(PERIOD)
                continue
            done, file = mine[0]
            order, tensors, digest = exchange.read_order(file)
            name = worker_name(digest, rank)
            if any(segment.worker == name for segment in exchange.segments(folder)):
                continue  # written before the run was stopped
            actor.take_over(tensors, file)
            stream.load_state_dict(order.prompts)
            prompts = stream.next_batch(order.draw)[: order.completions]
            seed = stream_seed(args.seed, COLLECT, order.scored, rank)
            temperatures = Attempts(order.failed).temperatures(prompts, order.temperature)
            episodes = actor.write(prompts, temperatures, order.epsilon, seed, order.step)
            exchange.write_segment(folder, name, order.number, len(prompts), episodes, digest, actor.vocabulary)
    finally:
        inputs.rewards.close()


def end_with_the_learner() -> None:
    """Ends this process, and what its rewards started, as soon as the learner's end of the pipe is closed."""

    def wait() -> None:
        sys.stdin.buffer.read()
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="watches-the-learner").start()


def main(run: str, folder: str, index: str, count: str, rank: str, world: str, device: str) -> None:
    """Leaves a note for the learner when it fails."""
    end_with_the_learner()
    try:
        work(Path(run), Path(folder), int(index), int(count), int(rank), int(world), device)
    except Exception as error:
        traceback.print_exc()
        plain = isinstance(error, UserError | RunError)
        message = str(error) if plain else f"{type(error).__name__}: {error}"
        kind = "UserError" if isinstance(error, UserError) else "StepFailed"
        exchange.write_json(failure_file(Path(folder), int(rank), int(index)), {"kind": kind, "message": message})
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
