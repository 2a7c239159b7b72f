"""Small Q-networks and episodes for tests."""

from dataclasses import fields
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from llm_dqn import models
from llm_dqn.adapters import LoraConfig
from llm_dqn.heads import HeadSettings
from llm_dqn.network import QNetwork
from llm_dqn.rollout import Writer
from llm_dqn.types import Episode, Prompt

PROMPTS = ("the film was", "i hated", "what a lovely warm story about two", "3 of 10")


def lora(**options: Any) -> LoraConfig:
    """A small LoRA on all linear layers of the trunk."""
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options))


def network(path: str, seed: int = 0, **options: Any) -> QNetwork:
    """A Q-network on the model in `path`, LoRA unless `lora=None` is given."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    of_head = {field.name: options.pop(field.name) for field in fields(HeadSettings) if field.name in options}
    head = HeadSettings(**({"beta": 0.5} | of_head))
    return QNetwork(model, models.num_valid_tokens(model, tokenizer), head, **({"lora": lora()} | options))


def writer(net: QNetwork, path: str, max_completion_length: int = 8) -> Writer:
    """Writes with `net` and the tokenizer in `path`."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    with net.roles.acting_as("online") as plain:
        stop_ids = frozenset(models.stop_token_ids(plain, tokenizer))
    return Writer(net, tokenizer, stop_ids, max_completion_length)


def prompts(path: str) -> list[Prompt]:
    """Four prompts of different lengths."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    return [Prompt(text, text, tokenizer(text)["input_ids"]) for text in PROMPTS]


def shake(net: QNetwork, scale: float = 0.3) -> None:
    """Moves every trainable weight, so that online, target and reference all differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def episode(
    prompt_ids: list[int], completion_ids: list[int], reward: float = 0.0, ended: str = "eos", **facts: Any
) -> Episode:
    """An episode from token ids, with distinct stored log-probabilities."""
    length = len(completion_ids)
    return Episode(
        prompt="p",
        completion="c",
        prompt_ids=torch.tensor(prompt_ids),
        completion_ids=torch.tensor(completion_ids),
        ref_logprobs=facts.pop("ref_logprobs", -torch.arange(1.0, length + 1)),
        behaviour_logprobs=facts.pop("behaviour_logprobs", -torch.arange(1.0, length + 1) - 0.5),
        reward=reward,
        ended=ended,  # type: ignore[arg-type]
        **facts,
    )
