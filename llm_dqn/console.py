"""What people see of a run: a live panel in a terminal, plain lines anywhere else, and a table at the end.

Text written by a model is never trusted with the terminal: control characters and rich's own markup are shown, not
obeyed.
"""

import math
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from llm_dqn.terminal import any_script, harmless, one_line

# (metric, label, format), in the order of a reading eye
SHOWN = (
    ("rollout/reward", "reward", ".3f"),
    ("eval/reward", "held-out reward", ".3f"),
    ("train/td_loss", "TD loss", ".4f"),
    ("train/q_taken", "Q", ".3f"),
    ("train/kl", "KL, nats a token", ".3f"),
    ("rollout/epsilon", "epsilon", ".2f"),
    ("rollout/length", "length, tokens", ".1f"),
    ("replay/episodes", "episodes remembered", ",.0f"),
    ("scored_completions", "completions scored", ",.0f"),
    ("tokens_per_second", "tokens a second", ",.0f"),
)
COMPARED = (
    ("reward", "reward, sampled (95 %)", ".3f"),
    ("reward_greedy", "reward, greedy", ".3f"),
    ("kl", "KL from base, nats/token", ".3f"),
    ("perplexity", "perplexity under the base", ".1f"),
    ("length", "length, tokens", ".1f"),
    ("distinct_1", "distinct tokens", ".3f"),
    ("distinct_2", "distinct pairs of tokens", ".3f"),
    ("bleu", "BLEU, sampled", ".1f"),
    ("bleu_greedy", "BLEU, greedy", ".1f"),
    ("wer", "word error rate, sampled", ".3f"),
    ("wer_greedy", "word error rate, greedy", ".3f"),
)


