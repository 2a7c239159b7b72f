"""`llm-dqn score`: given completions, however many, with their rewards and the value of every token."""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from llm_dqn import models
from llm_dqn.assembly import FROM_PYTHON, rewards_of
from llm_dqn.console import Console
from llm_dqn.errors import RunError, UserError
from llm_dqn.inference import open_run
from llm_dqn.opening import locate
from llm_dqn.recipe import Recipe, resolve_path
from llm_dqn.rewards import Rewards, load_reward
from llm_dqn.row_stream import RowStream
from llm_dqn.score_rows import IDS, Given, Judge, RowReader, score_given
from llm_dqn.scoring import Line

logger = logging.getLogger(__name__)

# A window is read, sorted by length, scored and written before the next is read: memory does not grow with the file.
WINDOW_ROWS, WINDOW_TOKENS = 2048, 2**17
_READ_TOGETHER = 256  # rows tokenised at a time

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Summary:
    """What came of scoring a file."""

    scored: int
    left_out: int
    mean_reward: float | None  # over completions that have one


def score(
    run: str | os.PathLike[str],
    rows: Any,
    *,
    rewards: Sequence[Any] | None = None,
    batch_size: int = 64,
    top: int = 3,
    strict: bool = False,
) -> Iterator[Line]:
    """Rewards and per-token Q, V and advantage of given completions; lines come in the order of the rows.

    run: a run folder, an adapter folder, a Hub adapter or a plain model.
    rows: a JSONL, CSV or Parquet file, a `Dataset`, or any iterable of dicts with `prompt` and `completion` (text or
    messages). `token_ids` (or `completion_ids`) are scored exactly as given; else text is tokenised and, unless `ended`
    is "length", followed by the end-of-sequence token. Other columns go to the reward functions.
    rewards: functions or names as in a recipe; None takes those of the run folder, [] none (`reward` is then None).
    batch_size: completions in one pass of the model. top: alternatives listed for each token.
    strict: raise `UserError` at the first row that cannot be scored; else it is logged as a warning and left out.

    A line holds `prompt, completion, reward, rewards {name: value}` and, one entry a completion token, `token_ids,
    tokens, q_values, values, advantages, ranks, base_ranks, alternatives`. Q = V + beta (log pi - log pi_ref) for the
    `lm` head. Where no heads were saved (`q_head.safetensors`), V is 0 and Q equals the advantage.

    Raises `UserError` for input that cannot be used, before the model is loaded where possible.
    """
    source = resolve_path(os.fspath(rows)) if isinstance(rows, str | os.PathLike) else rows
    scorer = Scorer(os.fspath(run), RowStream(source), rewards, batch_size, top, strict, logger.warning)
    return scorer.lines()


