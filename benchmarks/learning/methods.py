"""Who takes part in which regime, and the twelve configurations each is tuned over.

Learning rates are for all weights; a LoRA adapter gets ten times as much, by policy gradients, which collapse at that
(`benchmarks/LOG.md`), three times. The grids span a factor of ten, so that the ratio need not be exact.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from benchmarks.learning.tasks import Task

LORA_FACTOR = {"dqn": 10, "sft": 10, "grpo": 3, "rloo": 3, "reinforce": 3}  # by kind
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """label: as tables name it. kind: which module trains it. grid: the configurations it is tuned over; one without
    a grid of several is measured as it is. then: what is tried beside the best of the grid, each on top of it.
    of_counts: the same on top of the best of these, where rewards are counted.
    predicts: it lives from predicted rewards and has nothing to do where they cannot be.
    """

    label: str
    kind: str
    grid: tuple[Settings, ...]
    then: tuple[Settings, ...] = ()
    of_counts: tuple[Settings, ...] = ()
    predicts: bool = False


def _grid(fixed: Settings | None = None, **choices: list[Any]) -> tuple[Settings, ...]:
    """Every combination; a choice that is a dict sets several keys at once."""
    combined = []
    for picks in product(*choices.values()):
        settings = dict(fixed or {})
        for name, pick in zip(choices, picks, strict=True):
            settings |= pick if isinstance(pick, dict) else {name: pick}
        combined.append(settings)
    return tuple(combined)


def _also(grid: tuple[Settings, ...], more: Settings) -> tuple[Settings, ...]:
    return tuple({**settings, **more} for settings in grid)


# llm_dqn acts at 0.3 where answers are right or wrong, so those who need no groups may write as sharply; in a group
# written at 0.6 GRPO finds less to compare (`benchmarks/LOG.md`). It collects 32 at a time there, so they may as well;
# 32 and 16 are in the grids of GRPO and RLOO.
SHARPER: tuple[Settings, ...] = ({"temperature": 0.3}, {"temperature": 0.6})
# Of rewards that are counted it imitates the best quarter.
BETTER: tuple[Settings, ...] = ({"above": 0.75}, {"above": 0.9})
FURTHER = (*SHARPER, *({"completions": 32, **more} for more in ({}, *SHARPER)))

TEXTBOOK = {
    "q_head": "linear",
    "prior": "uniform",
    "backup": "max",
    "n_step": 1,
    "target": "head",
    "advantage_weight": 0.0,
    "success_share": 0.0,
    "target_kl": None,
    "prompts_per_collect": 64,
    "updates_per_collect": 16,
    "target_sync_steps": 32,
    "explore": "uniform",
    "temperature": 0.0,
    "imagined": 0,
}
# Kostrikov et al. 2022 and Snell et al. 2022 by the recipe's switches: expectile V, one-step Q, conservative term, the
# prior's log-probabilities plus Q over a temperature. The Q-head is linear on the tuned trunk, one of it, not two.
ILQL = {
    "q_head": "linear",
    "n_step": 1,
    "gamma": 0.99,
    "target_tau": 0.005,
    "target_sync_steps": 1,
    "advantage_weight": 0.0,
    "success_share": 0.0,
    "imagined": 0,
    "sharpened": 0,
}

ONLINE = {
    "ours": Method("llm_dqn, defaults", "dqn", ({},)),
    "ours_tuned": Method(
        "llm_dqn, tuned",
        "dqn",
        _grid(
            learning_rate=[2e-5, 5e-5, 1e-4],
            reuse=[
                {"updates_per_collect": 16, "target_sync_steps": 32},
                {"updates_per_collect": 32, "target_sync_steps": 64},
            ],
            advantage_weight=[1.0, 10.0],
        ),
    ),
    "grpo": Method(
        "TRL GRPO",
        "grpo",
        _grid(
            learning_rate=[1e-5, 3e-5, 1e-4, 3e-4],
            iterations=[4, 12],
            size=[{"completions": 64, "num_generations": 8}, {"completions": 32, "num_generations": 4}],
        ),
    ),
    "rloo": Method(
        "TRL RLOO",
        "rloo",
        _grid(
            learning_rate=[1e-5, 3e-5, 1e-4],
            iterations=[4, 12],
            size=[{"completions": 32, "num_generations": 4}, {"completions": 16, "num_generations": 4}],
        ),
    ),
    "best_of_n": Method(
        "best-of-n SFT",
        "sft",
        _grid(
            {"completions": 64, "remember": 1, "batch": 16},
            learning_rate=[3e-5, 1e-4, 3e-4],
            of_each=[4, 8],
            updates=[4, 16],
        ),
    ),
    "filtered": Method(
        "filtered SFT",
        "sft",
        _grid(
            {"completions": 64, "of_each": 1, "batch": 16},
            learning_rate=[3e-5, 1e-4, 3e-4, 1e-3],
            updates=[4, 16],
            remember=[4, 64],
        ),
        FURTHER,
        of_counts=BETTER,
    ),
    "reinforce": Method(
        "REINFORCE, running mean, no groups",
        "reinforce",
        _grid({"completions": 64}, learning_rate=[1e-5, 3e-5, 1e-4, 3e-4], iterations=[1, 4, 12]),
        FURTHER,
    ),
    "textbook": Method(
        "textbook DQN",
        "dqn",
        _grid(
            TEXTBOOK,
            learning_rate=[1e-6, 1e-5, 1e-4],
            value_learning_rate=[1e-4, 1e-3],
            epsilon=[{"epsilon": {"start": 1.0, "end": 0.05, "steps": steps}} for steps in (32, 256)],
        ),
    ),
}

LOGGED = {
    "ours": Method("llm_dqn, defaults", "dqn", ({},)),
    "ours_log_alone": Method("llm_dqn, nothing imagined", "dqn", ({"imagined": 0},), predicts=True),
    "ours_tuned": Method(
        "llm_dqn, tuned",
        "dqn",
        _grid(learning_rate=[2e-5, 5e-5, 1e-4], advantage_weight=[1.0, 10.0], success_share=[0.7, 1.0]),
    ),
    "filtered": Method(
        "filtered SFT",
        "sft",
        _grid({"batch": 16}, learning_rate=[3e-5, 1e-4, 3e-4, 1e-3], above=[None, 0.75, 0.9]),
    ),
    "filtered_stopped": Method(
        "filtered SFT, early stopping",
        "sft",
        _grid({"batch": 16, "held_out": 0.1}, learning_rate=[3e-5, 1e-4, 3e-4, 1e-3], above=[None, 0.75, 0.9]),
    ),
    "grpo_predicted": Method("TRL GRPO, the same predicted rewards", "grpo", ONLINE["grpo"].grid, predicts=True),
    "ilql": Method(
        "ILQL",
        "dqn",
        _grid(ILQL, expectile=[0.7, 0.9], cql_weight=[0.01, 0.1], beta=[0.03, 0.1, 0.3]),
    ),
}
AFTER_LOGGED = {"logged_updates": 100}  # on the logged completions alone, before the first new one is written
LOGGED_ONLINE = {
    "ours": Method("llm_dqn, defaults", "dqn", (AFTER_LOGGED,)),
    "grpo": Method("filtered SFT on the log, then TRL GRPO", "grpo", _also(ONLINE["grpo"].grid, AFTER_LOGGED)),
    "filtered": Method("filtered SFT", "sft", _also(ONLINE["filtered"].grid, AFTER_LOGGED), of_counts=BETTER),
}
# What the defaults come to where collectors write apart from the learner (`rollout.collectors`).
APART = {"temperature": 1.0, "prompts_per_collect": 64, "imagined": 0}
STALE = {
    **{name: replace(ONLINE[name], grid=_also(ONLINE[name].grid, APART)) for name in ("ours", "ours_tuned")},
    "grpo": ONLINE["grpo"],
    "filtered": replace(ONLINE["filtered"], then=SHARPER),  # an old writer writes no better for writing less
}


@dataclass(frozen=True)
class Regime:
    """Where completions come from.

    methods: who takes part. online: new ones are written and scored, what is spent counts in them (else in updates).
    logged: so many scored completions of the base model are given. stale: the policy that writes is refreshed every so
    many completions; 0: before each collection.
    """

    methods: Mapping[str, Method]
    online: bool = True
    logged: int = 0
    stale: int = 0


REGIMES = {
    "online": Regime(ONLINE),
    "logged": Regime(LOGGED, online=False, logged=2000),
    "logged_500": Regime({name: LOGGED[name] for name in ("ours", "filtered")}, online=False, logged=500),
    "logged_online": Regime(LOGGED_ONLINE, logged=2000),
    "stale_8": Regime(STALE, stale=8 * 64),
    "stale_32": Regime(STALE, stale=32 * 64),
}


def for_task(settings: Settings, task: Task, kind: str) -> dict[str, Any]:
    """The configuration with its learning rate for what the task tunes; without one the method's own rule holds."""
    adapted = dict(settings)
    if task.tuned == "lora" and "learning_rate" in adapted:
        adapted["learning_rate"] *= LORA_FACTOR[kind]
    return adapted
