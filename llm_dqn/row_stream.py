"""Rows of a file one after another, however large it is; a row that cannot be read is told and passed over."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sized
from itertools import chain, islice
from pathlib import Path
from typing import Any

from llm_dqn.errors import RunError, UserError, did_you_mean
from llm_dqn.tables import SUFFIXES, Row, read_table

Found = tuple[str, Row | UserError]  # where a row is, and the row or why there is none
Read = tuple[Found, int]  # and how much of the source has been read

_LOOKED_AT = 100  # rows whose columns are taken for those of all
_PARQUET_ROWS = 512


class RowStream:
    """The rows of a JSONL, CSV or Parquet file (or any source of `read_table`, held in memory), in order.

    Gives (place, row), or (place, `UserError`) for a row that is broken, and can be gone through once. Raises
    `UserError` for a source that cannot be read at all or has no rows.

    name: of the source, for messages. columns: names found in its first rows. total: its size, in bytes or rows, None
    where unknown; `done`: how much of that has been read.
    """

    def __init__(self, source: Any) -> None:
        self.name, self.total, rows = _open(source)
        self.done = 0
        head = list(islice(rows, _LOOKED_AT))
        if not head:
            raise UserError(f"{self.name} has no rows")
        good = [row for (_, row), _ in head if not isinstance(row, UserError)]
        self.columns = list(dict.fromkeys(column for row in good for column in row))
        if not good:
            (_, first), _ = head[0]
            raise UserError(f"{self.name} has no row that can be read; the first: {first}")
        self._rows = chain(head, rows)

    def __iter__(self) -> Iterator[Found]:
        for found, done in self._rows:
            self.done = done
            yield found

    def require(self, *columns: str) -> None:
        """`UserError` unless one of `columns` exists."""
        if not set(columns) & set(self.columns):
            names = "' or '".join(columns)
            raise UserError(
                f"{self.name} has no column '{names}'{did_you_mean(columns[0], self.columns)} "
                f"(columns: {', '.join(map(str, self.columns))})"
            )


def _open(source: Any) -> tuple[str, int | None, Iterator[Read]]:
    """Name, size and rows of a source."""
    if not isinstance(source, str | Path):
        return _from_memory(source)
    path, name = Path(source).expanduser(), str(source)
    readers = {".jsonl": _jsonl, ".csv": _csv}
    if path.suffix.lower() in readers and path.is_file():
        return name, path.stat().st_size, readers[path.suffix.lower()](path, name)
    if path.suffix.lower() == ".parquet" and path.is_file():
        return _parquet(path, name)
    if path.suffix.lower() not in SUFFIXES and path.is_file():
        raise UserError(f"'{name}' ends in '{path.suffix}'; known are {', '.join(SUFFIXES)}")
    table = read_table(source)
    return name, len(table.rows), _counted(name, table.rows)


def _from_memory(source: Any) -> tuple[str, int | None, Iterator[Read]]:
    name = f"the given {type(source).__name__}"
    if isinstance(source, dict) or not isinstance(source, Iterable):
        raise UserError(f"{name} holds no rows; give a file, a Dataset or an iterable of dicts")
    return name, len(source) if isinstance(source, Sized) else None, _counted(name, source)


def _counted(name: str, rows: Iterable[Any]) -> Iterator[Read]:
    for number, row in enumerate(rows, start=1):
        place = f"{name}, row {number}"
        yield (place, _checked(place, row)), number


def _checked(place: str, row: Any) -> Row | UserError:
    if isinstance(row, dict):
        return row
    return UserError(f"{place}: expected an object with named fields, got {row!r:.60}")


def _jsonl(path: Path, name: str) -> Iterator[Read]:
    done = 0
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            done += len(raw)
            place = f"{name}, line {number}"
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                row = _checked(place, json.loads(text))
            except UnicodeDecodeError as error:
                row = UserError(f"{place}: not UTF-8 text ({error.reason} at byte {error.start + 1})")
            except json.JSONDecodeError as error:
                row = UserError(f"{place}: not valid JSON ({error.msg} at column {error.colno})")
            except RecursionError:
                row = UserError(f"{place}: not valid JSON (nested too deeply)")
            yield (place, row), done


def _csv(path: Path, name: str) -> Iterator[Read]:
    with path.open("rb") as raw:
        lines = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.DictReader(lines, strict=True)
        try:
            columns = reader.fieldnames or []
        except csv.Error as error:
            raise UserError(f"'{name}', line 1: not valid CSV ({error})") from error
        while True:
            row: Row | UserError | None
            first = reader.reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                last = reader.reader.line_num
                lines_read = f"line {first}" if last <= first else f"lines {first} to {last}"
                row = UserError(f"{name}, {lines_read}: not valid CSV ({error})")
            if row is None:
                return
            place = f"{name}, line {first}"
            if isinstance(row, dict):
                row = _whole(place, row, len(columns))
            yield (place, row), raw.tell()


def _whole(place: str, row: Row, fields: int) -> Row | UserError:
    """A CSV row with as many fields as the header, all of them UTF-8."""
    if None in row or None in row.values():
        return UserError(
            f"{place}: the row does not have {fields} fields like the header; put text with commas or quotes in double "
            "quotes"
        )
    try:
        "".join(row.values()).encode()
    except UnicodeEncodeError:
        return UserError(f"{place}: not UTF-8 text")
    return row


def _parquet(path: Path, name: str) -> tuple[str, int, Iterator[Read]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"'{name}' is not a readable parquet file ({str(error).splitlines()[0]:.200})") from error

    def rows() -> Iterator[Any]:
        try:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            # Unlike a broken line, a broken page leaves nothing to go on from.
            raise RunError(f"'{name}' is damaged and cannot be read to its end ({error!s:.200})") from error
        finally:
            file.close()

    return name, file.metadata.num_rows, _counted(name, rows())
