"""A sequence-classification model as a reward function."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from llm_dqn.errors import UserError, did_you_mean
from llm_dqn.models import (
    check_model_folder,
    check_safetensors,
    ensure_pad_token,
    loading_error,
    refuse_missing_weights,
)
from llm_dqn.types import Message

_UNBOUNDED = 1_000_000  # tokenizers without a limit claim 1e30
_POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "data2vec-text")


class RewardModel:
    """Scores prompt + completion by a classifier with its own tokenizer.

    One output: its raw value (its sigmoid for `multi_label_classification`). Several outputs: the probability of
    `label`. Texts over the model's length lose tokens at their start.
    """

    def __init__(
        self,
        path: str,
        label: str | None = None,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        batch_size: int = 32,
        trust_remote_code: bool = False,
    ) -> None:
        self.name = Path(path).name + (f"#{label}" if label else "")
        self.device = torch.device(device) if device else _own_device()
        self.batch_size = batch_size
        check_model_folder(path)
        where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        try:
            config = AutoConfig.from_pretrained(path, **where)
            self._label = _label_index(path, label, config)  # before the weights, which may be large
            check_safetensors(path)
            self.tokenizer = AutoTokenizer.from_pretrained(path, **where)
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                path, dtype="auto", use_safetensors=True, output_loading_info=True, **where
            )
        except UserError:
            raise
        except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
            raise loading_error(path, revision, "reward model", error) from error
        self.model, loading = loaded
        refuse_missing_weights(path, loading["missing_keys"])
        ensure_pad_token(self.tokenizer, path)
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.tokenizer.truncation_side = "left"
        self.tokenizer.padding_side = "right"
        self.max_length = _max_length(self.model.config, self.tokenizer)
        self.model.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """One score a completion, in the order given."""
        texts = [self.text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        chat = bool(prompts) and isinstance(prompts[0], list) and bool(self.tokenizer.chat_template)
        encoded = self.tokenizer(
            texts, add_special_tokens=not chat, truncation=self.max_length is not None, max_length=self.max_length
        )["input_ids"]
        scores = [0.0] * len(texts)
        order = sorted(range(len(texts)), key=lambda index: len(encoded[index]))  # little padding in a batch
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            logits = self._logits([encoded[index] for index in chosen])
            for index, score in zip(chosen, self._score(logits).tolist(), strict=True):
                scores[index] = score
        return scores

    def _logits(self, encoded: list[list[int]]) -> Tensor:
        """(B, labels) float32 of token ids, padded on the right."""
        padding = self.tokenizer.pad_token_id
        rows = [torch.tensor(ids or [padding]) for ids in encoded]  # an empty text is one padding token
        lengths = torch.tensor([len(row) for row in rows])
        input_ids = pad_sequence(rows, batch_first=True, padding_value=padding)
        mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        return self.model(input_ids=input_ids.to(self.device), attention_mask=mask.to(self.device)).logits.float()

    def text(self, prompt: str | list[Message], completion: str | list[Message]) -> str:
        """What the classifier reads: the text, or the conversation in its own chat template (its words without one)."""
        if isinstance(prompt, str) and isinstance(completion, str):
            return prompt + completion
        messages = [*prompt, *completion]
        if self.tokenizer.chat_template:
            return self.tokenizer.apply_chat_template(messages, tokenize=False)
        return "\n".join(str(message["content"]) for message in messages if isinstance(message, dict))

    def _score(self, logits: Tensor) -> Tensor:
        """(B, labels) -> (B,)."""
        several = self.model.config.problem_type == "multi_label_classification"
        if several:
            return logits[:, self._label].sigmoid()
        return logits[:, 0] if logits.shape[1] == 1 else logits.softmax(-1)[:, self._label]


def _own_device() -> torch.device:
    """The GPU of this process among those of its machine, which launchers tell by LOCAL_RANK; the CPU without any."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _label_index(path: str, label: str | None, config: Any) -> int:
    names = [str(config.id2label[index]) for index in sorted(config.id2label)]
    if label is None:
        if len(names) == 1:
            return 0
        raise UserError(
            f"'{path}' tells {len(names)} labels apart ({', '.join(names)}); "
            f"name the one to reward, like '{path}#{names[-1]}'"
        )
    for index, name in enumerate(names):
        if name.lower() == label.lower():
            return index
    raise UserError(f"'{path}' has no label '{label}'{did_you_mean(label, names)} (labels: {', '.join(names)})")


def _max_length(config: Any, tokenizer: Any) -> int | None:
    limits = [limit for limit in (tokenizer.model_max_length,) if limit < _UNBOUNDED]
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions:
        offset = tokenizer.pad_token_id + 1 if config.model_type in _POSITIONS_AFTER_PADDING else 0
        limits.append(positions - offset)
    return min(limits) if limits else None
