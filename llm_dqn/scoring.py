"""Looks into completions token by token: what each token was worth, and where the base model would have gone.

A score line is a plain dict, ready for JSON: `prompt`, `completion`, `reward`, `rewards`, and one entry a completion
token in `token_ids`, `tokens`, `q_values`, `values`, `advantages`, `ranks`, `base_ranks` and `alternatives`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm_dqn.network import QNetwork
from llm_dqn.replay import collate_tokens
from llm_dqn.rollout import Writer
from llm_dqn.token_texts import TokenTexts, texts_of, token_texts
from llm_dqn.types import Episode, TokenLook

Line = dict[str, Any]
TokenPair = tuple[Tensor, Tensor]  # prompt ids (P,), completion ids (T,)

__all__ = ["describe_tokens", "look_at", "token_fields", "token_texts"]


def describe_tokens(writer: Writer, episodes: Sequence[Episode], top: int = 3) -> list[Line]:
    """Score lines of episodes, in their order; an episode without reward gets null.

    top: how many of the base model's likeliest tokens are listed as `alternatives` of each token.
    """
    pairs = [(episode.prompt_ids, episode.completion_ids) for episode in episodes]
    looks = look_at(writer.network, pairs, writer.batch_size, top)
    lines = []
    for episode, look in zip(episodes, looks, strict=True):
        reward = episode.reward if math.isfinite(episode.reward) else None
        head: Line = {"prompt": episode.prompt, "completion": episode.completion, "reward": reward}
        facts: Line = {"rewards": episode.rewards, "ended": episode.ended}
        lines.append(head | facts | token_fields(writer.tokenizer, episode.completion_ids.tolist(), look))
    return lines


def look_at(
    network: QNetwork,
    pairs: Sequence[TokenPair],
    batch_size: int,
    top: int,
    progress: Callable[[int], None] | None = None,
) -> list[TokenLook]:
    """`QNetwork.look` of each completion, on the CPU, in the order of `pairs`; batches hold rows of like length.

    progress: told after each batch how many completions it held.
    """
    lengths = [len(prompt) + len(completion) for prompt, completion in pairs]
    # The longest first: what they need serves all others too, and too much of it is found out at once.
    order = sorted(range(len(pairs)), key=lengths.__getitem__, reverse=True)
    looks: dict[int, TokenLook] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        tokens = collate_tokens([pairs[row][0] for row in rows], [pairs[row][1] for row in rows])
        found = network.look(tokens.to(network.device), top)
        sizes = [len(pairs[row][1]) for row in rows]
        columns = [column.cpu().split(sizes) for column in vars(found).values()]
        looks.update((row, TokenLook(*parts)) for row, parts in zip(rows, zip(*columns, strict=True), strict=True))
        if progress is not None:
            progress(len(rows))
    return [looks[row] for row in range(len(pairs))]


def token_fields(tokenizer: PreTrainedTokenizerBase, ids: list[int], look: TokenLook) -> Line:
    """The part of a score line that has one entry a token. Numbers keep six decimals."""
    q_values, values = _rounded(look.q_values), _rounded(look.values)
    return {
        "token_ids": ids,
        "tokens": token_texts(tokenizer, ids),
        "q_values": q_values.tolist(),
        "values": values.tolist(),
        "advantages": _rounded(look.q_values - look.values).tolist(),
        "ranks": look.ranks.tolist(),
        "base_ranks": look.base_ranks.tolist(),
        "alternatives": _alternatives(texts_of(tokenizer), look),
    }


def _rounded(values: Tensor) -> np.ndarray:
    """Float64, so that the shortest decimal is written and not the digits of a float32."""
    return values.double().numpy().round(6)


def _alternatives(texts: TokenTexts, look: TokenLook) -> list[list[Line]]:
    top = look.top_ids.shape[1]
    ids = look.top_ids.flatten().tolist()
    names = [texts[token] for token in ids]
    numbers = (look.top_q_values, look.top_base_probs, look.top_probs)
    facts = zip(names, ids, *(_rounded(number.flatten()).tolist() for number in numbers), strict=True)
    flat = [
        {"token": name, "token_id": token, "q_value": q_value, "base_probability": base, "probability": tuned}
        for name, token, q_value, base, tuned in facts
    ]
    return [flat[start : start + top] for start in range(0, len(flat), top)] if top else [[] for _ in look.ranks]