class Screen(RichConsole):
    """A terminal that obeys rich alone: whatever text is drawn, its own control characters are spelled out."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Segments of text made harmless; rich's own control codes pass."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(harmless(text), style)


class Console:
    """Shows a run. With `enabled` false (every process but the main one) it is silent."""

    def __init__(self, enabled: bool = True, console: RichConsole | None = None, stderr: bool = False) -> None:
        any_script()
        self.enabled = enabled
        self.rich = console or Screen(highlight=False, stderr=stderr)
        self.animated = enabled and self.rich.is_terminal and not self.rich.is_dumb_terminal and "CI" not in os.environ
        self._metrics: dict[str, Any] = {}
        self._sample: tuple[str, str, float] | None = None
        self._total_steps = 0
        self._live: Live | None = None
        self._progress: Progress | None = None

    def say(self, message: str) -> None:
        """One line, above the panel when there is one."""
        if self.enabled:
            self.rich.print(Text(message), soft_wrap=True)

    @contextmanager
    def live(self, total_steps: int) -> Iterator["Console"]:
        """Shows progress while the context is open."""
        self._total_steps = total_steps
        if not self.animated:
            yield self
            return
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("gone,"),
            TimeRemainingColumn(),
            TextColumn("to go"),
            console=self.rich,
            expand=True,
        )
        self._progress.add_task("", total=total_steps)
        with Live(get_renderable=self._panel, console=self.rich, refresh_per_second=4) as self._live:
            try:
                yield self
            finally:
                self._live.refresh()
                self._live = None

    @contextmanager
    def bar(self, label: str, total: float | None) -> Iterator[Callable[[float], None]]:
        """A bar while the context is open; what it yields moves the bar on by so much of `total` (None: unknown)."""
        if not self.animated:
            yield lambda amount: None
            return
        columns = (TextColumn(label), BarColumn(bar_width=None), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.rich, transient=True, expand=True) as progress:
            task = progress.add_task("", total=total)
            yield lambda amount: progress.update(task, advance=amount)

    def sample(self, prompt: Any, completion: str, reward: float) -> None:
        """The completion that the panel shows until the next one; `prompt` is text or chat messages."""
        self._sample = (_last_message(prompt), completion, reward)

    def progress(self, step: int) -> None:
        """How far the run is."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)

    def update(self, metrics: Mapping[str, Any]) -> None:
        """New values by their names in `metrics.jsonl`; names that are absent keep their last value."""
        if not self.enabled:
            return
        fresh = {name: value for name, value in metrics.items() if value is not None}
        self._metrics |= fresh
        if not self.animated:
            facts = [f"{label.split(',')[0]} {form(fresh[name], spec)}" for name, label, spec in SHOWN if name in fresh]
            step = f"step {fresh.get('step', '?')}" + (f"/{self._total_steps}" if self._total_steps else "")
            self.say("  ".join([step, *facts]))

    def _panel(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2), expand=True)
        for _ in range(4):
            grid.add_column()
        cells = [
            Text.assemble((f"{label}  ", "dim"), (form(self._metrics[name], spec), "bold"))
            for name, label, spec in SHOWN
            if name in self._metrics
        ]
        for start in range(0, len(cells), 4):
            grid.add_row(*cells[start : start + 4])
        parts: list[RenderableType] = [grid] if cells else [Text("the first completions are being written ...", "dim")]
        if self._sample is not None:
            prompt, completion, reward = self._sample
            text = Text.assemble(
                (one_line(prompt)[-200:], "dim"), " ", one_line(completion).strip()[:400], (f"  {reward:.3f}", "bold")
            )
            parts += [Text(""), text]
        if self._progress is not None:
            parts += [Text(""), self._progress]
        return Panel(Group(*parts), title="llm-dqn", border_style="cyan")

    def final_table(
        self,
        base: Mapping[str, Any],
        tuned: Mapping[str, Any],
        win_rate: float | None = None,
        samples: Sequence[Mapping[str, Any]] = (),
        win_rate_ci: Sequence[float] | None = None,
    ) -> None:
        """Before and after. `base` and `tuned` hold what `evaluation.json` does; each of `samples` has `prompt`,
        `base`, `base_reward`, `tuned`, `tuned_reward`.
        """
        if not self.enabled:
            return
        prompts = f"{tuned['prompts']} " if "prompts" in tuned else ""
        table = Table(
            title=f"before and after, on {prompts}held-out prompts", box=box.SIMPLE_HEAD, title_justify="left"
        )
        for name, justify in (("", "left"), ("base model", "right"), ("tuned", "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        for name, label, spec in COMPARED:
            if name in base or name in tuned:
                table.add_row(label, _with_interval(base, name, spec), _with_interval(tuned, name, spec))
        if win_rate is not None:
            wins = {"win_rate": win_rate, "win_rate_ci": win_rate_ci}
            table.add_row("tuned wins, ties half", "", _with_interval(wins, "win_rate", ".0%"))
        self.rich.print(table)
        if samples:
            self.rich.print(self._side_by_side(samples))

    def evaluation(self, report: Mapping[str, Any], samples: Sequence[Mapping[str, Any]] = ()) -> None:
        """Everything in `evaluation.json`: the table, each seed's reward, the strength curve, what there is to say."""
        ci = report.get("win_rate_ci")
        self.final_table(report["base"], report["tuned"], report["win_rate"], samples, win_rate_ci=ci)
        for number, seed in enumerate(report["seeds"] if "reward_by_seed" in report["base"] else ()):
            means = [form(report[side]["reward_by_seed"][number], ".3f") for side in ("base", "tuned")]
            self.say(f"  seed {seed}: reward {means[0]} before, {means[1]} after")
        if "strength" in report and self.enabled:
            self.rich.print(_strength_table(report["strength"]))
        for note in report.get("notes", ()):
            self.say(f"note: {note}")

    def episodes(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """One line an episode of a replay buffer, as of `replay_export.rows`; facts that are all alike are left out.

        Texts are cropped to the width: of a prompt the end is shown, of a completion the start.
        """
        varied = [name for name in ("process", "source", "ended") if len({row[name] for row in rows}) > 1]
        measured = ["td_error"] if any(row["td_error"] is not None for row in rows) else []
        table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False, padding=(0, 1, 0, 0))
        for name in ("slot", "reward", *measured, "age", *varied, "tokens"):
            table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
        table.add_column("prompt", ratio=2, no_wrap=True)
        table.add_column("completion", ratio=3, no_wrap=True, overflow="ellipsis")
        for row in rows:
            facts = [str(row["slot"]), form(row["reward"], ".3f"), *(form(row[name], ".3g") for name in measured)]
            facts += [str(row["age"]), *(str(row[name]) for name in varied), str(len(row["completion_ids"]))]
            table.add_row(*facts, _End(one_line(row["prompt"])), Text(one_line(row["completion"]).strip()))
        self.rich.print(table)

    def _side_by_side(self, samples: Sequence[Mapping[str, Any]]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_lines=True, expand=True)
        for name in ("prompt", "base model writes", "tuned model writes"):
            table.add_column(name, ratio=1, overflow="fold")
        for sample in samples:
            written = [
                Text.assemble(one_line(sample[who]).strip(), (f"  {form(sample[f'{who}_reward'], '.3f')}", "bold"))
                for who in ("base", "tuned")
            ]
            table.add_row(Text(one_line(sample["prompt"]).strip()), *written)
        return table

    def where(self, folder: str | os.PathLike[str]) -> None:
        """Where everything lies, and what to type next."""
        run, typed = Path(folder), shlex.quote(os.fspath(folder))
        files = (
            ("adapter", "the tuned model, as an ordinary PEFT adapter"),
            ("model", "the tuned model"),
            ("report.html", "all of this to look at, in a browser"),
            ("metrics.jsonl", "a line of numbers a log step"),
            ("samples.jsonl", "what was written, and its reward"),
            ("evaluation.json", "the table above"),
            ("evaluation_samples.jsonl", "its texts, token by token"),
            ("recipe.yaml", "every setting of this run"),
        )
        lines = [f"  {run / name!s:<40} {what}" for name, what in files if (run / name).exists()]
        self.say("\n".join(["Everything is in", *lines]))
        self.say(
            "Next:\n"
            f"  llm-dqn generate {typed} --prompts FILE --output FILE    let it write\n"
            f"  llm-dqn evaluate {typed}    measure it again"
        )


class _End:
    """A line of text of which the end is shown where there is no room for all of it."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> Iterator[Text]:
        cut, room = 0, options.max_width
        if cell_len(self.text) > room:
            widths = [cell_len(character) for character in self.text]
            left = sum(widths)
            while left > room - 1 and cut < len(widths):
                left -= widths[cut]
                cut += 1
        yield Text("…" * bool(cut) + self.text[cut:], no_wrap=True, overflow="crop")


def _strength_table(points: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="how far to follow what was learned", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("--beta-scale", "reward (95 %)", "KL from base, nats/token"):
        table.add_column(name, justify="right")
    for point in points:
        named = {0.0: "0, the base", 1.0: "1, as tuned"}.get(point["beta_scale"], f"{point['beta_scale']:g}")
        table.add_row(named, _with_interval(point, "reward", ".3f"), form(point["kl"], ".3f"))
    return table


def form(value: Any, spec: str) -> str:
    """A number as people read it; a dash where there is none."""
    return "-" if value is None or (isinstance(value, float) and not math.isfinite(value)) else format(value, spec)


def _with_interval(figures: Mapping[str, Any], name: str, spec: str) -> str:
    text, interval = form(figures.get(name), spec), figures.get(f"{name}_ci")
    return f"{text} ({form(interval[0], spec)} to {form(interval[1], spec)})" if interval else text


def _last_message(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
