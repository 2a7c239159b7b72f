"""Prompts and logged completions: read, checked row by row, tokenised, and dealt out in a fixed order."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from llm_dqn.errors import UserError
from llm_dqn.tables import Row, Table, numbered, read_table
from llm_dqn.types import Message, Prompt

logger = logging.getLogger(__name__)

TooLong = Literal["error", "drop", "truncate", "keep_start"]

_HOLD_OUT = 0x401D  # keeps the split's random stream apart from that of the epochs


@dataclass(frozen=True)
class Limit:
    """The most tokens that a prompt may have, where that comes from, and what can be done about it."""

    tokens: int
    name: str
    cure: str


@dataclass(frozen=True)
class LoggedRow:
    """One completion that was written and scored elsewhere."""

    prompt: Prompt
    completion: str
    completion_ids: list[int]  # with the end-of-sequence token where the completion ended by itself
    reward: float
    ended: Literal["eos", "length"]


def load_prompts(
    source: Any,
    *,
    split: str = "train",
    prompt_column: str = "prompt",
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int | None = None,
    too_long: TooLong = "error",
    room: int | None = None,
) -> list[Prompt]:
    """All prompts of a file, Hub id, `Dataset` or list of dicts, tokenised; other columns travel along.

    A prompt of more than `max_prompt_length` tokens, or than the `room` that the model's context leaves for it, is an
    error, is dropped, or loses tokens at its start ("truncate") or at its end ("keep_start"); a plain prompt is then
    what is left of it, for rewards too. Raises `UserError` naming source, row and column.
    """
    if too_long not in get_args(TooLong):
        raise UserError(f"too_long: '{too_long}' is not one of {', '.join(get_args(TooLong))}")
    table = read_table(source, split)
    table.require(prompt_column, "prompt_column")
    prompts = _tokenise(table, prompt_column, tokenizer)
    fitting = _fit(table, prompts, tokenizer, _limit(max_prompt_length, room), too_long)
    return [prompt for prompt in fitting if prompt is not None]


def _tokenise(table: Table, column: str, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    chat = check_prompts(table, column)
    if chat and not tokenizer.chat_template:
        raise UserError(
            f"{table.name}: column '{column}' holds conversations but the tokenizer has no chat template; use a chat "
            "model, set tokenizer.chat_template, or give plain text prompts"
        )
    if chat:
        texts = [render_chat(row[column], tokenizer, place) for place, row in numbered(table)]
    else:
        texts = [row[column] for row in table.rows]
    encoded = encode_texts(texts, tokenizer, chat)
    for (place, row), ids in zip(numbered(table), encoded, strict=True):
        _check_ids(place, column, row[column], ids, tokenizer)
    others = [name for name in table.columns if name != column]
    return [
        Prompt(prompt=row[column], text=text, ids=ids, columns={name: row[name] for name in others})
        for row, text, ids in zip(table.rows, texts, encoded, strict=True)
    ]


def check_prompts(table: Table, column: str) -> bool:
    """`UserError` for the first row whose prompt is none; whether the prompts are conversations."""
    chat = isinstance(table.rows[0][column], list)
    for place, row in numbered(table):
        check_prompt(place, column, row[column], chat)
    return chat


def check_prompt(place: str, column: str, value: Any, chat: bool) -> None:
    """`UserError` unless `value` is text, or with `chat` a conversation, that a tokenizer can read."""
    where = f"{place}: column '{column}'"
    if value is None or value == "" or value == []:
        raise UserError(f"{where} is empty ({value!r}); remove the row or fill it in")
    if not isinstance(value, str | list):
        raise UserError(f"{where} is {type(value).__name__} ({value!r}); expected text or a list of messages")
    if isinstance(value, list) != chat:
        kinds = ("plain text", "a conversation")
        raise UserError(f"{where} is {kinds[not chat]} but row 1 is {kinds[chat]}; use one kind in a file")
    for number, message in enumerate(value if chat else [], start=1):
        fits = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not fits or not (isinstance(message.get("content"), str | list) or message.get("tool_calls")):
            raise UserError(
                f"{where}, message {number}: expected {{'role': ..., 'content': text}}, got {message!r:.80}"
            )
    if not _is_text(value):
        raise UserError(f"{where} holds half of a character pair ({value!r:.60}), which is no text; mend the row")


def _is_text(value: Any) -> bool:
    """Whether all characters of a prompt can be written as UTF-8; JSON may hold halves of pairs that cannot."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def render_chat(messages: list[Message], tokenizer: PreTrainedTokenizerBase, place: str = "the prompt") -> str:
    """The conversation as the model reads it, up to where it answers (or goes on, after an assistant's message)."""
    answered = messages[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not answered, continue_final_message=answered
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise UserError(f"{place}: the tokenizer's chat template refuses the conversation ({error})") from error


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[list[int]]:
    """Token ids to be continued: the tokenizer's usual special tokens, but no end-of-sequence token at the end.

    A rendered chat already spells its special tokens, so none are added to it.
    """
    encoded = tokenizer(list(texts), add_special_tokens=not chat, verbose=False)["input_ids"]
    if not chat and tokenizer("a").input_ids[-1:] == [tokenizer.eos_token_id]:
        encoded = [ids[:-1] for ids in encoded]
    return encoded


def prompt_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The reverse of `encode_texts`: without the special token that the tokenizer puts first by itself."""
    starts = len(ids) > 0 and ids[0] == tokenizer.bos_token_id and tokenizer("a").input_ids[:1] == [ids[0]]
    return tokenizer.decode(list(ids)[starts:], skip_special_tokens=False)


def _check_ids(place: str, column: str, value: Any, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
    meaningful = [token for token in ids if token not in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
    if not meaningful and not isinstance(value, list):
        raise UserError(f"{place}: column '{column}' ({value!r:.60}) has no tokens for this tokenizer")
    if meaningful and all(token == tokenizer.unk_token_id for token in meaningful):
        raise UserError(f"{place}: column '{column}' ({value!r:.60}) consists of tokens unknown to this tokenizer")


def room_for_prompt(context: int | None, max_completion_length: int) -> int | None:
    """Tokens that a model's context leaves for a prompt beside the longest completion; None where it has no limit."""
    if context is None or context > max_completion_length:
        return None if context is None else context - max_completion_length
    raise UserError(
        f"completions of {max_completion_length} tokens leave no room for a prompt: the model was made to read "
        f"{context} tokens in all; lower max_completion_length"
    )


def _limit(max_prompt_length: int | None, room: int | None) -> Limit | None:
    """The tighter of the two limits."""
    if room is not None and (max_prompt_length is None or room < max_prompt_length):
        name = f"the {room} that the model's context leaves beside max_completion_length"
        return Limit(room, name, "lower max_completion_length")
    if max_prompt_length is None:
        return None
    return Limit(max_prompt_length, f"max_prompt_length={max_prompt_length}", "raise max_prompt_length")


def _fit(
    table: Table, prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, limit: Limit | None, too_long: TooLong
) -> list[Prompt | None]:
    """Applies the rule for prompts over the limit; None where one is dropped."""
    if limit is None:
        return list(prompts)
    over = [index for index, prompt in enumerate(prompts) if len(prompt.ids) > limit.tokens]
    if over and too_long == "error":
        longest = max(len(prompts[index].ids) for index in over)
        raise UserError(
            f"{table.place(over[0])}: the prompt has {len(prompts[over[0]].ids)} tokens, more than {limit.name}; "
            f"{len(over)} of {len(prompts)} rows are too long (longest {longest}); {limit.cure} or "
            "set too_long to drop, truncate (keeps the end) or keep_start"
        )
    if over and too_long == "keep_start" and isinstance(prompts[over[0]].prompt, list):
        raise UserError(
            f"{table.place(over[0])}: too_long: keep_start would cut a conversation off before the model's turn; use "
            "drop or truncate"
        )
    if over:
        deeds = {"drop": "dropped", "truncate": "shortened at their start", "keep_start": "shortened at their end"}
        counts = f"{len(over)} of {len(prompts)} prompts"
        logger.warning("%s: %s over %s %s", table.name, counts, limit.name, deeds[too_long])
    fitting: list[Prompt | None] = list(prompts)
    for index in over:
        fitting[index] = None if too_long == "drop" else _shorten(prompts[index], tokenizer, limit.tokens, too_long)
    if all(prompt is None for prompt in fitting):
        raise UserError(f"{table.name}: no prompt has at most {limit.tokens} tokens ({limit.name})")
    return fitting


def _shorten(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, limit: int, too_long: TooLong) -> Prompt:
    starts = limit > 1 and prompt.ids[0] == tokenizer.bos_token_id
    if too_long == "keep_start":
        ids = prompt.ids[:limit]
    else:
        ids = prompt.ids[:1] + prompt.ids[-(limit - 1) :] if starts else prompt.ids[-limit:]
    if isinstance(prompt.prompt, list):
        return replace(prompt, ids=ids, text=tokenizer.decode(ids))
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return replace(prompt, ids=ids, text=text, prompt=text)


class PromptStream:
    """Deals prompts out endlessly: each epoch in a new order, each prompt once an epoch over all ranks together."""

    def __init__(
        self, prompts: Sequence[Prompt], seed: int, num_generations: int = 1, rank: int = 0, world_size: int = 1
    ) -> None:
        if not prompts:
            raise UserError("there are no prompts to deal out")
        self.prompts, self.seed, self.num_generations = prompts, seed, num_generations
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.position = 0
        self._order = self._shuffled()

    def next_batch(self, n: int) -> list[Prompt]:
        """The next `n` prompts of this rank, each `num_generations` times in a row; all ranks must ask alike."""
        dealt = [self._next() for _ in range(n * self.world_size)]
        mine = dealt[self.rank * n : (self.rank + 1) * n]
        return [self.prompts[index] for index in mine for _ in range(self.num_generations)]

    def _next(self) -> int:
        if self.position == len(self._order):
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._shuffled()
        self.position += 1
        return int(self._order[self.position - 1])

    def _shuffled(self) -> np.ndarray:
        """The order of an epoch depends on seed and epoch alone, so that resuming needs two numbers."""
        return np.random.Generator(np.random.PCG64([self.seed, self.epoch])).permutation(len(self.prompts))

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands, as plain JSON."""
        return {"epoch": self.epoch, "position": self.position, "prompts": len(self.prompts)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on where `state_dict` was taken; `UserError` if the data has another size now."""
        if state["prompts"] != len(self.prompts):
            raise UserError(f"the training data has {len(self.prompts)} prompts but had {state['prompts']} when saved")
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._shuffled()


def hold_out(prompts: Sequence[Prompt], count: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Splits into training prompts and `count` held-out ones; no text is on both sides, copies leave training too."""
    order = np.random.Generator(np.random.PCG64([seed, _HOLD_OUT])).permutation(len(prompts))
    texts = list(dict.fromkeys(prompts[int(index)].text for index in order))
    if count >= len(texts):
        raise UserError(
            f"cannot hold out {count} of {len(texts)} different prompts; give an evaluation file or ask for fewer"
        )
    chosen = set(texts[:count])
    held_out = list({prompt.text: prompt for prompt in prompts if prompt.text in chosen}.values())
    return [prompt for prompt in prompts if prompt.text not in chosen], held_out


def load_logged(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    too_long: TooLong = "error",
    prompt_column: str = "prompt",
    split: str = "train",
    context: int | None = None,
) -> list[LoggedRow]:
    """Completions with their rewards, from columns prompt, completion, reward and optionally ended ('eos', 'length').

    A completion that ended by itself gets the end-of-sequence token. One of more than `max_completion_length` tokens
    is an error, or is dropped by all other rules: its reward was paid for the whole of it. Together with its prompt it
    must fit into the model's `context`. Columns prompt_ids and completion_ids, as `llm-dqn replay export` writes them,
    are taken instead of tokenising again where they spell the texts: a model may have written other tokens.
    """
    table = read_table(source, split)
    for column in (prompt_column, "completion", "reward"):
        table.require(column, "prompt_column" if column == prompt_column else "the column's name in the file")
    limit = _limit(max_prompt_length, None)
    tokenised = [_with_given_ids(prompt, tokenizer) for prompt in _tokenise(table, prompt_column, tokenizer)]
    prompts = _fit(table, tokenised, tokenizer, limit, too_long)
    rows = []
    over = 0
    for (place, row), prompt in zip(numbered(table), prompts, strict=True):
        logged = None if prompt is None else _logged_row(place, row, prompt, tokenizer)
        if logged is None:
            continue
        if max_completion_length is not None and len(logged.completion_ids) > max_completion_length:
            if too_long == "error":
                raise UserError(
                    f"{place}: the completion has {len(logged.completion_ids)} tokens, more than "
                    f"max_completion_length={max_completion_length}; raise it or set too_long: drop"
                )
            over += 1
            continue
        if context is not None and len(logged.prompt.ids) + len(logged.completion_ids) > context:
            raise UserError(
                f"{place}: prompt and completion have {len(logged.prompt.ids)} + {len(logged.completion_ids)} tokens, "
                f"the model was made to read {context}; remove the row"
            )
        rows.append(logged)
    if over:
        logger.warning("%s: %d completions over %d tokens dropped", table.name, over, max_completion_length)
    if not rows:
        raise UserError(f"{table.name}: no row has at most max_completion_length={max_completion_length} tokens")
    return rows


def _logged_row(place: str, row: Row, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> LoggedRow:
    completion = row["completion"]
    if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict):
        completion = completion[0].get("content")
    if not isinstance(completion, str):
        raise UserError(f"{place}: column 'completion' is {type(completion).__name__}; expected text")
    ended: Any = row.get("ended") or "eos"
    if ended not in ("eos", "length"):
        raise UserError(f"{place}: column 'ended' is {ended!r}; expected 'eos' or 'length'")
    ids = _token_ids(row.get("completion_ids"), tokenizer)
    if not ids or tokenizer.decode(ids, skip_special_tokens=True) != completion:
        ids = tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
        ids = [*ids, tokenizer.eos_token_id] if ended == "eos" else ids
    if not ids:
        raise UserError(f"{place}: the completion is empty and did not end, so it holds no action")
    columns = {name: value for name, value in prompt.columns.items() if name not in ("completion", "reward", "ended")}
    return LoggedRow(replace(prompt, columns=columns), completion, ids, _reward(place, row["reward"]), ended)


def _with_given_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    ids = _token_ids(prompt.columns.get("prompt_ids"), tokenizer)
    return replace(prompt, ids=ids) if ids and prompt_text(ids, tokenizer) == prompt.prompt else prompt


def _token_ids(value: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A list of token ids of this tokenizer, or else nothing."""
    whole = isinstance(value, list) and all(type(token) is int and 0 <= token < len(tokenizer) for token in value)
    return list(value) if whole else []


def _reward(place: str, value: Any) -> float:
    """A finite number; text is read as one, since CSV knows nothing else."""
    try:
        number = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{place}: column 'reward' is {value!r}; expected a finite number")
    return number
