"""Where in a text the value changed: completions with every token coloured by what it was worth.

Positive is blue with a solid line below, negative orange with a wavy one, and both lines grow with the number, so that
it reads without colour too. Draws score lines, the JSON objects of `llm-dqn score`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from llm_dqn import charts, pages

LEVELS = 4  # shades of each sign
MAX_TOKENS = 60_000  # on one page
MAX_TOKENS_A_TEXT = 1_500
MAX_PROMPT = 500  # characters, from the end
MEANINGS = {
    "advantage": "Advantage Q(s, a) − V(s): how much better the token was than what the value expected, in reward.",
    "change": "Change in value V(after) − V(before): how the expected reward moved with the token.",
}


@dataclass(frozen=True)
class Scale:
    """The numbers that get the strongest colour, one for each way of colouring, in units of the reward."""

    advantage: float
    change: float

    @classmethod
    def of(cls, lines: Sequence[Mapping[str, Any]]) -> "Scale":
        """One scale for all lines: a round number that all but 2 % of the tokens stay below."""
        cells = [cell for line in lines for cell in cells_of(line)]
        return cls(_round_limit([c.advantage for c in cells]), _round_limit([c.change for c in cells]))


@dataclass(frozen=True)
class Cell:
    """What is drawn as one: a token, or all tokens that share a character (the earlier ones have no text)."""

    text: str
    first: int  # of the line's tokens
    last: int
    advantage: float | None  # summed over its tokens
    change: float | None  # V after the last minus V before the first; the reward stands for V after the end
    ends: bool  # the end-of-sequence token


def fragment(line: Mapping[str, Any], scale: Scale | None = None) -> str:
    """The HTML of one score line, for a page of `pages.render`. `scale`: that of the page, the line's own if None."""
    heat = pages.environment().get_template("heat.html.j2").module.heat  # type: ignore[attr-defined]
    return str(heat(_drawing(line, scale or Scale.of([line]))))


def page(lines: Sequence[Mapping[str, Any]], title: str) -> str:
    """A whole HTML file of score lines. Beyond `MAX_TOKENS` tokens it stops and says so."""
    shown, tokens = 0, 0
    for line in lines:
        tokens += len(line["tokens"])
        if shown and tokens > MAX_TOKENS:
            break
        shown += 1
    kept = lines[:shown]
    scale = Scale.of(kept)
    left_out = f"The first {shown:,} of {len(lines):,} completions; a page of all of them would be slow to open."
    return pages.render(
        "heatmap.html.j2",
        title,
        note=left_out if shown < len(lines) else "" if lines else "There was nothing to score.",
        legends=legends(scale),
        fragments=Markup("\n".join(fragment(line, scale) for line in kept)),
    )


def legends(scale: Scale) -> list[dict[str, Any]]:
    """What the colours mean, for the template's `controls`."""
    drawn = []
    for mode, limit in vars(scale).items():
        steps = [
            {"look": _look(mode, level * limit / LEVELS, limit) + " shown", "number": _step_text(level, limit)}
            for level in range(-LEVELS, LEVELS + 1)
        ]
        drawn.append({"mode": mode, "meaning": MEANINGS[mode], "steps": steps})
    return drawn


# --- what is in a line ----------------------------------------------------------------------------------------------


def cells_of(line: Mapping[str, Any]) -> list[Cell]:
    """The line's tokens, those that share a character put together. At most `MAX_TOKENS_A_TEXT` tokens."""
    tokens = line["tokens"][:MAX_TOKENS_A_TEXT]
    after = [*line["values"][1:], line.get("reward")]
    cells, first = [], 0
    for i, text in enumerate(tokens):
        if text == "" and i + 1 < len(tokens):
            continue
        spent = [a for a in line["advantages"][first : i + 1] if a is not None]
        before = line["values"][first]
        change = None if before is None or after[i] is None else after[i] - before
        cells.append(Cell(text, first, i, math.fsum(spent) if spent else None, change, _ends(line, i)))
        first = i + 1
    return cells


def _ends(line: Mapping[str, Any], i: int) -> bool:
    """Whether token `i` is the last and no part of the text, which only a special token can be."""
    tokens = line["tokens"]
    return i == len(tokens) - 1 and tokens[i] != "" and "".join(tokens[:i]) == line["completion"]


def largest_drop(cells: Sequence[Cell]) -> Cell | None:
    """Where the value fell most from one token to the next; the step to the reward itself is no token's doing."""
    inside = [cell for cell in cells[:-1] if cell.change is not None and cell.change < 0]
    return min(inside, key=lambda cell: cell.change or 0.0, default=None)


