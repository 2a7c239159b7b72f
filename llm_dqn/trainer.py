"""Deep Q-learning on token prefixes: the loop, and the few lines that each of its steps takes."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from llm_dqn import recipe_changes
from llm_dqn.assembly import Inputs, assemble, recipe_text, stream_seed, with_learning_rate
from llm_dqn.attempts import Attempts
from llm_dqn.errors import RunError, StepFailed
from llm_dqn.examiner import Examiner
from llm_dqn.hub import push
from llm_dqn.inputs import inputs_from_python, inputs_of
from llm_dqn.intake import Intake
from llm_dqn.judging import Judges
from llm_dqn.launch import check_launch
from llm_dqn.learner import Learner
from llm_dqn.logbook import Logbook, trackers
from llm_dqn.memory import learning_batch, writing_batch
from llm_dqn.numerics import NonFiniteSteps, QAlarm
from llm_dqn.policy import BehaviourPolicy
from llm_dqn.processes import Processes
from llm_dqn.recipe import DQNConfig, Recipe
from llm_dqn.rollout import Writer, at_temperatures, verify_generator
from llm_dqn.sharding import adapters_whole, whole
from llm_dqn.signals import StopRequest
from llm_dqn.trust_region import LOOK_STEPS, MOST_LOOK_STEPS, behaviour_kl
from llm_dqn.types import Episode, PrefixBatch, Prompt, TDTarget, joined

T = TypeVar("T")
COLLECT, REPLAY, EVALUATE, DROPOUT = 1, 2, 3, 4  # names of the random streams
MAX_EMPTY_COLLECTS = 10  # in a row, without one scored completion
CURVE_PROMPTS = 64  # held-out prompts, at most, on which each of final_beta_scales is measured


class DQNTrainer(Intake):
    """Tunes a causal LM by deep Q-learning against rewards on whole completions.

    State: a prompt plus the tokens written so far. Action: the next token. Reward: 0 until the completion ends, then
    what `reward_funcs` say of the text. Mnih et al. 2015 (replay, target network, epsilon-greedy), with the heads of
    `network`, the rules of `targets` and the errors of `losses`.

    model: a path, a Hub id, or a loaded causal LM (then give `processing_class`, its tokenizer).
    reward_funcs: TRL's: a callable `f(prompts, completions, **columns) -> list[float | None]`, sync or async, the path
    or Hub id of a sequence-classification model, or a list of these.
    train_dataset, eval_dataset: anything with a `prompt` column: a `datasets.Dataset`, a file, a list of rows. Without
    `eval_dataset` some training prompts are held out.
    peft_config: a `peft.LoraConfig`; None tunes all weights.

    Raises UserError for anything wrong in what it was given, before any training.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: DQNConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
    ) -> None:
        inputs = inputs_from_python(
            model, reward_funcs, args, train_dataset, eval_dataset, processing_class, peft_config
        )
        self._start(args, inputs, recipe=None)

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> "DQNTrainer":
        """The same trainer from a recipe."""
        check_launch()
        return cls.of_inputs(*inputs_of(recipe), recipe)

    @classmethod
    def of_inputs(cls, args: DQNConfig, inputs: Inputs, recipe: Recipe | None = None) -> "DQNTrainer":
        """The same trainer from what is loaded already."""
        trainer = cls.__new__(cls)
        trainer._start(args, inputs, recipe)
        return trainer

    def _start(self, args: DQNConfig, inputs: Inputs, recipe: Recipe | None) -> None:
        self.args = args = with_learning_rate(args, inputs.lora)
        self.parts = parts = assemble(args, inputs)
        self.network, self.replay = parts.network, parts.replay
        self.step = 0
        self.collected_at = -1  # the step before which was collected last
        self.collect_at = self.look_at = 0  # the step before which is collected next, or after which is looked
        self.samples_drawn = 0  # minibatches, by this process
        self.scored_completions = 0  # by the rewards, over all processes; evaluation is counted apart
        self.logbook = Logbook(
            Path(args.output_dir),
            parts.accelerator,
            parts.network.base_name,
            recipe_text(args, parts, recipe),
            trackers=trackers(args.report_to),
            run_name=args.run_name,
            keep_checkpoints=args.save_total_limit,
        )
        say = self.logbook.say
        self.processes = Processes(
            parts.accelerator.process_index, parts.accelerator.num_processes, parts.network.device
        )
        self.nonfinite = NonFiniteSteps(args.max_nonfinite_steps, say, self.logbook.last_checkpoint)
        self.attempts = Attempts()
        self.rewards_measured = args.q_head == "linear"  # which learns from them as they are
        self.stop = StopRequest()
        self.learner = Learner(
            parts,
            self.logbook,
            self.processes,
            self.nonfinite,
            self.stop,
            max_grad_norm=args.max_grad_norm,
            prioritized=args.prioritized,
        )
        self.q_alarm = QAlarm(say)
        self.writing = writing_batch(parts.writer.batch_size, say)
        agree = self.processes.agree if self.processes.world > 1 else None
        self.learning = learning_batch(args.per_device_train_batch_size, say, agree)
        self.judges = Judges(parts.rewards, self.processes, on_main=args.called_by == "main")
        seed = stream_seed(args.seed, EVALUATE, 0)  # the same on every process
        self.examiner = Examiner(parts.writer, self.processes, self.judges, self.written, seed)
        self.source = self.choose_source()

    # --- the algorithm ----------------------------------------------------------------------------------------------

    def train(
        self, resume: bool | str = False, allow_changes: Sequence[str] = (), replay_repair: bool = False
    ) -> dict[str, Any]:
        """Learns until `max_steps` or until `max_scored_completions` are spent; returns what `evaluation.json` has.

        resume: goes on from the newest complete checkpoint in `output_dir`, or from the one it names. allow_changes:
        dotted recipe keys that may then differ from the run's although what was saved belongs to their old value.
        replay_repair: stored episodes whose file is damaged are dropped.
        Raises UserError for what cannot go on or is in use, RunError when the run fails, SystemExit when it was asked
        to stop and has saved.
        """
        try:
            with self.processes:
                self.begin(resume, allow_changes, replay_repair)
                with self.source_open():
                    self.learn()
                if self.parts.early_stopping is not None and self.parts.early_stopping.best:
                    self.logbook.say(self.parts.early_stopping.put_back())
                self.save_model()
                return self.evaluate()
        finally:
            self.logbook.close()

    def learn(self) -> None:
        """The loop: collect, remember, sample, learn, sync, until done or asked to stop."""
        with self.stop as stop, self.logbook.panel(self.args.max_steps), self.saved_where_possible():
            while not self.learned_enough() and self.step < self.args.max_steps:
                if self.step >= self.collect_at:
                    if self.step > 0 and self.budget_left == 0 and self.args.max_scored_completions:
                        break
                    self.collect()

                batches = [self.sample() for _ in range(self.args.gradient_accumulation_steps)]
                self.learn_from(batches)

                self.step += 1
                if self.step % self.args.target_sync_steps == 0:
                    self.network.sync_target(self.args.target_tau)
                if self.left_trust_region():
                    self.collect_at = self.step

                self.report(batches)
                if self.stopping():
                    self.save_checkpoint()
                    self.logbook.say(
                        f"stopped and saved after step {self.step}; the same command with --resume goes on"
                    )
                    raise SystemExit(stop.exit_code)
            self.save_checkpoint()

    def collect(self) -> None:
        """The behaviour policy writes, the rewards judge whole completions, the replay remembers all their prefixes."""
        lacking = torch.tensor(1.0)  # processes that hold too few episodes; all go on together
        fresh: list[Episode] = []
        before = self.scored_completions
        for _ in range(MAX_EMPTY_COLLECTS):
            if self.budget_left == 0:
                break
            started = time.perf_counter()
            written, episodes, sharp = self.source()
            self.replay.add(episodes)
            self.learn_from_attempts(episodes, sharp)
            fresh += episodes
            self.logbook.collected(episodes, self.epsilon, time.perf_counter() - started, self.step, not self.apart)
            written, lacking = self.parts.totals(written, len(self.replay) < self.args.learning_starts)
            self.scored_completions += int(written)
            if lacking == 0:
                break
        if lacking > 0 and self.parts.totals(len(self.replay) == 0) > 0:
            said = f"{self.scored_completions} completions scored, no reward among them"
            raise RunError(f"nothing to learn from: {said}: {self.parts.rewards.silence}")
        self.measure_rewards()
        self.see_rewards()
        more = 0  # times the steps
        if self.scored_completions > before:
            more = self.imagine(fresh)
        else:
            self.write_alone()
        steps = self.args.updates_per_collect * (1 + more)
        self.collected_at, self.collect_at, self.look_at = self.step, self.step + steps, self.step + LOOK_STEPS

    def write_and_score(self) -> tuple[int, list[Episode], bool]:
        """As `intake.Source`, on this process."""
        before, sharp = self.parts.stream.state_dict(), self.sharp is not None
        try:
            with whole(self.network):
                return (*self.judges.after(self.rollout, self.score), sharp)
        except StepFailed:
            self.parts.stream.load_state_dict(before)  # the same prompts come again
            raise

    def rollout(self) -> list[Episode]:
        """Fresh completions by the epsilon-greedy behaviour policy."""
        args = self.args
        prompts = self.parts.stream.next_batch(self.share(self.prompts_per_collect))[: self.budget_left]
        seed = self.seed_for(COLLECT, self.scored_completions)

        def write(some: list[Prompt], temperature: float) -> list[Episode]:
            policy = BehaviourPolicy(temperature, args.top_k, args.top_p, args.min_p, self.epsilon, args.explore)
            return self.write(some, policy, seed)

        return at_temperatures(prompts, self.temperatures(prompts), write)

    def score(self, episodes: list[Episode]) -> list[Episode]:
        """What the rewards say; completions on which all of them abstained are left out."""
        return [episode for episode in self.judges.own(episodes) if episode is not None]

    def sample(self) -> PrefixBatch:
        """Remembered episodes with all their prefixes."""
        self.samples_drawn += 1
        rng = np.random.default_rng([self.args.seed, REPLAY, self.samples_drawn, self.parts.accelerator.process_index])
        batch = self.replay.sample(self.args.per_device_train_batch_size, rng, self.parts.sampling)
        self.logbook.add("replay/age", float(self.step - self.replay.versions[batch.slots.numpy()].mean()))
        return self.with_own(batch, rng).to(self.parts.accelerator.device)

    @torch.no_grad()
    def td_target(self, batch: PrefixBatch) -> TDTarget:
        """What Q should have been, by the target network."""
        q = self.network.target(batch)
        returns = self.parts.returns(batch, q)
        advantages = (returns - q.values) * batch.action_mask
        target = TDTarget(returns, advantages, self.weights(advantages, batch), q.taken)
        return target if self.sharpening is None else self.sharpening.as_if_right(target, q, batch)

    def learn_from(self, batches: Sequence[PrefixBatch]) -> None:
        """What Q should have been by the target network, and one step towards that; in halves when memory runs out.

        Several batches are dealt anew by length: each episode's share of the loss is the same in any of them.
        """

        def attempt(rows: int) -> None:
            torch.manual_seed(self.seed_for(DROPOUT, self.step))
            self.parts.optimizer.zero_grad()  # of an attempt that ran out of memory
            self.update(joined(batches).split(rows))

        drawn = self.samples_drawn - len(batches)
        try:
            self.learning.run(attempt, self.args.per_device_train_batch_size)
        except StepFailed:
            self.samples_drawn = drawn  # the same episodes come again
            raise

    def update(self, batches: Sequence[PrefixBatch]) -> None:
        """One optimizer step towards `td_target` on a mean over all action tokens of the batches, on all processes."""
        self.learner.update(self.step, batches, self.td_target)

    # --- small questions that the loop asks -------------------------------------------------------------------------

    @torch.no_grad()
    def left_trust_region(self) -> bool:
        """Whether the policy is more than `target_kl` nats a token from the one that wrote the newest completions.

        Then those of now are worth more than another update on the same few, also where others write, by a policy that
        is older. Not asked of runs that collect nothing.
        """
        args = self.args
        if args.target_kl is None or args.log_alone or self.step < self.look_at:
            return False
        with whole(self.network):  # processes may have a different number of batches
            total, count = self.parts.totals(*behaviour_kl(self.network, self.replay, args.per_device_train_batch_size))
        shift = float(total / count)
        self.logbook.add("train/behaviour_kl", shift)
        since = self.step - self.collected_at
        # later where little moves
        self.look_at = self.step + (LOOK_STEPS if shift > args.target_kl / 4 else min(since, MOST_LOOK_STEPS))
        return shift > args.target_kl

    def stopping(self) -> bool:
        """Whether any process was asked to stop: heard with each update, and again before a collection, a long one."""
        if self.processes.world == 1:
            return self.stop.requested is not None
        if self.step >= self.collect_at:
            return bool(self.parts.totals(self.stop.requested is not None) > 0)
        return self.learner.stopping

    def seed_for(self, *names: int) -> int:
        """A seed that no other purpose, step or process has."""
        return stream_seed(self.args.seed, *names, self.parts.accelerator.process_index)

    def written(self, work: Callable[[Writer], T], rows: int) -> T:
        """What `work` with a writer returns; the writer writes fewer completions at a time when memory runs out."""
        return self.writing.run(lambda size: work(replace(self.parts.writer, batch_size=size)), rows)

    # --- starting, looking, keeping ---------------------------------------------------------------------------------

    def begin(self, resume: bool | str, allow_changes: Sequence[str] = (), replay_repair: bool = False) -> None:
        """Opens the run folder, goes on from a checkpoint when asked, and has writer and learner compared."""

        def accept(state: dict[str, Any]) -> None:
            for line in recipe_changes.changes(state["recipe"], self.settings, allow_changes):
                self.logbook.say(f"changed: {line}")

        self.processes.agree(self.logbook.claim)
        found = self.logbook.open(resume, accept, replay_repair)
        if found is not None:
            self.load_state(*found)
        for note in self.parts.notes:
            self.logbook.say(note)
        with whole(self.network):
            verify_generator(self.parts.writer, self.parts.eval_prompts)

    @contextmanager
    def saved_where_possible(self) -> Iterator[None]:
        """Saves when a step cannot be finished and everything before it is whole; then the error goes on."""
        try:
            yield
        except StepFailed:
            if self.processes.together:
                self.save_checkpoint()
                self.logbook.say(f"saved at step {self.step}; the same command with --resume tries this step again")
            raise

    def report(self, batches: Sequence[PrefixBatch]) -> None:
        """What falls due after a step: a line of metrics, an evaluation, a checkpoint."""
        args, last = self.args, self.step == self.args.max_steps
        if self.step % args.publish_steps == 0:
            self.publish()
        self.logbook.progressed(self.step)
        if args.eval_steps and self.step % args.eval_steps == 0:
            with whole(self.network):
                verify_generator(self.parts.writer, self.parts.eval_prompts)
                measured = self.examiner.look(self.parts.eval_prompts[: args.eval_prompts])
            for name in ("reward", "reward_greedy"):
                if measured.figures[name] is not None:
                    self.logbook.add(f"eval/{name}", measured.figures[name])
        if self.step % args.logging_steps == 0 or last:
            kl = self.network.kl(batches[-1].tokens).sum() / batches[-1].action_mask.sum()
            facts = {"rollout/epsilon": self.epsilon, "replay/episodes": len(self.replay), "train/kl": float(kl)}
            facts["train/nonfinite_steps"] = self.nonfinite.total
            facts["reward/cached"] = self.parts.rewards.cached_share()
            if self.network.hidden_cache is not None:
                facts["train/hidden_cached"] = self.network.hidden_cache.hit_share()
            if self.shared is not None:
                facts["replay/refused"] = self.shared.refused
            line = self.logbook.write(self.step, self.scored_completions, facts)
            self.q_alarm.seen(self.replay.rewards)
            self.q_alarm.look(self.step, line.get("train/q_max"), self.network.beta)
        if args.save_steps and self.step % args.save_steps == 0 and not last:
            self.save_checkpoint(beside=True)

    def evaluate(self) -> dict[str, Any]:
        """Base against tuned on the held-out prompts; written to `evaluation.json` and shown."""
        prompts = self.parts.eval_prompts[: self.args.final_eval_prompts]
        self.logbook.say(f"measuring base and tuned model on {len(prompts)} held-out prompts ...")
        with whole(self.network):
            report, pairs = self.examiner.compare(prompts, self.args.final_beta_scales, CURVE_PROMPTS)
            self.logbook.finished(report, pairs, self.parts.writer)
        return report

    def save_model(self, output_dir: str | None = None) -> Path:
        """Writes `adapter/`, which opens in plain PEFT (`model/` when all weights were tuned); returns the folder."""
        folder = None if output_dir is None else Path(output_dir)
        with adapters_whole(self.network):
            return self.logbook.save_policy(self.network, self.parts.writer.tokenizer, folder)

    def push_to_hub(self, repo_id: str, private: bool = True, base_model: str | None = None) -> str:
        """Saves the policy and uploads it as `llm-dqn push` does; returns the address of the commit.

        base_model: Hub id of a base model that was loaded from a folder. Raises UserError and HubError as `push` does.
        """
        self.save_model()
        if not self.logbook.main:
            return ""
        say = self.logbook.say
        return push(self.args.output_dir, repo_id, public=not private, base_model=base_model, say=say)
