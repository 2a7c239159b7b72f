"""How far to follow what was learned, chosen while writing: from the base model over the tuned one and beyond."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from llm_dqn.network import QNetwork


class ScaledAdvantage(LogitsProcessor):
    """log pi_ref + scale (log pi - log pi_ref), token by token, up to a constant.

    As pi = pi_ref exp(A / beta), this is pi_ref exp(scale A / beta): the policy for another price beta / scale of
    leaving the base model. 0 is the base model, 1 the tuned one; below 0 it turns away from the reward.

    attention_mask: (B, P) of the prompts that are being continued, padded on the left.
    """

    def __init__(self, network: QNetwork, scale: float, attention_mask: Tensor) -> None:
        self.network, self.scale, self._mask = network, scale, attention_mask
        self._cache: Any = None
        self._seen = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, rows) -> (B, rows), log-probabilities of the mixture up to a constant."""
        grown = input_ids.shape[1] - self._mask.shape[1]
        mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), grown)], dim=1)
        with self.network.writer("reference") as plain:
            ref_scores = self._reference_scores(plain, input_ids, mask)
        ref_logprobs = ref_scores.masked_fill(scores.isinf(), float("-inf")).log_softmax(-1)
        logprobs = scores.float().log_softmax(-1)
        mixed = ref_logprobs + self.scale * (logprobs - ref_logprobs)
        return torch.where(scores.isinf(), scores, mixed)

    def _reference_scores(self, plain: PreTrainedModel, input_ids: Tensor, mask: Tensor) -> Tensor:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, self._seen :]
        # The logits of a whole prompt, (B, P, V), would be gigabytes where only those of its last token are read.
        last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(plain.forward).parameters else {}
        output = plain(
            input_ids=input_ids[:, self._seen :],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **last_only,
        )
        self._cache, self._seen = output.past_key_values, input_ids.shape[1]
        return output.logits[:, -1].float()