def prompt_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt as people read it, its end when it is long; messages get their roles in front."""
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in prompt)
    text = pages.clean(prompt)
    return text if len(text) <= MAX_PROMPT else "… " + text[-MAX_PROMPT:]


# --- how it looks ---------------------------------------------------------------------------------------------------


def _drawing(line: Mapping[str, Any], scale: Scale) -> dict[str, Any]:
    cells = cells_of(line)
    worst = largest_drop(cells)
    drawn = [
        {
            "first": cell.first,
            "last": cell.last,
            "html": _token_html(cell),
            "classes": " ".join(
                ["t", _look("advantage", cell.advantage, scale.advantage), _look("change", cell.change, scale.change)]
                + (["drop"] if cell is worst else [])
                + (["end"] if cell.ends else [])
            ),
        }
        for cell in cells
    ]
    values = [math.nan if value is None else value for value in line["values"][:MAX_TOKENS_A_TEXT]]
    return {
        "prompt": prompt_text(line["prompt"]),
        "side": {"base": "base model", "tuned": "tuned model"}.get(line.get("side", ""), ""),
        "reward": "no reward" if _short(line.get("reward")) is None else f"reward {line['reward']:.3f}",
        "cells": drawn,
        "spark": Markup(charts.sparkline(values, line.get("reward"), "value from the first token to the reward")),
        "summary": _summary(line, worst),
        "data": _data(line),
    }


def _summary(line: Mapping[str, Any], worst: Cell | None) -> Markup:
    count = len(line["tokens"])
    parts: list[str] = [f"{count:,} token{'' if count == 1 else 's'}"]
    if count > MAX_TOKENS_A_TEXT:
        parts[0] += f", the first {MAX_TOKENS_A_TEXT:,} shown"
    if count and _short(line["values"][0]) is not None:
        parts.append(f"the value began at {line['values'][0]:.3f}")
    if worst is not None:
        told = Markup("its largest fall, {}, came with “<bdi>{}</bdi>”")
        parts.append(told.format(signed(worst.change), visible(worst.text)))
    if line.get("ended") == "length":
        parts.append("stopped by the length limit")
    if len(line.get("rewards") or {}) > 1:
        each = (f"{name} {'abstained' if r is None else f'{r:.3f}'}" for name, r in line["rewards"].items())
        parts.append(pages.clean("rewards: " + ", ".join(each)))
    return Markup("; ").join(parts) + "."


def _token_html(cell: Cell) -> Markup:
    """The token's text with its line ends, tabs and bare spaces made visible. Nothing is added to what is copied."""
    text = pages.clean(cell.text)
    if text == "":
        return Markup('<i class="part"></i>')
    if text.strip(" ") == "":
        return Markup('<i class="space">{}</i>').format(text)
    html = escape(text)
    return Markup(
        html.replace("\n", Markup('<i class="line-end"></i>\n')).replace("\t", Markup('<i class="tab"></i>\t'))
    )


def _data(line: Mapping[str, Any]) -> str:
    """What the readout of each token says, as compact JSON that is safe inside a script element."""
    count = min(len(line["tokens"]), MAX_TOKENS_A_TEXT)
    blank: list[None] = [None] * count
    ranks, base_ranks = line.get("ranks") or blank, line.get("base_ranks") or blank
    alternatives = line.get("alternatives") or [()] * count
    rows = [
        [
            visible(line["tokens"][i]),
            *(_short(line[name][i]) for name in ("q_values", "values", "advantages")),
            ranks[i],
            base_ranks[i],
            [
                [visible(a["token"]), *(_short(a.get(name)) for name in ("base_probability", "probability", "q_value"))]
                for a in alternatives[i]
            ],
        ]
        for i in range(count)
    ]
    facts = {"reward": _short(line.get("reward")), "tokens": rows}
    text = json.dumps(facts, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def visible(text: str) -> str:
    """A token's text inside a sentence: bare and leading spaces, line ends and tabs have signs."""
    shown = pages.clean(text).replace("\n", "⏎").replace("\t", "⇥")
    if shown.strip(" ") == "":
        return "␣" * len(shown)
    return "␣" + shown[1:] if shown.startswith(" ") else shown


def signed(value: float | None) -> str:
    """A number with its sign, minus as minus."""
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _look(mode: str, value: float | None, limit: float) -> str:
    """The class of a colour: `a` and `b` are advantages above and below zero, `c` and `d` changes; then the level."""
    if value is None or not math.isfinite(value):
        return ""
    level = min(LEVELS, round(LEVELS * abs(value) / limit))
    above, below = ("a", "b") if mode == "advantage" else ("c", "d")
    return f"{above if value > 0 else below}{level}" if level else ""


def _step_text(level: int, limit: float) -> str:
    number = signed(level * limit / LEVELS) if level else "0"
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return {LEVELS: f"{number} or more", -LEVELS: f"{number} or less"}.get(level, number)


def _round_limit(values: Sequence[float | None]) -> float:
    """The smallest of 1, 2, 4, 5 or 8 times a power of ten that 98 % of the sizes stay below."""
    sizes = np.array([abs(value) for value in values if value is not None and math.isfinite(value)])
    size = float(np.quantile(sizes, 0.98)) if len(sizes) else 0.0
    if size == 0.0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(size))
    return next(factor * power for factor in (1, 2, 4, 5, 8, 10) if factor * power >= size * 0.999)
