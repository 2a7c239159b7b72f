"""Where a trainer's completions come from: it writes them itself, or takes in what other processes write."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llm_dqn.attempts import Attempt
from llm_dqn.dyna import Dyna
from llm_dqn.early_stopping import HELD_OUT, PREDICTED, SHARPER
from llm_dqn.exchange import Order
from llm_dqn.losses import agreeing, signed_weights, unsure
from llm_dqn.overlap import Overlap
from llm_dqn.policy import FEW_PROMPTS, MILD, PROMPTS, SHARP, BehaviourPolicy, sampled
from llm_dqn.reward_kinds import MARGIN
from llm_dqn.rewards_seen import RewardsSeen
from llm_dqn.rollout import rollout
from llm_dqn.sharding import gathered, whole
from llm_dqn.shared_folder import SharedFolder
from llm_dqn.sharpening import Sharpening
from llm_dqn.signals import Stopped, StopRequest
from llm_dqn.types import Episode, PrefixBatch, Prompt

IMAGINE, SHARPEN = 6, 7  # names of random streams, beside those of the trainer
# Share of the rewards' variance that predictions must explain. Where successes are imitated, what is taken for one must
# mostly be one; grades are shrunk towards their mean by what is not known, and weigh less.
LEAST, LEAST_OF_GRADES = 0.6, 0.2
# (how many completions were written, those that got a reward, whether the policy acted sharply, as far as known here)
Source = Callable[[], tuple[int, list[Episode], bool]]


class Intake(RewardsSeen):
    """The part of a trainer that takes in what others write."""

    stop: StopRequest
    write_and_score: Source
    seed_for: Callable[..., int]
    written: Callable[..., list[Episode]]

    @property
    def apart(self) -> bool:
        """Whether other processes write."""
        return self.shared is not None or self.overlap is not None

    @property
    def epsilon(self) -> float:
        """Share of exploration at this step."""
        return self.parts.epsilon(self.step)

    @property
    def sharp(self) -> float | None:
        """Temperature of acting sharply, or None where that is not done.

        Where an answer is right or wrong, what the policy finds likeliest is worth a call. Where rewards are counted it
        acts mildly. Where a judge grades, or a temperature is given, it does not, nor before anything was learned.
        """
        kinds = self.replay.kinds
        if self.args.temperature is not None or self.step == 0 or len(kinds.values) < 2:
            return None
        return SHARP if kinds.right_or_wrong else MILD if kinds.repeat else None

    @property
    def temperature(self) -> float:
        """Of the acting policy, at prompts where acting sharply has not failed."""
        given = 1.0 if self.args.temperature is None else self.args.temperature
        return given if self.sharp is None else self.sharp

    def temperatures(self, prompts: Sequence[Prompt]) -> list[float]:
        """Of the acting policy at each of these prompts."""
        if self.sharp is None:
            return [self.temperature] * len(prompts)
        return self.attempts.temperatures(prompts, self.sharp)

    def write(self, prompts: Sequence[Prompt], policy: BehaviourPolicy, seed: int) -> list[Episode]:
        """What the network writes to the prompts by this policy, not yet scored."""
        work = partial(rollout, prompts=prompts, policy=policy, seed=seed, policy_version=self.step)
        return self.written(work, len(prompts))

    def learn_from_attempts(self, episodes: Sequence[Episode], sharp: bool) -> None:
        """Notes at which prompts not to act sharply the next time, if this was that, on all processes.

        Right and wrong tell. Who acts sharply on a part of an answer, or on what predictions make of it, would not find
        the rest: there it is every other time.
        """
        if self.args.temperature is not None:
            return
        made: list[Attempt] = []
        if sharp and self.replay.kinds.right_or_wrong and not self.replay.imagined:
            made = self.attempts.at(episodes, self.replay.rewards.mean())
        elif sharp:
            made = self.attempts.in_turn(episodes)
        self.attempts.learn(self.processes.gather_all(made))

    @property
    def negative_weight(self) -> float:
        """What advantages below zero count at this step; `negative_half_life` makes it less and less."""
        args = self.args
        first = float(self.replay.graded) if args.negative_weight is None else args.negative_weight
        return first if args.negative_half_life is None else first * 2 ** (-self.step / args.negative_half_life)

    def weights(self, advantages: Tensor, batch: PrefixBatch) -> Tensor:
        """(B, T) what the advantage term makes of each action: nothing of episodes that are not imitated.

        Where only the best are, so is what is clearly better than V expects of its prompt, which may be a hard one.
        """
        imitated = torch.from_numpy(self.replay.imitable(batch.slots.cpu().numpy())).to(advantages.device)
        if self.replay.holds_to_the_best:
            imitated |= advantages[:, 0] >= MARGIN * float(self.replay.rewards.std())
        negative, weights = self.negative_weight, advantages * imitated[:, None]
        return signed_weights(unsure(agreeing(weights), batch.behaviour_logprobs) if negative else weights, negative)

    @property
    def budget_left(self) -> int:
        """Completions that this process may still have scored."""
        budget = self.args.max_scored_completions
        if budget is None:
            return sys.maxsize
        return max(0, budget - self.scored_completions) // self.parts.accelerator.num_processes

    @property
    def prompts_per_collect(self) -> int:
        """Of the next collection, over all processes.

        Few of what is right or wrong, or counted: the sooner one comes, the better the policy that writes it. Grades,
        which push down as well as up, bear no more than half as many steps a call, nor does what collectors elsewhere
        write by a policy that may be old.
        """
        few = self.step > 0 and not self.replay.graded and self.shared is None
        return self.args.prompts_per_collect or (FEW_PROMPTS if few else PROMPTS)

    def share(self, prompts: int) -> int:
        """How many of them fall to this process."""
        return -(-prompts // self.processes.world)

    def choose_source(self) -> Source:
        """Collectors elsewhere, collectors of this run's own, or nobody but the trainer."""
        args, parts, say = self.args, self.parts, self.logbook.say
        self.shared = self.overlap = None
        if args.collectors is not None:
            self.shared = SharedFolder(
                Path(args.collectors),
                Path(args.output_dir),
                self.processes,
                parts.replay.store.vocabulary,
                max_age=args.max_age,
                timeout=args.collector_timeout,
                say=say,
            )
            return self.take_in
        if args.overlap > 0:
            self.overlap = Overlap(Path(args.output_dir), args.overlap, self.processes, parts.network.device, say)
            return self.take_ahead
        return self.write_and_score

    @contextmanager
    def source_open(self) -> Iterator[None]:
        """While the run learns. Afterwards collectors are told to finish, or ended where it did not come to its end."""
        if self.shared is not None:
            self.shared.open()
            self.logbook.say("collectors write: this run does not repeat bit for bit, and imagines no completions")
        if self.overlap is None:
            yield
        else:
            with self.overlap.running(at_once=lambda: self.stop.at_once):
                yield
        if self.shared is not None:
            self.shared.close()

    # --- imagined ---------------------------------------------------------------------------------------------------

    @property
    def dyna(self) -> Dyna | None:
        """Who imagines; None where nobody is to, and where collectors elsewhere write."""
        return None if self.shared is not None else self.parts.dyna

    def imagine(self, scored: Sequence[Episode]) -> int:
        """Adds completions of the same prompts whose rewards are predicted, `dyna.per_scored` for each scored one.

        Returns how many times the steps are to be added for them: of grades as many times, else once. Nothing is added,
        and 0 returned, where rewards cannot be predicted well enough, and where collectors elsewhere write.
        """
        dyna = self.dyna
        if dyna is None:
            return 0
        began = dyna.predicts
        with whole(self.network):
            self.learn_to_predict(dyna)
            if not dyna.predicts:
                return 0
            prompts = [
                Prompt(e.prompt, "", e.prompt_ids.tolist(), e.columns) for e in scored for _ in range(dyna.per_scored)
            ]
            judged, _ = self.imagined(dyna, prompts, self.scored_completions)
        self.replay.add(judged)
        if not began:
            self.say_predictable(dyna, f"{dyna.per_scored} completions are imagined for each scored one")
        return dyna.per_scored if self.replay.graded else 1

    def write_alone(self) -> None:
        """A collection where nothing is scored."""
        self.imagine_alone()
        self.sharpen()

    def imagine_alone(self) -> None:
        """Where nothing is scored: adds a collection whose rewards are predicted, and looks at what they promise."""
        dyna = self.dyna
        if dyna is None:
            return
        began = dyna.predicts
        with whole(self.network):
            self.learn_to_predict(dyna)
            if not dyna.predicts:
                return
            judged, unsure = self.imagined(dyna, self.prompts_alone(), self.step)
        facts = sum(e.reward for e in judged), unsure.sum(), (unsure**2).sum(), len(judged)
        total, deviations, squares, count = map(float, self.parts.totals(*facts))
        if not began and dyna.model.skill_at(squares / count) < self.least_skill:
            dyna.predicts = False  # what the policy writes has little in common with the log
            return
        promise = dyna.promise(total / count, deviations / count)
        if self.parts.early_stopping is not None:
            self.logbook.add(PREDICTED, promise)
            self.parts.early_stopping.seen(self.step, PREDICTED, promise)
        self.replay.add(judged)
        if not began:
            self.say_predictable(dyna, "all completions are imagined, and predictions say when to stop")

    @property
    def least_skill(self) -> float:
        """What predictions must explain."""
        return LEAST_OF_GRADES if self.replay.graded else LEAST

    def prompts_alone(self) -> Sequence[Prompt]:
        """Of a collection where nothing is scored."""
        return self.parts.stream.next_batch(self.share(self.args.prompts_per_collect or PROMPTS))

    def learn_to_predict(self, dyna: Dyna) -> None:
        """From all true rewards that came since the last time, on all processes."""
        known = self.processes.agree(lambda: dyna.unknown(self.replay))
        dyna.learn(self.processes.gather(known), self.least_skill)
        self.logbook.add("replay/predicted_r2", dyna.model.skill)

    def imagined(self, dyna: Dyna, prompts: Sequence[Prompt], key: int) -> tuple[list[Episode], np.ndarray]:
        """What the policy writes to the prompts, with predicted rewards, and how uncertain these are. key: of the seed,
        never the same.
        """
        seed = self.seed_for(IMAGINE, key)
        return self.processes.agree(lambda: dyna.judged(self.write(prompts, sampled(), seed)))

    def say_predictable(self, dyna: Dyna, how: str) -> None:
        """Once, when it begins."""
        self.logbook.say(
            f"rewards can be predicted ({dyna.model.skill:.0%} of their variance): {how} (replay.imagined)"
        )

    @property
    def sharpening(self) -> Sharpening | None:
        """Own completions of a run on a log alone, while they help and rewards cannot be predicted."""
        sharpening, predicts = self.parts.sharpening, self.parts.dyna is not None and self.parts.dyna.predicts
        return None if predicts or sharpening is None or not sharpening.helps else sharpening

    def with_own(self, batch: PrefixBatch, rng: np.random.Generator) -> PrefixBatch:
        """The batch, and own completions beside it where these are learned from."""
        return batch if self.sharpening is None else self.sharpening.with_own(batch, rng)

    def sharpen(self) -> None:
        """Where nothing is scored: writes completions that are learned from as they are."""
        sharpening = self.sharpening
        if sharpening is None:
            return
        prompts = self.prompts_alone()
        if len(sharpening.own) == 0:
            self.logbook.say("own completions, the likeliest ones, are learned from as well (replay.sharpened)")
        policy, seed = BehaviourPolicy(temperature=SHARP), self.seed_for(SHARPEN, self.step)
        with whole(self.network):
            own = self.processes.agree(lambda: self.write(prompts, policy, seed))
        sharpening.add(self.processes.gather_all(own))

    def learned_enough(self) -> bool:
        """In a run that learns from a log alone: whether predicted rewards, or else held-out completions, say so."""
        stopping, held_out, dyna = self.parts.early_stopping, self.parts.held_out, self.parts.dyna
        if stopping is None:
            return False
        last = self.step == self.args.max_steps
        if dyna is not None and dyna.predicts:
            if last and self.step > self.collected_at:
                self.imagine_alone()  # collections look, and after the last one there were steps
                self.collected_at = self.step
        elif held_out is not None and stopping.due(self.step, last):
            with whole(self.network):
                probability, sharper = held_out.look(self.args.per_device_train_batch_size)
            stopping.seen(self.step, HELD_OUT, probability)
            self.logbook.add(HELD_OUT, probability)
            self.logbook.add(SHARPER, sharper)
            if self.parts.sharpening is not None:
                self.parts.sharpening.helps = sharper > probability
        return stopping.over(self.step)

    # --- from collectors elsewhere ----------------------------------------------------------------------------------

    def take_in(self) -> tuple[int, list[Episode], bool]:
        """What collectors had scored, as far as it is young enough to learn from; they never act sharply."""
        assert self.shared is not None
        self.publish()
        args, world = self.args, self.processes.world
        wanted = min(self.prompts_per_collect * args.num_generations, self.budget_left * world)
        taken = self.shared.take(self.step, wanted, lambda: self.stop.requested is not None)
        if len(self.replay) == 0 and self.stop.requested:
            raise Stopped(self.stop.exit_code)
        for age in taken.ages:
            self.logbook.add("replay/staleness", float(age))
        return taken.scored, taken.episodes, False

    def publish(self) -> None:
        """Shows the policy to collectors, where there are any."""
        if self.shared is not None:
            self.shared.publish(self.step, self.epsilon, gathered(self.network.checkpoint_state()))

    # --- from collectors of this run's own --------------------------------------------------------------------------

    def take_ahead(self) -> tuple[int, list[Episode], bool]:
        """What was asked for `rollout.overlap` collections ago. What nobody was asked for is written here.

        That is the first collection, while the collectors start.
        """
        assert self.overlap is not None
        if self.overlap.orders:
            self.order(taking=1)
            order, episodes = self.overlap.take()
            written, sharp = order.completions, order.temperature != 1  # of no matter where one is given
        else:
            written, episodes, sharp = self.write_and_score()
            self.order(written=written)
        for episode in episodes:
            self.logbook.add("replay/staleness", float(self.step - episode.policy_version))
        return written, episodes, sharp

    def order(self, taking: int = 0, written: int = 0) -> None:
        """Asks for the segments of the next collections, never more than will be taken or the budget allows.

        taking: segments among those asked for that this collection takes. written: completions not yet counted.
        """
        assert self.overlap is not None
        args, stream = self.args, self.parts.stream
        to_come = (args.max_steps - 1 - self.step) // args.updates_per_collect
        while len(self.overlap.orders) < taking + min(args.overlap, to_come):
            ahead = self.overlap.ordered + written
            left, position = self.budget_left - ahead, stream.state_dict()
            draw = self.share(self.prompts_per_collect)
            completions = min(draw * args.num_generations, left)
            if completions <= 0:
                break
            failed = self.attempts.failed_of(stream.next_batch(draw))
            everyone = self.processes.gather((self.temperature, failed))
            acting = everyone[0][0], sorted({prompt for _, some in everyone for prompt in some})
            scored = self.scored_completions + ahead * self.processes.world
            order = Order(self.overlap.next, self.step, self.epsilon, position, draw, completions, scored, *acting)
            self.overlap.place(order, gathered(self.network.checkpoint_state()))
