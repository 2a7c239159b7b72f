"""What the first rewards tell a trainer: where values start, in which unit it learns, what kind they are."""

from llm_dqn.recipe import DQNConfig
from llm_dqn.reward_kinds import FEW_NATS, RewardKinds
from llm_dqn.reward_scale import reward_scale
from llm_dqn.trainer_state import Checkpointed

LOOKED_AT = 64  # completions of a process


class RewardsSeen(Checkpointed):
    """The part of a trainer that looks at rewards as they come in."""

    args: DQNConfig

    def measure_rewards(self) -> None:
        """Learns in a unit of what rewards differ by, from the first collection on in which they do."""
        if self.rewards_measured:
            return
        everyone = self.processes.gather_all(self.replay.rewards.tolist())
        scale = self.args.reward_scale or reward_scale(everyone)
        if scale is not None:
            self.network.measure_in(scale)
            self.rewards_measured = True
        if scale not in (None, 1.0):
            self.logbook.say(f"rewards are learned from in units of {scale:g} (dqn.reward_scale)")

    def see_rewards(self) -> None:
        """What passed for grades while nothing was right may turn out to be right and wrong."""
        if self.step == 0:
            self.see_first_rewards()
        elif self.replay.graded and self.parts.totals(not self.replay.kinds.right_or_wrong) == 0:
            self.replay.graded = False
            self.logbook.say("rewards are right or wrong, and no grades: what is right is imitated")

    def see_first_rewards(self) -> None:
        """Values start at the mean reward of the first collection, which also tells what kind of rewards these are."""
        total, count = self.parts.totals(self.replay.rewards.sum(), len(self.replay))
        self.network.start_values_at(float(total / count))
        known, kinds = self.replay.graded, RewardKinds.of(self.processes.gather_all(self.replay.rewards.tolist()))
        few_ways = kinds.grades and self.nats_of_a_completion() < FEW_NATS
        self.replay.graded = kinds.grades and not few_ways
        self.replay.best_alone = (kinds.best_alone or few_ways) and self.replay.least_logged is None
        if self.replay.graded and not known and self.args.negative_weight is None:
            self.logbook.say("rewards are grades: low ones are learned from as well (dqn.negative_weight)")
        if self.replay.best_alone:
            what = "grades of short answers" if few_ways else "counted"
            self.logbook.say(f"rewards are {what}: only the best completions are imitated (replay.imitated_share)")

    def nats_of_a_completion(self) -> float:
        """Mean -log pi of the newest completions by the policy that wrote them, over all processes."""
        nats = self.replay.nats(LOOKED_AT)
        total, count = self.parts.totals(float(nats.sum()), len(nats))
        return float(total / count)
