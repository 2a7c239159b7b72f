"""A rollout worker apart from the learner: writes, has scored, and leaves whole segments in a shared folder."""

import os
import secrets
import socket
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llm_dqn import data, exchange, models
from llm_dqn.assembly import Inputs, network_for, stream_seed, writer_for
from llm_dqn.errors import UserError
from llm_dqn.evaluation import judged
from llm_dqn.inputs import inputs_of
from llm_dqn.memory import writing_batch
from llm_dqn.policy import PROMPTS, BehaviourPolicy
from llm_dqn.recipe import DQNConfig, load_recipe, resolve_path
from llm_dqn.rollout import at_temperatures, rollout, verify_generator
from llm_dqn.types import Episode, Prompt

AHEAD = 4  # segments that a collector may be ahead of the learner: what is written later is written by a newer policy
PERIOD = 0.2  # seconds between two looks at the learner
COLLECTOR = 5  # name of the random streams, beside those of the trainer


def collect(
    recipe_or_run: str, into: str, overrides: Sequence[str] = (), budget: int | None = None, say: Callable = print
) -> int:
    """Writes segments of `rollout.prompts_per_collect` prompts until the learner has finished or the budget is spent.

    recipe_or_run: the learner's recipe, whose `train.output_dir` is its run, or the run's folder. budget: completions
    scored by this collector at most. Returns how many were. Raises UserError for what cannot be opened.
    """
    folder = Path(resolve_path(recipe_or_run))
    is_run = (folder / "recipe.yaml").is_file()
    recipe = load_recipe(folder / "recipe.yaml" if is_run else recipe_or_run, overrides)
    run = folder if is_run else Path(recipe.train.output_dir)
    args, inputs = inputs_of(recipe)
    Path(into).mkdir(parents=True, exist_ok=True)
    collector = Collector(args, inputs, run / "policy", Path(into), say)
    try:
        return collector.work(budget)
    finally:
        inputs.rewards.close()


@dataclass
class _Worker:
    """What one name wrote for one run of a learner."""

    name: str
    run: str
    stream: data.PromptStream
    number: int = 0  # of the next segment


class Actor:
    """Writes by policies that a learner elsewhere has learned, and has the completions scored."""

    def __init__(self, args: DQNConfig, inputs: Inputs, device: torch.device, say: Callable) -> None:
        self.args, self.inputs = args, inputs
        self.network = network_for(args, inputs, device, target="head")
        self.writer = writer_for(args, inputs, self.network)
        self.vocabulary = models.vocabulary_hash(inputs.tokenizer)
        self.batch = writing_batch(self.writer.batch_size, say)
        self._verified = False

    def take_over(self, tensors: Mapping[str, Tensor], source: Path) -> None:
        """Acts by these weights of an online network from now on. Raises UserError when they do not fit the model."""
        twins = {f"target_{name}": value for name, value in tensors.items() if name.startswith("heads.")}
        try:
            self.network.load_checkpoint_state({**tensors, **twins})
        except (RuntimeError, KeyError) as error:
            raise UserError(f"{source}: the policy does not fit this recipe's model: {error}") from error
        if not self._verified:
            verify_generator(self.writer, self.inputs.train_prompts)
            self._verified = True

    def write(
        self, prompts: Sequence[Prompt], temperatures: Sequence[float], epsilon: float, seed: int, version: int
    ) -> list[Episode]:
        """One completion a prompt with its reward; those on which every reward abstained are left out."""
        args = self.args

        def attempt(rows: int) -> list[Episode]:
            def write(some: list[Prompt], temperature: float) -> list[Episode]:
                policy = BehaviourPolicy(temperature, args.top_k, args.top_p, args.min_p, epsilon, args.explore)
                return rollout(replace(self.writer, batch_size=rows), some, policy, seed, policy_version=version)

            return at_temperatures(prompts, temperatures, write)

        return judged(self.inputs.rewards, self.batch.run(attempt, len(prompts)))


class Collector:
    """policy: folder in which the learner publishes. into: where segments go."""

    def __init__(self, args: DQNConfig, inputs: Inputs, policy: Path, into: Path, say: Callable) -> None:
        self.args, self.inputs, self.policy, self.into, self.say = args, inputs, policy, into, say
        self.actor = Actor(args, inputs, torch.device("cuda" if torch.cuda.is_available() else "cpu"), say)
        self.worker: _Worker | None = None
        self.epsilon, self.version = 1.0, -1

    def work(self, budget: int | None) -> int:
        """Until the learner has finished, or so many completions were scored; returns how many were."""
        scored = 0
        told = False
        while not (self.policy / exchange.FINISHED).exists() and (budget is None or scored < budget):
            published = exchange.published_step(self.policy)
            if published is None:
                if not told:
                    self.say(f"waiting for the learner to publish its policy in {self.policy}")
                told = True
                time.sleep(PERIOD)
                continue
            worker = self._follow(published)
            if worker.number - exchange.read_taken(self.policy).get(worker.name, 0) >= AHEAD:
                time.sleep(PERIOD)
                continue
            left = None if budget is None else budget - scored
            scored += self._segment(worker, left)
        return scored

    def _follow(self, published: tuple[str, int]) -> _Worker:
        """Takes over the newest policy; another run of the learner knows nothing of what was written for the last."""
        run, step = published
        if self.worker is None or self.worker.run != run:
            name = f"{_plain(socket.gethostname())}-{os.getpid()}-{secrets.token_hex(3)}"
            seed = stream_seed(self.args.seed, COLLECTOR, zlib.crc32(name.encode()))
            stream = data.PromptStream(self.inputs.train_prompts, seed, self.args.num_generations)
            self.worker, self.version = _Worker(name, run, stream), -1
            self.say(f"collecting for {self.policy.parent} as {name}")
        if step != self.version:
            policy = exchange.read_policy(self.policy)
            if policy.run == run:
                self.actor.take_over(policy.tensors, self.policy)
                self.epsilon, self.version = policy.epsilon, policy.step
        return self.worker

    def _segment(self, worker: _Worker, left: int | None) -> int:
        """Writes one; how many completions were scored for it."""
        args = self.args
        prompts = worker.stream.next_batch(args.prompts_per_collect or PROMPTS)[:left]
        seed = stream_seed(args.seed, COLLECTOR, zlib.crc32(worker.name.encode()), worker.number)
        # what a policy that may be old finds likeliest is not worth a call
        temperatures = [1.0 if args.temperature is None else args.temperature] * len(prompts)
        scored = self.actor.write(prompts, temperatures, self.epsilon, seed, self.version)
        exchange.write_segment(
            self.into, worker.name, worker.number, len(prompts), scored, worker.run, self.actor.vocabulary
        )
        worker.number += 1
        return len(prompts)


def _plain(host: str) -> str:
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_") else "-" for letter in host)
