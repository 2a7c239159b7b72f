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
from llm_dqn.assembly import base_model_of, prompts_of, rewards_of
from llm_dqn.errors import UserError
from llm_dqn.network import QNetwork
from llm_dqn.policy import BehaviourPolicy
from llm_dqn.recipe import Recipe, load_recipe, with_resolved_paths
from llm_dqn.rewards import Rewards, load_reward
from llm_dqn.rollout import Writer, rollout
from llm_dqn.types import Episode


@dataclass(frozen=True)
class OpenRun:
    """A policy ready to write; `recipe` is there when a run folder was opened."""

    writer: Writer
    recipe: Recipe | None


def open_run(run: str, max_completion_length: int | None = None, batch_size: int = 64) -> OpenRun:
    """Opens a run folder, an adapter folder, a Hub adapter, or a plain model (then tuned and base are the same).

    Raises UserError when there is nothing to open.
    """
    folder = Path(run)
    recipe_file = folder / "recipe.yaml"
    recipe = with_resolved_paths(load_recipe(recipe_file)) if recipe_file.is_file() else None
    if recipe is None:
        base, tuned, adapter = _plain_or_adapter(run)
        tokenizer = models.load_tokenizer(run if adapter is None else _tokenizer_home(run, base))
        model = models.load_causal_lm(base)
    else:
        facts = recipe.model
        tokenizer = models.load_tokenizer(facts.model_name_or_path, facts.model_revision, facts.trust_remote_code)
        model = base_model_of(recipe)
        adapter, tuned = _results_of(folder)
    network = QNetwork(
        model,
        models.num_valid_tokens(model, tokenizer),
        lora=adapter,
        target="head",
        tuned=models.load_causal_lm(tuned) if tuned else None,
    )
    length = max_completion_length or (recipe.rollout.max_completion_length if recipe else 64)
    stop_ids = frozenset(models.stop_token_ids(model, tokenizer))
    return OpenRun(Writer(network, tokenizer, stop_ids, length, batch_size), recipe)


def _results_of(folder: Path) -> tuple[str | None, str | None]:
    """(adapter, tuned model) that a run wrote."""
    if (folder / "adapter" / "adapter_config.json").is_file():
        return str(folder / "adapter"), None
    if (folder / "model" / "config.json").is_file():
        return None, str(folder / "model")
    raise UserError(f"{folder} holds no adapter yet: let `llm-dqn train` finish, or continue it with --resume")


def _plain_or_adapter(run: str) -> tuple[str, str | None, str | None]:
    """(base, tuned model, adapter) of a path or Hub id that is no run folder."""
    folder = Path(run)
    config: Path | None = folder / "adapter_config.json"
    if not folder.exists():
        config = models.hub_file(run, "adapter_config.json")
    if config is not None and config.is_file():
        base = json.loads(config.read_text()).get("base_model_name_or_path")
        if not base:
            raise UserError(f"{run}: adapter_config.json names no base model (base_model_name_or_path)")
        return base, None, run
    return run, None, None


def _tokenizer_home(run: str, base: str) -> str:
    return run if not Path(run).exists() or (Path(run) / "tokenizer_config.json").is_file() else base


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
    opened = open_run(run, max_completion_length)
    rows = _prompts(opened, prompts)
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
    seed: int = 0,
    max_prompts: int | None = None,
) -> tuple[dict[str, Any], list[tuple[Episode, Episode]]]:
    """Base against tuned on held-out prompts: the contents of `evaluation.json`, and pairs of samples (base, tuned)."""
    opened = open_run(run)
    recipe = opened.recipe
    if prompts is None and (recipe is None or not (recipe.data.eval or recipe.data.train)):
        raise UserError(f"{run} is no run folder, so it names no held-out prompts; give --prompts FILE")
    if reward_specs:
        rewards = Rewards([load_reward(spec, [Path.cwd()]) for spec in reward_specs])
    elif recipe is not None:
        rewards = rewards_of(recipe)
    else:
        raise UserError(f"{run} is no run folder, so it names no reward; give --rewards")
    rows = _prompts(opened, prompts)[:max_prompts]
    report, pairs = evaluation.base_and_tuned(opened.writer, rows, lambda e: evaluation.judged(rewards, e), seed)
    if output is not None:
        Path(output).write_text(json.dumps(report, indent=2) + "\n")
    return report, pairs


def _prompts(opened: OpenRun, file: str | None) -> list[data.Prompt]:
    recipe = opened.recipe
    column = recipe.data.prompt_column if recipe else "prompt"
    if file is not None:
        return data.load_prompts(file, prompt_column=column, tokenizer=opened.writer.tokenizer)
    assert recipe is not None
    return prompts_of(recipe, opened.writer.tokenizer)[1]


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