class Scorer:
    """Opens what is needed and scores a stream of rows, window by window."""

    def __init__(
        self,
        run: str,
        rows: RowStream,
        rewards: Sequence[Any] | None,
        batch_size: int,
        top: int,
        strict: bool,
        tell: Tell,
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("top", top, 0)):
            if value < least:
                raise UserError(f"{name}: {value} must be at least {least}")
        self.rows, self.top, self.strict, self.tell = rows, top, strict, tell
        self.scored = self.left_out = 0
        recipe = locate(run).recipe
        column = recipe.data.prompt_column if recipe else "prompt"
        rows.require(column)
        rows.require("completion", *IDS)
        self.columns = [name for name in rows.columns if name not in (column, "completion", *IDS)]
        self.rewards = self._rewards(run, recipe, rewards)
        if self.rewards is not None:
            self.rewards.check_columns(self.columns)
        self.judge = Judge(self.rewards, batch_size)
        self.opened = open_run(run, batch_size=batch_size)
        if not self.opened.knows_values:
            self._say_what_is_missing()
        with self.opened.writer.network.roles.acting_as("reference") as plain:
            context = models.context_length(plain.config)
        length = recipe.rollout.max_completion_length if recipe else None
        self.reader = RowReader(self.opened.writer, column, context, length)

    def _rewards(self, run: str, recipe: Recipe | None, specs: Sequence[Any] | None) -> Rewards | None:
        if specs is not None:
            resolved = [resolve_path(spec) if isinstance(spec, str) else spec for spec in specs]
            return Rewards([load_reward(spec, [Path.cwd()]) for spec in resolved]) if specs else None
        if recipe is not None and recipe.data.train != FROM_PYTHON:
            return rewards_of(recipe)
        why = "was trained from Python with rewards that cannot be found again" if recipe else "is no run folder"
        self.tell(f"{run} {why}: the reward of every completion is null; give --rewards to have one")
        return None

    def _say_what_is_missing(self) -> None:
        name = self.opened.name
        if self.opened.writer.network.is_base:
            self.tell(f"{name} is a plain model, so nothing was learned: Q, V and advantages are 0")
            return
        unit = "beta times log-ratios to the base" if self.opened.recipe else "log-ratios to the base in nats (beta 1)"
        self.tell(f"{name} has no q_head.safetensors: V is 0, and Q and advantages are {unit}")

    def lines(self, advance: Callable[[float], None] = lambda amount: None) -> Iterator[Line]:
        """Score lines in the order of the rows; `advance` is told of progress in units of `rows.total`."""
        try:
            done = 0
            for window in self._windows():
                share = (self.rows.done - done) / len(window)
                done = self.rows.done
                yield from self._scored(window, lambda count, share=share: advance(share * count))  # type: ignore[misc]
                window.clear()  # before the next is read
        finally:
            if self.rewards is not None:
                self.rewards.close()
        if not self.scored:
            raise UserError(f"{self.rows.name}: none of its {self.left_out} rows could be scored")

    def _windows(self) -> Iterator[list[Given]]:
        """Rows that are ready, as many as fit in memory together. Broken ones are told."""
        window: list[Given] = []
        tokens = 0
        for given in self._ready():
            window.append(given)
            tokens += len(given.prompt_ids) + len(given.completion_ids)
            if len(window) >= WINDOW_ROWS or tokens >= WINDOW_TOKENS:
                yield window
                window, tokens = [], 0
        if window:
            yield window

    def _ready(self) -> Iterator[Given]:
        rows = iter(self.rows)
        while part := list(islice(rows, _READ_TOGETHER)):
            filled = [(place, self._filled(row) if isinstance(row, dict) else row) for place, row in part]
            yield from self._sound(self.reader.read(filled))

    def _filled(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row with every column that rewards were promised."""
        return {**dict.fromkeys(self.columns), **row}

    def _scored(self, window: list[Given], progress: Callable[[int], None]) -> Iterator[Line]:
        for line in self._sound(score_given(self.opened.writer, self.judge, window, self.top, progress)):
            self.scored += 1
            yield line

    def _sound(self, found: Iterable[Any]) -> Iterator[Any]:
        """What is no `UserError`; such are told and counted, or raised when strict."""
        for one in found:
            if not isinstance(one, UserError):
                yield one
            elif self.strict:
                raise one
            else:
                self.left_out += 1
                self.tell(f"left out: {one}")


def score_file(scorer: Scorer, output: str, html: str | None = None, max_html: int = 50) -> Summary:
    """Writes score lines as JSON lines, and draws the first `max_html` of them as a heat map.

    Lines are appended to `OUTPUT.partial`, which gets its name when all are written, and stays when scoring ends early.
    """
    drawn: list[Line] = []
    total, judged = 0.0, 0
    encode = json.JSONEncoder(ensure_ascii=False).encode
    bar = Console(stderr=True).bar("scoring", scorer.rows.total)
    with _appended(Path(output), scorer.tell) as stream, bar as advance:
        for line in scorer.lines(advance):
            stream.write(encode(line) + "\n")
            if line["reward"] is not None:
                total, judged = total + line["reward"], judged + 1
            if html is not None and len(drawn) < max_html:
                drawn.append(line)
    if html is not None:
        from llm_dqn import heatmap

        title = f"{Path(output).name}: {scorer.rows.name} scored by {scorer.opened.name}"
        Path(html).write_text(heatmap.page(drawn, title), encoding="utf-8")
    return Summary(scorer.scored, scorer.left_out, total / judged if judged else None)


def check_output(option: str, path: str, source: str) -> None:
    """`UserError`, before any work, for a file that could not be written after it, or that is being read."""
    file = Path(path)
    if file.is_dir():
        raise UserError(f"{option} {path}: is a folder; name a file")
    if not file.absolute().parent.is_dir():
        raise UserError(f"{option} {path}: the folder {file.parent} does not exist")
    if file.exists() and Path(source).exists() and file.samefile(source):
        raise UserError(f"{option} {path}: is the input itself; name another file")


@contextmanager
def _appended(file: Path, tell: Tell) -> Iterator[TextIO]:
    """A file that has its name once it is whole. A device or pipe is written as it is."""
    special = file.exists() and not file.is_file()
    partial = file if special else file.with_name(file.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            yield stream
        if not special:
            os.replace(partial, file)
    except OSError as error:
        raise RunError(f"{partial} could not be written: {error}") from error
    finally:
        if not special and partial.exists():
            if partial.stat().st_size:
                tell(f"{partial} keeps the lines that were finished")
            else:
                partial.unlink()
