"""Rows from files, the Hub or memory: every source ends as a list of dicts that all have the same columns."""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_dqn.errors import NotReachable, UserError, did_you_mean

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Table:
    """Rows with the name under which messages speak of them."""

    name: str
    rows: list[Row]
    columns: list[str]

    def place(self, index: int) -> str:
        """Where a row is, counted from 1 as people count."""
        return f"{self.name}, row {index + 1}"

    def columns_beside(self, column: str) -> list[str]:
        """The other columns, sorted: what rewards get."""
        return sorted(name for name in self.columns if name != column)

    def require(self, column: str, key: str) -> None:
        """`UserError` unless `column` exists; `key` is the setting that names it."""
        if column not in self.columns:
            raise UserError(
                f"{self.name} has no column '{column}'{did_you_mean(column, self.columns)} "
                f"(columns: {', '.join(self.columns)}; set {key} to choose another)"
            )


def read_table(source: Any, split: str = "train") -> Table:
    """A jsonl, json, csv or parquet file, a folder or Hub id that `datasets` can open ('id' or 'id:config'), a
    `datasets.Dataset`, an iterable of dicts, or a table as it is. Raises `UserError` where it is missing, unreadable
    or empty.
    """
    if isinstance(source, Table):
        return source
    if isinstance(source, str | Path):
        name, rows = str(source), _read_named(str(source), split)
    else:
        name, rows = _describe(source), _from_memory(source)
    if not rows:
        raise UserError(f"{name} has no rows")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{name}, row {index + 1}: expected an object with named fields, got {_short(row)}")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return Table(name, [{column: row.get(column) for column in columns} for row in rows], columns)


def _read_named(source: str, split: str) -> list[Row]:
    path = Path(source).expanduser()
    if path.is_file():
        if split != "train":
            raise UserError(f"'{source}' is a single file and has no split '{split}', only train; leave the split out")
        return _read_file(path, source)
    if path.is_dir():
        return _read_dataset(source, split)
    if path.suffix.lower() in SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"'{source}' does not exist{_sibling(path)}")
    return _read_dataset(source, split)


def _sibling(path: Path) -> str:
    folder = path.parent
    return did_you_mean(path.name, [entry.name for entry in folder.iterdir()]) if folder.is_dir() else ""


def _read_file(path: Path, source: str) -> list[Row]:
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise UserError(f"'{source}' ends in '{path.suffix}'; known are {', '.join(SUFFIXES)}")
    try:
        return readers[path.suffix.lower()](path, source)
    except UnicodeDecodeError as error:
        raise UserError(f"'{source}' is not UTF-8 text ({error})") from error


def _read_jsonl(path: Path, source: str) -> list[Row]:
    rows = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"'{source}', line {number}: not valid JSON ({error.msg} at column {error.colno})"
                ) from error
    return rows


def _read_json(path: Path, source: str) -> list[Row]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"'{source}', line {error.lineno}: not valid JSON ({error.msg}); for one object a line name the file .jsonl"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise UserError(f"'{source}' holds {type(content).__name__}; expected a list of objects")
    return content


def _read_csv(path: Path, source: str) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        rows = []
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(
                        f"'{source}', line {reader.line_num}: the row does not have {len(reader.fieldnames or [])} "
                        "fields like the header; put text with commas or quotes in double quotes"
                    )
                rows.append(dict(row))
        except csv.Error as error:
            raise UserError(f"'{source}', line {reader.line_num}: not valid CSV ({error})") from error
    return rows


def _read_parquet(path: Path, source: str) -> list[Row]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"'{source}' is not a readable parquet file ({_line(error)})") from error


def _read_dataset(source: str, split: str) -> list[Row]:
    import datasets

    path = Path(source).expanduser()
    try:
        if path.is_dir() and any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(str(path))
            if isinstance(loaded, datasets.DatasetDict):
                _check_split(source, split, loaded)
                loaded = loaded[split]
        elif path.is_dir():
            loaded = datasets.load_dataset(str(path), split=split)
        else:
            identifier, _, config = source.partition(":")
            loaded = datasets.load_dataset(identifier, config or None, split=split)
    except UserError:
        raise
    except Exception as error:  # the datasets library raises of many kinds for one fact: it cannot be had
        raise _dataset_error(source, split, path.is_dir(), error) from error
    return loaded.to_list()


def _check_split(source: str, split: str, splits: Iterable[str]) -> None:
    if split not in splits:
        raise UserError(f"'{source}' has no split '{split}'{did_you_mean(split, splits)} (splits: {', '.join(splits)})")


def _dataset_error(source: str, split: str, local: bool, error: Exception) -> UserError:
    text = str(error)
    if "split" in text.lower():
        return UserError(f"'{source}' has no split '{split}' ({_line(error)})")
    if "config name" in text.lower():
        return UserError(f"'{source}' has several configurations; write 'id:config' ({' '.join(text.split())})")
    if local:
        return UserError(f"the folder '{source}' holds no data that can be read ({_line(error)})")
    return NotReachable(f"'{source}' is neither a local file nor reachable on the Hub ({_line(error)})")


def _from_memory(source: Any) -> list[Row]:
    if hasattr(source, "to_list"):  # datasets.Dataset
        return source.to_list()
    if isinstance(source, dict):
        raise UserError(
            f"the data is a dict with the keys {', '.join(map(str, source))}; give one split of it, or a list of dicts"
        )
    if not isinstance(source, Iterable):
        raise UserError(f"the data is {_describe(source)}; expected a file, a Hub id, a Dataset or a list of dicts")
    return list(source)


def numbered(table: Table) -> Iterator[tuple[str, Row]]:
    """Rows with the words that say where they are."""
    return ((table.place(index), row) for index, row in enumerate(table.rows))


def _describe(source: Any) -> str:
    return f"the given {type(source).__name__}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
