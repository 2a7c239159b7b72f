"""Episodes of a replay buffer as a data set: Parquet, JSON lines or CSV."""

import csv
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from llm_dqn.data import prompt_text
from llm_dqn.errors import UserError
from llm_dqn.replay_browser import Choice, Remembered, chosen, open_replay, tokenizer_of

BATCH = 4096  # episodes decoded and written at a time

# Columns of an export, in order, by pyarrow's names of their types.
COLUMNS = {
    "prompt": "string",
    "completion": "string",
    "prompt_ids": "list<int32>",
    "completion_ids": "list<int32>",
    "reward": "float64",
    "ended": "string",
    "version": "int64",
    "age": "int64",
    "source": "string",
    "td_error": "float64",
    "ref_logprobs": "list<float32>",
    "behaviour_logprobs": "list<float32>",
    "process": "int32",
    "slot": "int64",
}


def rows(remembered: Remembered, places: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """The episodes at these places as plain values, by the names in `COLUMNS`."""
    for place in places:
        facts = {name: values[place].item() for name, values in remembered.facts.items()}
        tokens = remembered.tokens(place)
        prompt, completion = tokens.prompt_ids.tolist(), tokens.completion_ids.tolist()
        lists = {
            "prompt": prompt_text(prompt, tokenizer),
            "completion": tokenizer.decode(completion, skip_special_tokens=True),
            "prompt_ids": prompt,
            "completion_ids": completion,
            "ref_logprobs": tokens.ref_logprobs.tolist(),
            "behaviour_logprobs": tokens.behaviour_logprobs.tolist(),
        }
        row = facts | lists | ({} if remembered.prioritized else {"td_error": None})
        yield {name: row[name] for name in COLUMNS}


def export(run: str | Path, output: str | Path, choice: Choice, step: str | None = None) -> int:
    """Writes chosen episodes as Parquet, JSON lines or CSV, whole or not at all; returns how many.

    Those whose reward is only predicted are left out unless they are asked for. A file that is there is replaced. In
    CSV, lists are JSON text. The file loads again as `replay.warm_start`.
    """
    file = Path(output)
    if file.suffix.lower() not in WRITERS:
        raise UserError(f"--output {output}: expected a name that ends in {', '.join(WRITERS)}")
    if file.is_dir() or not file.absolute().parent.is_dir():
        what = "is a folder; name a file" if file.is_dir() else f"the folder {file.parent} does not exist"
        raise UserError(f"--output {output}: {what}")
    remembered = open_replay(run, step)
    places = chosen(remembered, replace(choice, limit=None))
    if choice.source is None:
        places = places[remembered.facts["source"][places] != "imagined"]
    places = places[: choice.limit]
    if len(places) == 0:
        raise UserError("no episode fits what was asked for, so nothing is written")
    temporary = file.with_name(file.name + ".tmp")
    try:
        WRITERS[file.suffix.lower()](temporary, rows(remembered, places, tokenizer_of(run)))
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return len(places)


def _write_parquet(file: Path, episodes: Iterator[dict[str, Any]]) -> None:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    types = {
        name: pyarrow.list_(_arrow(kind[5:-1])) if kind[:5] == "list<" else _arrow(kind)
        for name, kind in COLUMNS.items()
    }
    schema = pyarrow.schema(list(types.items()))
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for batch in _batches(episodes):
            writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))


def _arrow(kind: str) -> Any:
    import pyarrow

    return pyarrow.type_for_alias(kind)


def _batches(episodes: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in episodes:
        batch.append(row)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _write_jsonl(file: Path, episodes: Iterator[dict[str, Any]]) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in episodes)


def _write_csv(file: Path, episodes: Iterator[dict[str, Any]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(
            {name: json.dumps(cell) if isinstance(cell, list) else cell for name, cell in row.items()}
            for row in episodes
        )


WRITERS: dict[str, Callable[[Path, Iterator[dict[str, Any]]], None]] = {
    ".parquet": _write_parquet,
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
}
