"""Using what was trained: opens a run, an adapter or a plain model, and lets it write or be measured."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from llm_dqn import data, evaluation, models
from llm_dqn.assembly import FROM_PYTHON, prompts_of, rewards_of, stream_seed
from llm_dqn.errors import UserError
from llm_dqn.network import QNetwork
from llm_dqn.opening import locate
from llm_dqn.policy import BehaviourPolicy
from llm_dqn.recipe import Recipe, resolve_path
from llm_dqn.rewards import Rewards, load_reward
from llm_dqn.rollout import Writer, rollout
from llm_dqn.trainer import EVALUATE
from llm_dqn.types import Episode, Prompt

GIVE = "give --prompts FILE and --rewards file.py:function (or the folder of a reward model)"


@dataclass(frozen=True)
class OpenRun:
    """A policy ready to write; `recipe` is there when a run folder was opened."""

    name: str
    writer: Writer
    recipe: Recipe | None

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
    network = QNetwork(
        model.to(device),
        models.num_valid_tokens(model, tokenizer),
        lora=named.adapter,
        target="head",
        tuned=models.load_causal_lm(tuned).to(device) if tuned else None,
        bf16=recipe.train.bf16 if recipe else False,
    )
    length = max_completion_length or (recipe.rollout.max_completion_length if recipe else 64)
    stop_ids = frozenset(models.stop_token_ids(model, tokenizer))
    return OpenRun(named.name, Writer(network, tokenizer, stop_ids, length, batch_size), recipe)


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
    model, 1 the tuned one, more goes further.
    """
    _check_output(output)
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
    seed: int | None = None,
    max_prompts: int | None = None,
) -> tuple[dict[str, Any], list[tuple[Episode, Episode]]]:
    """Base against tuned on held-out prompts: the contents of `evaluation.json`, and pairs of samples (base, tuned).

    What is not given is taken from the run folder; with nothing given, its `evaluation.json` comes out again.
    """
    if output is not None:
        _check_output(output)
    opened = open_run(run)
    rows = _held_out_prompts(opened, prompts)[:max_prompts]
    rewards = _rewards(opened, reward_specs)
    try:
        rewards.check_columns(sorted(rows[0].columns))
        score = partial(evaluation.judged, rewards)
        drawn = _seed_of(opened) if seed is None else seed
        report, pairs = evaluation.base_and_tuned(opened.writer, rows, score, drawn)
    finally:
        rewards.close()
    if output is not None:
        Path(output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report, pairs


def _check_output(path: str) -> None:
    """`UserError`, before any work, for a file that could not be written after it."""
    if Path(path).is_dir():
        raise UserError(f"--output {path}: is a folder; name a file")
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"--output {path}: the folder {Path(path).parent} does not exist")


def _prompts_in(opened: OpenRun, file: str) -> list[Prompt]:
    column = opened.recipe.data.prompt_column if opened.recipe else "prompt"
    return data.load_prompts(resolve_path(file), prompt_column=column, tokenizer=opened.writer.tokenizer)


def _held_out_prompts(opened: OpenRun, file: str | None) -> list[Prompt]:
    if file is not None:
        return _prompts_in(opened, file)
    if opened.recipe is None:
        raise UserError(f"{opened.name} is no run folder, so it names no held-out prompts; give --prompts FILE")
    if not opened.knows_its_task:
        raise UserError(f"{opened.name} was trained from Python on data that cannot be found again; {GIVE}")
    return prompts_of(opened.recipe, opened.writer.tokenizer)[1][: opened.recipe.train.final_eval_prompts]


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


class ScaledAdvantage(LogitsProcessor):
    """log pi_ref + scale (log pi - log pi_ref), token by token: how far to follow Q is chosen while writing."""

    def __init__(self, network: QNetwork, scale: float, attention_mask: Tensor) -> None:
        self.network, self.scale, self._mask = network, scale, attention_mask
        self._cache: Any = None
        self._seen = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, rows) -> (B, rows), log-probabilities of the mixture up to a constant."""
        grown = input_ids.shape[1] - self._mask.shape[1]
        mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), grown)], dim=1)
        with self.network.roles.acting_as("reference") as plain:
            ref_scores = self._reference_scores(plain, input_ids, mask)
        ref_logprobs = ref_scores.masked_fill(scores.isinf(), float("-inf")).log_softmax(-1)
        logprobs = scores.float().log_softmax(-1)
        mixed = ref_logprobs + self.scale * (logprobs - ref_logprobs)
        return torch.where(scores.isinf(), scores, mixed)

    def _reference_scores(self, plain: PreTrainedModel, input_ids: Tensor, mask: Tensor) -> Tensor:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, self._seen :]
        output = plain(
            input_ids=input_ids[:, self._seen :],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache, self._seen = output.past_key_values, input_ids.shape[1]
        return output.logits[:, -1].float()
