"""Charts as SVG text: lines with interval bands, reliability marks and histograms. Standard library only.

Series differ by dash pattern as well as by colour (Okabe and Ito 2008, safe for the colour-blind), so a chart reads in
greyscale. Text stays text. Each chart carries its numbers as data attributes, which a page may show on hover; no script
is needed to see it. Colours come from `STYLE`, which `standalone` puts into the SVG itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

STYLE = """
.chart{--ink:#1f2328;--soft:#59636e;--rule:#dfe3e8;--c0:#0072b2;--c1:#d55e00;--c2:#007a5a;--c3:#a3497e;--c4:#59636e}
@media (prefers-color-scheme:dark){.chart{--ink:#e6e9ed;--soft:#a3adb8;--rule:#343b43;--c0:#56b4e9;--c1:#e69f00;
--c2:#3cc79f;--c3:#e08dbd;--c4:#a3adb8}}
.chart{display:block;width:100%;height:auto;font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
.chart text{fill:var(--soft)}.chart .name{fill:var(--ink)}
.chart .rule{stroke:var(--rule);stroke-width:1;fill:none}.chart .axis{stroke:var(--soft);stroke-width:1}
.chart .guide{stroke:var(--soft);stroke-width:1;stroke-dasharray:1 4;stroke-linecap:round}
.chart .line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.chart .band{stroke:none;fill-opacity:.16}.chart .bar{stroke-width:1.25}
.chart .s0{stroke:var(--c0);fill:var(--c0)}.chart .s1{stroke:var(--c1);fill:var(--c1);stroke-dasharray:6 4}
.chart .s2{stroke:var(--c2);fill:var(--c2);stroke-dasharray:2 4}
.chart .s3{stroke:var(--c3);fill:var(--c3);stroke-dasharray:9 3 2 3}
.chart .s4{stroke:var(--c4);fill:var(--c4);stroke-dasharray:1 5}
.chart .dot{stroke-dasharray:none}.chart .line{fill:none}.chart .band{stroke:none}
@media print{.chart{--ink:#000;--soft:#333;--rule:#ccc;--c0:#0072b2;--c1:#d55e00;--c2:#007a5a;--c3:#a3497e;--c4:#555}}
"""
KINDS = 5  # series that can be told apart
LETTER = 6.3  # width of a character of 12 px, generous
LABELLED_AT_THE_LINE = 560  # charts at least this wide name each line at its end, others in a row above


@dataclass(frozen=True)
class Series:
    """One line. `low` and `high` bound its interval; None or a number that is not finite is a gap. `x` is finite.

    dots: marks at the points, with interval bars instead of a band. kind: which of the five looks; by order otherwise.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    dots: bool = False
    kind: int | None = None


@dataclass(frozen=True)
class Axis:
    """What an axis shows, with its unit, and its ends where they are not to follow from the data."""

    label: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class _Frame:
    """Where data lies in the picture: pixels of the plot's edges and the data's values there."""

    left: float
    top: float
    right: float
    bottom: float
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = self.x, self.y
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)


def line_chart(
    series: Sequence[Series],
    title: str,
    x: Axis,
    y: Axis,
    size: tuple[int, int] = (400, 250),
    diagonal: bool = False,
    standalone: bool = False,
) -> str:
    """An SVG of the series over one pair of axes; without any finite point it says that there is nothing to show.

    title: what a screen reader says first. size: width and height in pixels, scaled to the place it stands in.
    diagonal: draws y = x. standalone: with its own style, to be kept as a file.
    """
    kept = [(i if s.kind is None else s.kind, s) for i, s in enumerate(series) if any(map(_finite, s.y))]
    if not kept:
        return _empty(title, size, standalone)
    heights = [v for _, s in kept for part in (s.y, s.low, s.high) for v in part or () if v is not None and _finite(v)]
    x_ticks, x_range = _scale([a for _, s in kept for a in s.x], x, 5, snug=True)
    y_ticks, y_range = _scale(heights, y, 5)
    names, left, top, right = _labels(kept, y_ticks, size[0])
    frame = _Frame(left, top, size[0] - right, size[1] - 36, x_range, y_range)
    body = [_grid(frame, x_ticks, y_ticks, x.label, y.label), names]
    if diagonal:
        ends = max(x_range[0], y_range[0]), min(x_range[1], y_range[1])
        (x0, y0), (x1, y1) = frame.at(ends[0], ends[0]), frame.at(ends[1], ends[1])
        body.append(f'<path class="guide" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"/>')
    body += [_drawn(s, kind % KINDS, frame) for kind, s in kept]
    if size[0] >= LABELLED_AT_THE_LINE and len(kept) > 1:
        body.append(_names_at_lines(kept, frame))
    return _svg(title, _summary(kept), size, body, frame, standalone, x.label)


def histogram(
    samples: Sequence[tuple[str, Sequence[float]]],
    title: str,
    x: Axis,
    size: tuple[int, int] = (400, 250),
    bins: int = 20,
    kinds: Sequence[int] | None = None,
    standalone: bool = False,
) -> str:
    """The share of values in each of equal bins, one outline a sample: `samples` are (label, values).

    Without ends of the axis the bins lie between round numbers. kinds: which of the five looks each sample has.
    """
    clean = [(label, [value for value in values if _finite(value)]) for label, values in samples]
    everything = [value for _, values in clean for value in values]
    if not everything:
        return _empty(title, size, standalone)
    marks = ticks(min(everything), max(everything), 5)
    low, high = marks[0] if x.low is None else x.low, marks[-1] if x.high is None else x.high
    width = (high - low) / bins
    edges = [low + i * width for i in range(bins + 1)]
    kept = []
    for i, (label, values) in enumerate(clean):
        counts = [0] * bins
        for value in values:
            counts[min(max(int((value - low) / width), 0), bins - 1)] += 1
        shares = [100 * count / max(len(values), 1) for count in counts]
        kept.append((kinds[i] if kinds else i, Series(label, [(a + b) / 2 for a, b in pairwise(edges)], shares)))
    x_ticks, x_range = _scale(edges, Axis(x.label, low, high), 5, snug=True)
    y_ticks, y_range = _scale([0.0, *(share for _, s in kept for share in s.y if share is not None)], Axis(""), 4)
    names, left, top, _ = _labels(kept, y_ticks, min(size[0], LABELLED_AT_THE_LINE - 1))
    frame = _Frame(left, top, size[0] - 12, size[1] - 36, x_range, y_range)
    body = [_grid(frame, x_ticks, y_ticks, x.label, "% of completions"), names]
    body += [_steps(s, kind % KINDS, edges, frame) for kind, s in kept]
    return _svg(title, _summary(kept), size, body, frame, standalone, x.label)


def sparkline(values: Sequence[float], end: float | None, title: str, size: tuple[int, int] = (132, 28)) -> str:
    """A line without axes, as wide as a word or two; `end` is marked by a dot at its right."""
    heights = [value for value in (*values, end) if _finite(value) and value is not None]
    if not heights:
        return ""
    low, high = min(heights), max(heights)
    if low == high:
        low, high = low - 0.5, high + 0.5
    frame = _Frame(3, 4, size[0] - 5, size[1] - 4, (0, max(len(values), 1)), (low, high))
    stride = len(values) // size[0] + 1  # more than a point a pixel cannot be seen
    run = [frame.at(i, values[i]) for i in range(0, len(values), stride) if _finite(values[i])]
    parts = ['<path class="line s0" d="M' + "L".join(f"{x:.1f} {y:.1f}" for x, y in run) + '"/>'] if run else []
    if end is not None and _finite(end):
        x, y = frame.at(frame.x[1], end)
        parts.append(f'<circle class="dot s1" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    said = f"{len(run)} values, lowest {min(heights):.3g}, highest {max(heights):.3g}."
    return _svg(title, said, size, parts, None, False).replace('class="chart"', 'class="chart spark"')


# --- scales ---------------------------------------------------------------------------------------------------------


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) from the last at or below `low` to the first at or above
    `high`.
    """
    span = high - low if high > low else abs(low) or 1.0
    raw = span / max(about, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _scale(values: Sequence[float], axis: Axis, about: int, snug: bool = False) -> tuple[list[float], tuple]:
    """Ticks and the range they stand in; `snug` ranges end with the data, others at a tick."""
    low = min(values) if axis.low is None else axis.low
    high = max(values) if axis.high is None else axis.high
    if high <= low:
        low, high = (low - 0.5, low + 0.5) if low == 0 else (low - abs(low) * 0.1, low + abs(low) * 0.1)
    marks = ticks(low, high, about)
    if not snug:
        low = marks[0] if axis.low is None else low
        high = marks[-1] if axis.high is None else high
    slack = (high - low) * 1e-6
    return [mark for mark in marks if low - slack <= mark <= high + slack], (low, high)


def tick_text(value: float, step: float) -> str:
    """A tick's number with as many decimals as its neighbours need."""
    value = value or 0.0  # no minus before a zero
    if value and (abs(value) >= 1e6 or abs(step) < 1e-4):
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    else:
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        if not math.isclose(round(step, decimals), step, rel_tol=1e-6):  # 2.5, 0.25
            decimals += 1
        text = f"{value:,.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


# --- drawing --------------------------------------------------------------------------------------------------------


def _labels(
    kept: Sequence[tuple[int, Series]], y_ticks: Sequence[float], width: int
) -> tuple[str, float, float, float]:
    """A row of names when lines are not named at their ends; then the margins left, top and right."""
    step = y_ticks[1] - y_ticks[0] if len(y_ticks) > 1 else 1.0
    left = 10 + LETTER * max((len(tick_text(tick, step)) for tick in y_ticks), default=1)
    if len(kept) < 2:
        return "", left, 24, 12
    if width >= LABELLED_AT_THE_LINE:
        return "", left, 24, 46 + LETTER * max(len(s.label) for _, s in kept)
    parts, across, row = [], 4.0, 0
    for kind, s in kept:
        wide = 30 + LETTER * len(s.label)
        if across > 4 and across + wide > width - 4:
            across, row = 4.0, row + 1
        y = 10 + 17 * row
        parts.append(_swatch(across, y, kind % KINDS, s))
        across += wide + 14
    return "".join(parts), left, 44 + 17 * row, 12


def _swatch(x: float, y: float, kind: int, s: Series) -> str:
    mark = f'<path class="line s{kind}" d="M{x:.0f} {y}h22"/>'
    if s.dots:
        mark += f'<circle class="dot s{kind}" cx="{x + 11:.0f}" cy="{y}" r="3"/>'
    return f'{mark}<text class="name" x="{x + 28:.0f}" y="{y + 4}">{escape(s.label)}</text>'


def _names_at_lines(kept: Sequence[tuple[int, Series]], frame: _Frame) -> str:
    """Each name beside the end of its line, pushed apart where they would touch."""
    ends = []
    for kind, s in kept:
        last = next(y for y in reversed(s.y) if y is not None and _finite(y))
        ends.append((frame.at(frame.x[1], last)[1], kind, s))
    ends.sort(key=lambda end: end[0])
    places: list[float] = []
    for y, _, _ in ends:
        places.append(max(y, places[-1] + 17) if places else max(y, frame.top))
    over = max(0.0, places[-1] - frame.bottom)
    return "".join(
        _swatch(frame.right + 14, round(y - over), kind % KINDS, s)
        for y, (_, kind, s) in zip(places, ends, strict=True)
    )


def _grid(frame: _Frame, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, y_label: str) -> str:
    parts = []
    for marks, across in ((y_ticks, False), (x_ticks, True)):
        step = marks[1] - marks[0] if len(marks) > 1 else 10.0 ** math.floor(math.log10(abs(marks[0]) or 1))
        for mark in marks:
            if across:
                x, _ = frame.at(mark, frame.y[0])
                parts.append(f'<path class="axis" d="M{x:.1f} {frame.bottom:.1f}v4"/>')
                place = f'x="{x:.1f}" y="{frame.bottom + 16:.1f}" text-anchor="middle"'
            else:
                _, y = frame.at(frame.x[0], mark)
                parts.append(f'<path class="rule" d="M{frame.left:.1f} {y:.1f}H{frame.right:.1f}"/>')
                place = f'x="{frame.left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end"'
            parts.append(f"<text {place}>{tick_text(mark, step)}</text>")
    parts.append(f'<path class="axis" d="M{frame.left:.1f} {frame.bottom:.1f}H{frame.right:.1f}"/>')
    middle = (frame.left + frame.right) / 2
    parts.append(f'<text x="{middle:.0f}" y="{frame.bottom + 32:.0f}" text-anchor="middle">{escape(x_label)}</text>')
    if y_label:
        parts.append(f'<text x="4" y="{frame.top - 10:.0f}">{escape(y_label)}</text>')
    return "".join(parts)


def _drawn(s: Series, kind: int, frame: _Frame) -> str:
    """One series: its band or interval bars below its line or marks."""
    parts = []
    if s.low is not None and s.high is not None:
        spans = [(a, lo, hi) for a, lo, hi in zip(s.x, s.low, s.high, strict=True) if _finite(lo) and _finite(hi)]
        lower = [frame.at(a, lo) for a, lo, _ in spans if lo is not None]
        upper = [frame.at(a, hi) for a, _, hi in spans if hi is not None]
        if s.dots:
            bars = "".join(f"M{a:.1f} {b:.1f}V{d:.1f}" for (a, b), (_, d) in zip(lower, upper, strict=True))
            parts.append(f'<path class="dot line s{kind}" d="{bars}"/>')
        elif len(spans) > 1:
            outline = "L".join(f"{a:.1f} {b:.1f}" for a, b in [*upper, *reversed(lower)])
            parts.append(f'<path class="band s{kind}" d="M{outline}Z"/>')
    runs: list[list[tuple[float, float]]] = [[]]
    for a, b in zip(s.x, s.y, strict=True):
        if b is not None and _finite(a) and _finite(b):
            runs[-1].append(frame.at(a, b))
        elif runs[-1]:
            runs.append([])
    path = "".join("M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in run) for run in runs if len(run) > 1)
    if path:
        parts.append(f'<path class="line s{kind}" d="{path}"/>')
    marked = [point for run in runs for point in run if s.dots or len(run) == 1]
    parts += [f'<circle class="dot s{kind}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in marked]
    return _group(s, kind, parts)


def _steps(s: Series, kind: int, edges: Sequence[float], frame: _Frame) -> str:
    """The outline of a histogram, lightly filled."""
    outline, above = "", False
    for (left, right), share in zip(pairwise(edges), s.y, strict=True):
        (x0, y0), (x1, _) = frame.at(left, share or 0), frame.at(right, 0)
        if share:
            outline += f"{'' if above else f'M{x0:.1f} {frame.bottom:.1f}'}V{y0:.1f}H{x1:.1f}"
        elif above:
            outline += f"V{frame.bottom:.1f}"
        above = bool(share)
    outline += f"V{frame.bottom:.1f}" if above else ""
    half = (edges[1] - edges[0]) / 2
    parts = [f'<path class="band s{kind}" d="{outline}"/>', f'<path class="line bar s{kind}" d="{outline}"/>']
    return _group(s, kind, parts, f' data-half="{half:.4g}"')


def _group(s: Series, kind: int, parts: Sequence[str], extra: str = "") -> str:
    numbers = {"x": s.x, "y": s.y, "low": s.low, "high": s.high}
    data = "".join(
        f' data-{name}="{" ".join(f"{v:.5g}" if v is not None and _finite(v) else "-" for v in values)}"'
        for name, values in numbers.items()
        if values is not None
    )
    label = escape(s.label)
    return f'<g class="series" data-kind="{kind}" data-label="{label}"{data}{extra}>{"".join(parts)}</g>'


def _summary(kept: Sequence[tuple[int, Series]]) -> str:
    """What the chart says to those who cannot see it."""
    sentences = []
    for _, s in kept:
        finite = [y for y in s.y if y is not None and _finite(y)]
        sentences.append(
            f"{s.label}: {len(finite)} points from {finite[0]:.3g} to {finite[-1]:.3g}, "
            f"lowest {min(finite):.3g}, highest {max(finite):.3g}."
        )
    return " ".join(sentences)


def _svg(
    title: str,
    summary: str,
    size: tuple[int, int],
    body: Sequence[str],
    frame: _Frame | None,
    standalone: bool,
    x_label: str = "",
) -> str:
    plot = ""
    if frame is not None:
        edges = (frame.left, frame.top, frame.right, frame.bottom, *frame.x, *frame.y)
        plot = f' data-plot="{" ".join(f"{edge:.6g}" for edge in edges)}" data-across="{escape(x_label)}"'
    style = f"<style>{STYLE}</style>" if standalone else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {size[0]} {size[1]}" role="img"{plot}>'
        f"<title>{escape(title)}</title><desc>{escape(summary)}</desc>{style}{''.join(body)}</svg>"
    )


def _empty(title: str, size: tuple[int, int], standalone: bool) -> str:
    middle = f'<text x="{size[0] / 2:.0f}" y="{size[1] / 2:.0f}" text-anchor="middle">nothing measured yet</text>'
    return _svg(title, "Nothing measured yet.", size, [middle], None, standalone)
