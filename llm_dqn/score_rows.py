"""Rows with prompts and completions that somebody else wrote, made ready for a model, and their score lines.

A row's columns: the prompt (text or messages), `completion` (text, or one assistant message in a list), optionally
`token_ids` or `completion_ids` (then exactly these are scored) and `ended` ("eos" or "length"). All others go to the
reward functions. Text is tokenised as logged data is: alone, followed by the end-of-sequence token unless `ended` is
"length", or unless the completion is as long as the run allows, where the model had no token left to end with.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_dqn.data import check_prompt, encode_texts, render_chat
from llm_dqn.errors import UserError
from llm_dqn.rewards import RewardError, RewardResult, Rewards
from llm_dqn.rollout import Writer
from llm_dqn.row_stream import Found
from llm_dqn.scoring import Line, look_at, token_fields
from llm_dqn.tables import Row
from llm_dqn.types import Message

IDS = ("token_ids", "completion_ids")
_NO_REWARD = RewardResult(None, {})


@dataclass(frozen=True)
class Given:
    """One completion to be scored. `completion_ids` has the end-of-sequence token where the completion ended."""

    place: str  # where it stands, for messages
    prompt: str | list[Message]
    completion: str
    prompt_ids: Tensor  # (P,)
    completion_ids: Tensor  # (T,)
    columns: dict[str, Any]


@dataclass
class _Draft:
    """A row whose form is right, before it is tokenised."""

    place: str
    prompt: str | list[Message]
    text: str  # the prompt as the model reads it
    completion: str | None
    ids: list[int] | None
    ended: str | None
    columns: dict[str, Any]


class RowReader:
    """Makes rows ready.

    context: tokens that the model can read, None = no limit. max_completion_length: tokens that the run allowed, None
    where no run is known.
    """

    def __init__(
        self,
        writer: Writer,
        prompt_column: str = "prompt",
        context: int | None = None,
        max_completion_length: int | None = None,
    ) -> None:
        self.tokenizer, self.stop_ids = writer.tokenizer, writer.stop_token_ids
        self.num_tokens = writer.network.num_tokens
        self.prompt_column, self.context = prompt_column, context
        self.max_completion_length = max_completion_length

    def read(self, rows: Sequence[Found]) -> list[Given | UserError]:
        """One completion a row, or why there is none."""
        drafts = [self._tried(self._draft, place, row) for place, row in rows]
        sound = [draft for draft in drafts if isinstance(draft, _Draft)]
        prompt_ids: dict[int, list[int]] = {}
        for chat in (False, True):
            part = [draft for draft in sound if isinstance(draft.prompt, list) == chat]
            encoded = encode_texts([draft.text for draft in part], self.tokenizer, chat) if part else []
            prompt_ids.update((id(draft), ids) for draft, ids in zip(part, encoded, strict=True))
        spoken = [draft for draft in sound if draft.ids is None]
        texts = [draft.completion or "" for draft in spoken]
        encoded = self._encoded(texts) if texts else []
        completion_ids = {id(draft): ids for draft, ids in zip(spoken, encoded, strict=True)}
        return [
            self._tried(self._given, draft, prompt_ids[id(draft)], completion_ids.get(id(draft)))
            if isinstance(draft, _Draft)
            else draft
            for draft in drafts
        ]

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return self.tokenizer(texts, **options)["input_ids"]

    def _tried(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except UserError as error:
            return error.with_traceback(None)  # which would keep the row alive

    def _draft(self, place: str, row: Row | UserError) -> _Draft:
        if isinstance(row, UserError):
            raise row
        if self.prompt_column not in row:
            raise UserError(f"{place}: has no '{self.prompt_column}' (columns: {', '.join(map(str, row))})")
        prompt = row[self.prompt_column]
        check_prompt(place, self.prompt_column, prompt, chat=isinstance(prompt, list))
        text = prompt
        if isinstance(prompt, list):
            if not self.tokenizer.chat_template:
                raise UserError(f"{place}: a conversation, but the tokenizer has no chat template")
            text = render_chat(prompt, self.tokenizer, place)
        ids = next((self._ids(place, name, row[name]) for name in IDS if row.get(name) is not None), None)
        completion = _completion(place, row, needed=ids is None)
        ended = row.get("ended") or None
        if ended not in (None, "eos", "length"):
            raise UserError(f"{place}: column 'ended' is {ended!r:.40}; expected 'eos' or 'length'")
        if completion == "" and ids is None and ended != "eos":
            raise UserError(f"{place}: the completion is empty; where the model ended at once, add ended: eos")
        other = {name: value for name, value in row.items() if name not in (self.prompt_column, "completion", *IDS)}
        return _Draft(place, prompt, text, completion, ids, ended, other)

    def _ids(self, place: str, name: str, value: Any) -> list[int]:
        """Token ids as they stand in the row; CSV holds them as JSON."""
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise UserError(f"{place}: column '{name}' is {value!r:.40}; expected [1, 2, ...]") from error
        if not isinstance(value, list) or not value or not all(type(token) is int for token in value):
            raise UserError(f"{place}: column '{name}' is {value!r:.40}; expected a list of token ids")
        if min(value) < 0 or max(value) >= self.num_tokens:
            wrong = min(value) if min(value) < 0 else max(value)
            raise UserError(
                f"{place}: column '{name}' has {wrong}; the tokenizer has ids from 0 to {self.num_tokens - 1}"
            )
        return value

    def _given(self, draft: _Draft, prompt_ids: list[int], own_ids: list[int] | None) -> Given:
        place, completion = draft.place, draft.completion
        if not prompt_ids:
            raise UserError(f"{place}: the prompt has no tokens for this tokenizer")
        if draft.ids is not None:
            ids, spelled = draft.ids, self.tokenizer.decode(draft.ids, skip_special_tokens=True)
            if completion is not None and completion != spelled:
                raise UserError(
                    f"{place}: the token ids spell {spelled!r:.60}, the completion is {completion!r:.60}; leave one out"
                )
            completion = spelled
        else:
            ids = self._ended(own_ids or [], draft.ended)
        if not ids:
            raise UserError(f"{place}: the completion has no tokens and did not end, so nothing can be scored")
        if self.context is not None and len(prompt_ids) + len(ids) > self.context:
            raise UserError(
                f"{place}: prompt and completion have {len(prompt_ids)} + {len(ids)} tokens, the model was made to "
                f"read {self.context}"
            )
        prompt_tensor, tensor = torch.tensor(prompt_ids), torch.tensor(ids)
        return Given(place, draft.prompt, completion or "", prompt_tensor, tensor, draft.columns)

    def _ended(self, ids: list[int], ended: str | None) -> list[int]:
        full = self.max_completion_length is not None and len(ids) >= self.max_completion_length
        goes_on = ended == "length" or (ended is None and full)
        return ids if goes_on or (ids and ids[-1] in self.stop_ids) else [*ids, self.tokenizer.eos_token_id]


def _completion(place: str, row: Row, needed: bool) -> str | None:
    """The completion's text; None where there is none and token ids say it instead."""
    value = row.get("completion")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        if value[0].get("role") != "assistant":
            raise UserError(f"{place}: the completion's message is of {value[0].get('role')!r:.40}, not the assistant")
        value = value[0].get("content")
    if value is None and not needed:
        return None
    if value is None:
        raise UserError(f"{place}: has no completion (columns: {', '.join(map(str, row))})")
    if not isinstance(value, str):
        raise UserError(
            f"{place}: column 'completion' is {type(value).__name__} ({value!r:.60}); expected text or one message of "
            "the assistant"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: the completion holds half of a character pair, which is no text") from error
    return value


class Judge:
    """Asks the rewards, so that a row on which one fails costs that row alone."""

    def __init__(self, rewards: Rewards | None, batch_size: int) -> None:
        self.rewards, self.batch_size = rewards, batch_size
        self.answered = 0

    def __call__(self, given: Sequence[Given]) -> list[RewardResult | UserError]:
        """What the rewards say, `batch_size` completions a call; the rows of a call that fails are tried one by one.

        Raises `RewardError` where a whole batch fails, or the first rows of all: then it is not the rows' fault.
        """
        if self.rewards is None:
            return [_NO_REWARD] * len(given)
        results: list[RewardResult | UserError] = []
        for start in range(0, len(given), self.batch_size):
            part = given[start : start + self.batch_size]
            try:
                found: Sequence[RewardResult | UserError] = _judged(self.rewards, part)
            except RewardError as error:
                found = [_judged_alone(self.rewards, one) for one in part]
                hopeless = all(isinstance(result, UserError) for result in found)
                if hopeless and (self.answered == 0 or 1 < len(part) == self.batch_size):
                    raise error
            self.answered += sum(not isinstance(result, UserError) for result in found)
            results += found
        return results


def score_given(
    writer: Writer, judge: Judge, given: Sequence[Given], top: int, progress: Callable[[int], None]
) -> Iterator[Line | UserError]:
    """Score lines of completions in their order, or why one has none; built one by one as they are asked for.

    progress: told how many completions more have gone through the model.
    """
    results = judge(given)
    pairs = [(one.prompt_ids, one.completion_ids) for one in given]
    looks = look_at(writer.network, pairs, writer.batch_size, top, progress)
    for one, look, result in zip(given, looks, results, strict=True):
        if isinstance(result, UserError):
            yield result
        elif not np.isfinite(look.q_values.numpy()).all():
            yield UserError(f"{one.place}: the model gives Q-values that are not finite")
        else:
            head = {"prompt": one.prompt, "completion": one.completion, "reward": result.total, "rewards": result.each}
            ended = "eos" if int(one.completion_ids[-1]) in writer.stop_token_ids else "length"
            fields = token_fields(writer.tokenizer, one.completion_ids.tolist(), look)
            yield {**head, **fields, "ended": ended}


def _judged(rewards: Rewards, given: Sequence[Given]) -> list[RewardResult]:
    return rewards.score(
        prompts=[one.prompt for one in given],
        completions=[one.completion for one in given],
        columns=[one.columns for one in given],
        completion_ids=[one.completion_ids.tolist() for one in given],
    )


def _judged_alone(rewards: Rewards, one: Given) -> RewardResult | UserError:
    try:
        return _judged(rewards, [one])[0]
    except RewardError as error:
        return UserError(f"{one.place}: {error}")
