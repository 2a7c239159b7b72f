"""A rollout worker apart from the learner: writes, has scored, and leaves whole segments in a shared folder."""

import os
import secrets
import socket
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llm_dqn import data, exchange, models
from llm_dqn.assembly import Inputs, network_for, stream_seed
from llm_dqn.errors import UserError
from llm_dqn.evaluation import judged
from llm_dqn.inputs import inputs_of
from llm_dqn.policy import BehaviourPolicy
from llm_dqn.recipe import DQNConfig, load_recipe, resolve_path
from llm_dqn.rollout import Writer, rollout, verify_generator

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


class Collector:
    """policy: folder in which the learner publishes. into: where segments go."""

    def __init__(self, args: DQNConfig, inputs: Inputs, policy: Path, into: Path, say: Callable) -> None:
        self.args, self.inputs, self.policy, self.into, self.say = args, inputs, policy, into, say
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = network_for(args, inputs, device, target="head")
        stop_ids = frozenset(models.stop_token_ids(inputs.model, inputs.tokenizer))
        self.writer = Writer(self.network, inputs.tokenizer, stop_ids, args.max_completion_length)
        self.vocabulary = models.vocabulary_hash(inputs.tokenizer)
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
                twins = {f"target_{name}": value for name, value in policy.tensors.items() if name.startswith("heads.")}
                try:
                    self.network.load_checkpoint_state(policy.tensors | twins)
                except (RuntimeError, KeyError) as error:
                    raise UserError(f"{self.policy}: the policy does not fit this recipe's model: {error}") from error
                if self.version < 0:
                    verify_generator(self.writer, self.inputs.train_prompts)
                self.epsilon, self.version = policy.epsilon, policy.step
        return self.worker

    def _segment(self, worker: _Worker, left: int | None) -> int:
        """Writes one; how many completions were scored for it."""
        args = self.args
        prompts = worker.stream.next_batch(args.prompts_per_collect)[:left]
        policy = BehaviourPolicy(args.temperature, args.top_k, args.top_p, args.min_p, self.epsilon, args.explore)
        seed = stream_seed(args.seed, COLLECTOR, zlib.crc32(worker.name.encode()), worker.number)
        episodes = rollout(self.writer, prompts, policy, seed, policy_version=self.version)
        scored = judged(self.inputs.rewards, episodes)
        exchange.write_segment(
            self.into, worker.name, worker.number, len(episodes), scored, worker.run, self.vocabulary
        )
        worker.number += 1
        return len(episodes)


def _plain(host: str) -> str:
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_") else "-" for letter in host)
