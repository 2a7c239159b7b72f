"""What a run's replay buffer holds, read from a checkpoint without loading a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from llm_dqn import checkpoint, models
from llm_dqn.episode_store import EpisodeStore
from llm_dqn.errors import RunError, UserError, did_you_mean
from llm_dqn.recipe import load_recipe, with_resolved_paths
from llm_dqn.replay import ENDED, SOURCES

SORTS = ("reward", "age", "td-error", "slot")
NEVER_MEASURED = "TD errors were never measured, as this run does not sample by them (replay.prioritized is false)"


class Tokens(NamedTuple):
    """Token ids (P,) and (T,) of an episode, and log-probabilities (T,) of those that were written."""

    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    ref_logprobs: np.ndarray
    behaviour_logprobs: np.ndarray


@dataclass(frozen=True)
class Remembered:
    """The episodes of a checkpoint, of all processes one after the other, in the order of their slots.

    facts: (n,) arrays reward, version, age (learner steps since written), ended, source, process, slot, and td_error
    (mean |TD error| when last sampled; for an episode that was not sampled yet the largest one known when it came).
    prioritized: whether TD errors were measured at all.
    """

    folder: Path
    step: int
    capacity: int  # of each process
    added: int  # episodes ever put in, by all processes
    prioritized: bool
    facts: dict[str, np.ndarray]
    stores: list[EpisodeStore]  # one a process
    skipped: list[str]  # a line for each newer checkpoint that is damaged

    def __len__(self) -> int:
        return len(self.facts["reward"])

    def tokens(self, place: int) -> "Tokens":
        """What was read and written in one episode, read from the disk when it is asked for."""
        store, slot = self.stores[self.facts["process"][place]], self.facts["slot"][place]
        flat, split = store.flat(np.array([slot])), int(store.column("prompt_lengths")[slot])
        return Tokens(flat["tokens"][:split], flat["tokens"][split:], flat["ref_logprobs"], flat["behaviour_logprobs"])


def open_replay(run: str | Path, step: str | None = None) -> Remembered:
    """The replay of a run's newest complete checkpoint, or of the one named `step` ("step-000100").

    Raises UserError where there is no such run or checkpoint, RunError where what is there is damaged.
    """
    recipe = load_recipe(_recipe_file(run))
    root = Path(run) / "checkpoints"
    there = sorted(folder.name for folder in root.glob("step-*") if folder.is_dir() and folder.suffix != ".tmp")
    if not there:
        raise UserError(f"{run} has no checkpoint yet; one is written every train.save_steps steps and at the end")
    skipped: list[str] = []
    if step is None:
        folder, skipped = checkpoint.newest(root)
        if folder is None:
            raise RunError(f"no checkpoint in {root} is whole: {'; '.join(skipped)}")
    elif step not in there:
        raise UserError(f"--checkpoint {step}: {root} has {', '.join(there)}{did_you_mean(step, there)}")
    else:
        folder = root / step
    stores = checkpoint.read_stores(folder)
    learner_step = int(folder.name.removeprefix("step-"))
    return Remembered(
        folder=folder,
        step=learner_step,
        capacity=recipe.replay.capacity,
        added=sum(store.added for store in stores),
        prioritized=recipe.replay.prioritized,
        facts=_facts(stores, learner_step),
        stores=stores,
        skipped=skipped,
    )


def tokenizer_of(run: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside what was tuned, or the base model's while the run has not finished."""
    facts = with_resolved_paths(load_recipe(_recipe_file(run))).model
    for home in (Path(run) / "adapter", Path(run) / "model"):
        if (home / "tokenizer_config.json").is_file():
            return models.load_tokenizer(str(home), trust_remote_code=facts.trust_remote_code)
    return models.load_tokenizer(facts.model_name_or_path, facts.model_revision, facts.trust_remote_code)


def _recipe_file(run: str | Path) -> Path:
    folder = Path(run)
    if not folder.is_dir():
        raise UserError(f"{run} is no folder; name the folder of a run (train.output_dir)")
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{run} is no run folder: it holds no recipe.yaml")
    return folder / "recipe.yaml"


def _facts(stores: Sequence[EpisodeStore], step: int) -> dict[str, np.ndarray]:
    def joined(name: str) -> np.ndarray:
        return np.concatenate([store.column(name) for store in stores])

    sizes = [len(store) for store in stores]
    return {
        "reward": joined("rewards"),
        "version": joined("versions"),
        "age": step - joined("versions"),
        "ended": np.array(ENDED)[joined("ended")],
        "source": np.array(SOURCES)[joined("source")],
        "td_error": joined("priorities"),
        "process": np.repeat(np.arange(len(stores)), sizes),
        "slot": np.concatenate([np.arange(size) for size in sizes]),
    }


@dataclass(frozen=True)
class Choice:
    """Which episodes, in which order. Reward, age and TD error begin with the highest, or with the `lowest`."""

    sort: str = "reward"
    lowest: bool = False
    source: str | None = None
    min_reward: float | None = None
    max_reward: float | None = None
    limit: int | None = None


def chosen(remembered: Remembered, choice: Choice) -> np.ndarray:
    """Places of the chosen episodes, in order. Raises UserError for what cannot be sorted or filtered by."""
    if choice.sort not in SORTS:
        raise UserError(f"--sort {choice.sort}: expected {', '.join(SORTS)}{did_you_mean(choice.sort, SORTS)}")
    if choice.source is not None and choice.source not in SOURCES:
        raise UserError(
            f"--source {choice.source}: expected {', '.join(SOURCES)}{did_you_mean(choice.source, SOURCES)}"
        )
    if choice.sort == "td-error" and not remembered.prioritized:
        raise UserError(f"--sort td-error: {NEVER_MEASURED}; sort by reward, age or slot")
    facts = remembered.facts
    keeps = np.ones(len(remembered), dtype=bool)
    if choice.source is not None:
        keeps &= facts["source"] == choice.source
    if choice.min_reward is not None:
        keeps &= facts["reward"] >= choice.min_reward
    if choice.max_reward is not None:
        keeps &= facts["reward"] <= choice.max_reward
    places = np.flatnonzero(keeps)
    if choice.sort == "slot":
        places = places[::-1] if choice.lowest else places
    else:
        values = facts[choice.sort.replace("-", "_")][places]
        places = places[np.argsort(values if choice.lowest else -values, kind="stable")]
    return places[: choice.limit]
