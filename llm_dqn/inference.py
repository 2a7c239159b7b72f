"""Using what was trained: opens a run, an adapter or a plain model, and lets it write or be measured."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm_dqn import data, evaluation, models
from llm_dqn.assembly import FROM_PYTHON, price, rewards_of, settings_of, stream_seed
from llm_dqn.errors import UserError, did_you_mean
from llm_dqn.evaluation import Pair
from llm_dqn.heads import HeadSettings, saved_heads
from llm_dqn.network import QNetwork
from llm_dqn.opening import locate
from llm_dqn.policy import BehaviourPolicy
from llm_dqn.prompt_sources import prompts_of, prompts_of_test_split
from llm_dqn.recipe import Recipe, resolve_path
from llm_dqn.rewards import Rewards, load_reward
from llm_dqn.rollout import Writer, rollout
from llm_dqn.strength import ScaledAdvantage
from llm_dqn.trainer import EVALUATE
from llm_dqn.types import Prompt

SPLITS = ("validation", "test", "train")
GIVE = "give --prompts FILE and --rewards file.py:function (or the folder of a reward model)"


@dataclass(frozen=True)
class OpenRun:
    """A policy ready to write; `recipe` is there when a run folder was opened."""

    name: str
    writer: Writer
    recipe: Recipe | None
    knows_values: bool = False  # False: no heads were saved, so V is 0 and Q the advantage

    @property
    def knows_its_task(self) -> bool:
        """Whether prompts and rewards can be loaded again: objects that were given from Python cannot."""
        return self.recipe is not None and self.recipe.data.train != FROM_PYTHON


def open_run(run: str, max_completion_length: int | None = None, batch_size: int = 64) -> OpenRun:
    """Opens a run folder, an adapter folder, a Hub adapter, or a plain model (then tuned and base are the same).

    Raises UserError when there is nothing to open.
    """
    named = locate(run)
    recipe, tuned = named.recipe, named.tuned
    model, tokenizer = named.load_base(), named.load_tokenizer()
    if named.adapter_config.get("modules_to_save"):
        models.untie_head(model)  # the adapter brings an output layer of its own
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, num_tokens, heads = model.to(device), models.num_valid_tokens(model, tokenizer), named.heads()
    # Without heads and recipe nothing says what a nat is worth: beta 1 leaves advantages in nats.
    if heads is not None:
        head = saved_heads(heads, num_tokens)
    else:
        head = HeadSettings(beta=price(settings_of(recipe)) if recipe else 1.0)
    whole = models.load_causal_lm(tuned).to(device) if tuned else model
    network = QNetwork(
        model,
        num_tokens,
        head,
        lora=named.adapter,
        target="head",
        tuned=None if named.adapter else whole,
        bf16=recipe.train.bf16 if recipe else False,
    )
    if heads is not None:
        network.load_heads(heads.parent)
    length = max_completion_length or (recipe.rollout.max_completion_length if recipe else 64)
    stop_ids = frozenset(models.stop_token_ids(model, tokenizer))
    return OpenRun(named.name, Writer(network, tokenizer, stop_ids, length, batch_size), recipe, heads is not None)


def generate_file(
    run: str,
    prompts: str,
    output: str,
    *,
    greedy: bool = False,
    beta_scale: float | None = None,
    max_completion_length: int | None = None,
    seed: int = 0,
) -> int:
    """Writes one completion a prompt of a file as JSON lines `prompt, completion`; returns how many.

    beta_scale: strength of what was learned, at inference: log pi_ref + beta_scale (log pi - log pi_ref). 0 is the base
    model, 1 the tuned one, more goes further, below 0 it turns away from the reward.
    """
    _check_output(output)
    _check_finite("--beta-scale", () if beta_scale is None else (beta_scale,))
    opened = open_run(run, max_completion_length)
    rows = _prompts_in(opened, prompts)
    policy = BehaviourPolicy(temperature=0.0 if greedy else 1.0)
    extra = None if beta_scale is None else partial(ScaledAdvantage, opened.writer.network, beta_scale)
    episodes = rollout(opened.writer, rows, policy, seed, extra=extra)
    with Path(output).open("w", encoding="utf-8") as stream:
        for episode in episodes:
            line = {"prompt": episode.prompt, "completion": episode.completion}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    return len(episodes)


def evaluate_run(
    run: str,
    *,
    prompts: str | None = None,
    output: str | None = None,
    reward_specs: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    max_prompts: int | None = None,
    split: str | None = None,
    beta_scales: Sequence[float] = (),
) -> tuple[dict[str, Any], list[Pair]]:
    """Base against tuned on held-out prompts: the contents of `evaluation.json`, and pairs of samples (base, tuned).

    What is not given is taken from the run folder; with nothing given, its `evaluation.json` comes out again.
    seeds: one sampled completion a prompt for each. split: validation, test or train prompts of the run; with `prompts`
    the split of that data set. beta_scales: strengths at which the tuned policy is measured as well; measured on what
    the run itself was measured on, the curve goes into its `evaluation.json`.
    """
    if output is not None:
        _check_output(output)
    _check_finite("--beta-scales", beta_scales)
    if seeds is not None and (not seeds or len(set(seeds)) < len(seeds)):
        raise UserError(f"--seeds {','.join(map(str, seeds))}: expected different whole numbers")
    opened = open_run(run)
    rows = _held_out_prompts(opened, prompts, split, max_prompts)
    rewards = _rewards(opened, reward_specs)
    try:
        rewards.check_columns(sorted(rows[0].columns))
        judge = partial(evaluation.judged_in_place, rewards)
        drawn = [_seed_of(opened)] if seeds is None else seeds
        name = split or ("validation" if prompts is None else "train")
        report, pairs = evaluation.base_and_tuned(opened.writer, rows, judge, drawn, split=name, scales=beta_scales)
    finally:
        rewards.close()
    elsewhere = {"prompts_from": prompts, "rewards_from": list(reward_specs)}
    report |= {name: value for name, value in elsewhere.items() if value}
    if output is not None:
        _write_json(Path(output), report)
    return report, pairs


def keep_strength(run: str, report: dict[str, Any]) -> Path | None:
    """Puts a report's `strength` into the run's `evaluation.json`, whose other keys stay, and returns that file.

    None where it does not belong there: measured on other prompts or by other rewards than the run, or there is none.
    """
    file = Path(resolve_path(run)) / "evaluation.json"
    elsewhere = "prompts_from" in report or "rewards_from" in report or report["split"] != "validation"
    if elsewhere or "strength" not in report or not file.is_file():
        return None
    _write_json(file, json.loads(file.read_text(encoding="utf-8")) | {"strength": report["strength"]})
    return file


def _write_json(file: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def _check_finite(option: str, scales: Sequence[float]) -> None:
    for scale in scales:
        if not math.isfinite(scale):
            raise UserError(f"{option} {scale}: expected a finite number, such as 0.5 (0 = base model, 1 = tuned)")


def _check_output(path: str) -> None:
    """`UserError`, before any work, for a file that could not be written after it."""
    if Path(path).is_dir():
        raise UserError(f"--output {path}: is a folder; name a file")
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"--output {path}: the folder {Path(path).parent} does not exist")


def _prompts_in(opened: OpenRun, file: str, split: str = "train") -> list[Prompt]:
    column = opened.recipe.data.prompt_column if opened.recipe else "prompt"
    writer = opened.writer
    room = data.room_for_prompt(models.context_length(writer.network.model.config), writer.max_completion_length)
    return data.load_prompts(
        resolve_path(file), split=split, prompt_column=column, tokenizer=writer.tokenizer, room=room
    )


def _held_out_prompts(opened: OpenRun, file: str | None, split: str | None, limit: int | None) -> list[Prompt]:
    """The prompts of a file, all of them, or those of the run, as many as it evaluates on; at most `limit` if given."""
    if file is not None:
        return _prompts_in(opened, file, split or "train")[:limit]
    if opened.recipe is None:
        raise UserError(f"{opened.name} is no run folder, so it names no held-out prompts; give --prompts FILE")
    if not opened.knows_its_task:
        raise UserError(f"{opened.name} was trained from Python on data that cannot be found again; {GIVE}")
    split = split or "validation"
    if split not in SPLITS:
        known = ", ".join(SPLITS)
        raise UserError(f"--split {split}: a run has the splits {known}{did_you_mean(split, SPLITS)}")
    if split == "test":
        prompts = prompts_of_test_split(opened.recipe, opened.writer.tokenizer)
    else:
        prompts = prompts_of(opened.recipe, opened.writer.tokenizer)[split == "validation"]
    return prompts[: limit or opened.recipe.train.final_eval_prompts]


def _rewards(opened: OpenRun, specs: Sequence[str]) -> Rewards:
    if specs:
        return Rewards([load_reward(resolve_path(spec), [Path.cwd()]) for spec in specs])
    if opened.recipe is None:
        raise UserError(f"{opened.name} is no run folder, so it names no reward; give --rewards")
    if not opened.knows_its_task:
        raise UserError(f"{opened.name} was trained from Python with rewards that cannot be found again; {GIVE}")
    return rewards_of(opened.recipe)


def _seed_of(opened: OpenRun) -> int:
    """The seed that the run itself evaluated with."""
    return stream_seed(opened.recipe.train.seed, EVALUATE, 0) if opened.recipe else 0
