"""Who writes: the behaviour policy, as settings of Hugging Face's `generate`.

Acting well is sampling from pi_ref * exp(Q / beta), which for the `lm` head is the tuned LM itself, or its argmax at
temperature 0. Exploring is doing something else with probability epsilon.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

PROMPTS, FEW_PROMPTS = 64, 32  # of a collection, see `Intake.prompts_per_collect`
# Temperatures of acting once something was learned: from what is right or wrong, and from rewards that are counted
SHARP, MILD = 0.3, 0.6


@dataclass(frozen=True)
class BehaviourPolicy:
    """How completions are written.

    epsilon: probability of exploring. explore "prior": that share of *completions* is written by the untouched base
    model. "uniform": that share of *tokens* is drawn uniformly from the vocabulary, as in the textbook.
    temperature: of the acting policy; 0 takes the likeliest token.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    epsilon: float = 0.0
    explore: Literal["prior", "uniform"] = "prior"


def sampled() -> BehaviourPolicy:
    """The acting policy itself, without exploration."""
    return BehaviourPolicy()


def greedy() -> BehaviourPolicy:
    """Always the likeliest token."""
    return BehaviourPolicy(temperature=0.0)


class MaskInvalidTokens(LogitsProcessor):
    """Rows of the output layer beyond the tokenizer can never be chosen."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, rows) -> (B, rows) with -inf beyond the tokenizer."""
        scores = scores.clone()
        scores[:, self.num_tokens :] = float("-inf")
        return scores


class UniformExploration(LogitsProcessor):
    """With probability epsilon a token is drawn uniformly from the vocabulary. Mnih et al. 2015."""

    def __init__(self, epsilon: float, num_tokens: int) -> None:
        self.epsilon, self.num_tokens = epsilon, num_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, rows) -> (B, rows); an exploring row keeps one random token only, so that greedy acting explores too."""
        explores = torch.rand(len(scores), device=scores.device) < self.epsilon
        tokens = torch.randint(self.num_tokens, (len(scores), 1), device=scores.device)
        only = torch.full_like(scores, float("-inf")).scatter(1, tokens, 0.0)
        return torch.where(explores.unsqueeze(1), only, scores)


class TakenLogprobs(LogitsProcessor):
    """Changes nothing, and notes the log-probability of each token that is taken, which comes one call later.

    It stands after the mask of invalid tokens and before whatever makes another policy of the model's own.
    """

    def __init__(self) -> None:
        self._scores: Tensor | None = None
        self._columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, rows) -> the same."""
        self._note(input_ids)
        self._scores = scores
        return scores

    def finish(self, output: Tensor) -> Tensor:
        """(B, new tokens) float32 log-probabilities of the tokens that were added to make `output` (B, all tokens)."""
        self._note(output)
        self._scores = None
        return torch.stack(self._columns, dim=1)

    def _note(self, ids: Tensor) -> None:
        if self._scores is not None:
            taken = self._scores.gather(1, ids[:, -1:]).squeeze(1)
            self._columns.append(taken - self._scores.logsumexp(1))


def generation_config(
    policy: BehaviourPolicy, max_completion_length: int, stop_token_ids: set[int], pad_token_id: int
) -> GenerationConfig:
    """The policy in Hugging Face's words."""
    sampling = {}
    if policy.temperature > 0:
        sampling = {
            "temperature": policy.temperature,
            "top_k": policy.top_k,
            "top_p": policy.top_p,
            "min_p": policy.min_p,
        }
    return GenerationConfig(
        max_new_tokens=max_completion_length,
        do_sample=policy.temperature > 0,
        eos_token_id=sorted(stop_token_ids),
        pad_token_id=pad_token_id,
        **sampling,
    )


def logits_processors(policy: BehaviourPolicy, num_tokens: int, watch: LogitsProcessor) -> LogitsProcessorList:
    """What happens to the logits before a token is drawn. watch: what sees the model's own, before any exploration."""
    processors = LogitsProcessorList([MaskInvalidTokens(num_tokens), watch])
    if policy.explore == "uniform" and policy.epsilon > 0:
        processors.append(UniformExploration(policy.epsilon, num_tokens))
    return processors
