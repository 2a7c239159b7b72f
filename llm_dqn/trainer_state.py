"""What of a trainer a checkpoint keeps: counters as JSON and tensors, and how they come back."""

from typing import Any

from torch import Tensor

from llm_dqn import checkpoint, recipe_changes, sharding
from llm_dqn.assembly import Parts
from llm_dqn.attempts import Attempts
from llm_dqn.errors import UserError
from llm_dqn.logbook import Logbook
from llm_dqn.network import QNetwork
from llm_dqn.numerics import NonFiniteSteps
from llm_dqn.overlap import Overlap
from llm_dqn.processes import Processes
from llm_dqn.replay import PrefixReplay
from llm_dqn.resume import DEALT, restore_schedule
from llm_dqn.shared_folder import SharedFolder


class Checkpointed:
    """The part of a trainer that saves and restores it. All randomness is keyed by the counters here."""

    parts: Parts
    network: QNetwork
    replay: PrefixReplay
    attempts: Attempts
    logbook: Logbook
    processes: Processes
    nonfinite: NonFiniteSteps
    shared: SharedFolder | None
    overlap: Overlap | None
    step: int
    collected_at: int  # the step before which was collected last
    collect_at: int  # the step before which is collected next
    look_at: int  # the step after which is looked next whether the policy left its trust region
    rewards_measured: bool  # whether it is known in which unit rewards are learned from
    samples_drawn: int  # minibatches, by this process
    scored_completions: int  # by the rewards, over all processes; evaluation is counted apart

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe's settings by dotted key, as a checkpoint keeps them."""
        return recipe_changes.settings(self.logbook.recipe_text)

    def save_checkpoint(self, beside: bool = False) -> None:
        """Writes all that makes the run continue exactly, unless it is saved; `beside`: while training goes on."""
        self.logbook.checkpoint(self.step, self.state(), self.tensors(), beside)

    def state(self) -> dict[str, Any]:
        """Counters of a checkpoint, as plain JSON. They key all random streams, which need no state of their own."""
        return {
            "step": self.step,
            "collected_at": self.collected_at,
            "collect_at": self.collect_at,
            "look_at": self.look_at,
            "nonfinite_steps": self.nonfinite.total,
            "graded": self.replay.graded,
            "best_alone": self.replay.best_alone,
            "reward_scale": self.network.reward_scale,
            "rewards_measured": self.rewards_measured,
            "failed": sorted(self.attempts.failed),
            "recipe": self.settings,
            "scored_completions": self.scored_completions,
            "samples_drawn": self.samples_drawn,
            "prompts": self.parts.stream.state_dict(),
            "scheduler": self.parts.scheduler.state_dict(),
            "logbook": self.logbook.state(),
            "shared": None if self.shared is None else self.shared.state(),
            "overlap": None if self.overlap is None else self.overlap.state(),
            "dyna": None if self.parts.dyna is None else self.parts.dyna.state(),
            "own_completions_help": self.parts.sharpening is not None and self.parts.sharpening.helps,
            "early_stopping": None if self.parts.early_stopping is None else self.parts.early_stopping.state(),
        }

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a checkpoint, part by part."""
        rank, stopping = self.parts.accelerator.process_index, self.parts.early_stopping
        own = None if self.parts.sharpening is None else self.parts.sharpening.own
        return {
            "network": sharding.gathered(self.network.checkpoint_state()),
            "optimizer": sharding.gathered(checkpoint.optimizer_tensors(self.parts.optimizer)),
            f"replay-{rank:05d}": checkpoint.as_tensors(self.replay.snapshot()),
            **({} if self.overlap is None else self.overlap.tensors()),
            **({} if self.parts.dyna is None else self.parts.dyna.tensors()),
            **({"own": checkpoint.as_tensors(own.state_arrays())} if own else {}),
            **({} if stopping is None or not stopping.best else {"best": stopping.best}),
        }

    def load_state(self, state: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
        """The reverse of `state` and `tensors`."""
        if (scale := state.get("reward_scale", 1.0)) != self.network.reward_scale:
            self.network.measure_in(scale)
        self.rewards_measured = state.get("rewards_measured", True)
        try:
            if self.parts.sharded:
                sharding.restore(self.network.checkpoint_state(), tensors["network"])
            else:
                self.network.load_checkpoint_state(tensors["network"])
            checkpoint.load_optimizer(self.parts.optimizer, tensors["optimizer"], sharding.share_of)
        except (RuntimeError, KeyError, ValueError) as error:
            raise UserError(
                f"the checkpoint does not fit the model, adapter or Q-head of this recipe: {error}"
            ) from error
        then = checkpoint.restore_replay(self.replay, tensors, self.processes.rank, self.processes.world)
        if then != self.processes.world:
            self.logbook.say(DEALT.format(then=then, now=self.processes.world))
        self.step, self.collected_at = state["step"], state["collected_at"]
        self.collect_at, self.look_at = state["collect_at"], state["look_at"]
        self.scored_completions, self.samples_drawn = state["scored_completions"], state["samples_drawn"]
        self.nonfinite.total, self.replay.graded = state["nonfinite_steps"], state["graded"]
        self.replay.best_alone = state.get("best_alone", False)
        self.attempts.failed = set(state.get("failed", ()))
        if self.shared is not None and state.get("shared"):
            self.shared.load_state(state["shared"])
        if self.overlap is not None and state.get("overlap"):
            self.overlap.load_state(state["overlap"], tensors)
        if self.parts.dyna is not None and state.get("dyna"):
            self.parts.dyna.load_state(state["dyna"], tensors, self.replay)
        if self.parts.sharpening is not None:
            self.parts.sharpening.helps = state.get("own_completions_help", False)
            if "own" in tensors:
                self.parts.sharpening.own.load_arrays(checkpoint.as_arrays(tensors["own"]))
        if self.parts.early_stopping is not None and state.get("early_stopping"):
            self.parts.early_stopping.load_state(state["early_stopping"], tensors.get("best", {}))
        self.parts.stream.load_state_dict(state["prompts"])
        restore_schedule(self.parts.scheduler, state["scheduler"])
        self.logbook.load_state(state["logbook"], self.step)
