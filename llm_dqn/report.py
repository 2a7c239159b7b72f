"""A run in one HTML file: what changed, how sure that is, what it was bought with, and where to look.

Made from the files of the run folder alone, whatever of them exists, so also while a run is going on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from llm_dqn import calibration, heatmap, pages, warning_signs
from llm_dqn import report_charts as pictures
from llm_dqn.calibration import Predictions
from llm_dqn.run_files import RunFiles, read_run
from llm_dqn.statistics import bootstrap_interval
from llm_dqn.warning_signs import Sign, numbered

Line = Mapping[str, Any]
MAX_SAMPLE = 700  # characters of a completion beside others
MAX_HEAT_TOKENS = 4_000  # over all heat maps of a report, which keeps it below 2 MB
LEVELS = {"fine": "✓ fine", "look": "◐ look", "alarm": "▲ alarm", "unknown": "– unknown"}

# (key in evaluation.json, name, decimals)
COMPARED = (
    ("reward", "reward, sampled", 3),
    ("reward_greedy", "reward, greedy", 3),
    ("kl", "KL from the base, nats a token", 3),
    ("perplexity", "perplexity under the base", 2),
    ("length", "length, tokens", 1),
    ("distinct_1", "distinct tokens", 3),
    ("distinct_2", "distinct pairs of tokens", 3),
    ("bleu", "BLEU", 1),
    ("wer", "word error rate", 3),
)


UNDER_WAY = (
    ("Reward while training", "rollout/reward", ".3f"),
    ("TD loss", "train/td_loss", ".4f"),
    ("KL from the base", "train/kl", ".3f"),
)


@dataclass(frozen=True)
class Figure:
    """A number that stands out, what to know about it, and what it was before."""

    name: str
    value: str
    note: str
    was: str = ""


def write_report(folder: Path) -> Path:
    """Writes `report.html` into a run folder; nothing but files is read, and no model loaded.

    Raises UserError where there is no run folder, RunError where the file cannot be written.
    """
    run = read_run(folder)
    return pages.write(Path(folder) / "report.html", draw(run))


def draw(run: RunFiles) -> str:
    """The page of a run."""
    found = _predictions(run)
    signs = _signs(run, found)
    maps = _heat_maps(run.base, run.tuned)
    scale = heatmap.Scale.of([line for _, line in maps])
    return pages.render(
        "report.html.j2",
        title=f"{run.name} · llm_dqn report",
        run=run,
        about=_about(run),
        headline=_headline(run),
        sure=_how_sure(run),
        verdict=warning_signs.overall(signs),
        signs=[(LEVELS[sign.level], sign) for sign in signs],
        figures=_key_figures(run),
        rewards=pictures.reward_charts(run) if run.metrics else [],
        drawn=_what_was_drawn(run),
        distribution=pictures.distribution(run),
        counts=_wins(run),
        compared=_compared(run.evaluation),
        strength=pictures.strength(run),
        groups=_groups(run),
        learning_samples=_while_learning(run.samples),
        legends=heatmap.legends(scale) if maps else [],
        maps=[
            (what, [Markup(heatmap.fragment(line, scale)) for _, line in group])
            for what, group in groupby(maps, key=lambda found: found[0])
        ],
        calibration=pictures.calibration_charts(found) if len(found) else [],
        known=_what_v_knows(found, _soft(run)),
        learning=pictures.learning_charts(run) if run.metrics else [],
    )


# --- in words -------------------------------------------------------------------------------------------------------


def _about(run: RunFiles) -> list[str]:
    """One line under the title."""
    last = run.metrics[-1] if run.metrics else {}
    steps, model = run.setting("train", "max_steps"), run.setting("model", "model_name_or_path")
    seconds = last.get("seconds") or 0
    facts = [
        (Path(str(model)).name if Path(str(model)).is_absolute() else str(model)) if model else "",
        f"learner step {last['step']:,}" + (f" of {steps:,}" if steps else "") if last else "",
        f"{last['scored_completions']:,} completions scored" if last.get("scored_completions") else "",
        f"{seconds / 3600:.1f} hours" if seconds > 7200 else f"{seconds / 60:.1f} minutes" if seconds else "",
        f"seed {run.setting('train', 'seed')}" if run.recipe else "",
    ]
    return [pages.clean(fact) for fact in facts if fact]


def _headline(run: RunFiles) -> str:
    before, after = _reward(run, "base"), _reward(run, "tuned")
    if before is None or after is None:
        latest = [row["eval/reward"] for row in run.metrics if row.get("eval/reward") is not None]
        if latest:
            return f"Not finished: the latest held-out reward is {_number(latest[-1], 3)}."
        return "Not finished, and not yet measured on held-out prompts."
    low, high = _gain(run)[1]
    if low <= 0 <= high:
        return f"No sure change: reward {_number(before, 3)} before, {_number(after, 3)} after."
    way = "rose" if after > before else "fell"
    return f"The reward {way} from {_number(before, 3)} to {_number(after, 3)}."


def _how_sure(run: RunFiles) -> str:
    if _reward(run, "base") is None or _reward(run, "tuned") is None:
        return "Base and tuned model are compared when training ends. Until then this page shows what there is."
    gain, (low, high) = _gain(run)
    prompts = run.evaluation["tuned"].get("prompts")
    where = f"On {prompts:,} prompts that it was not trained on" if prompts else "On held-out prompts"
    text = f"{where}, the tuned model scores {gain:+.3f} (95 % interval {low:+.3f} to {high:+.3f})".replace("-", "−")
    wins = run.evaluation.get("win_rate")
    if wins is not None:
        text += f", and its completion beats the base model's on {wins:.0%} of them, ties counting half"
    return text + "."


def _reward(run: RunFiles, side: str) -> float | None:
    return (run.evaluation.get(side) or {}).get("reward")


def _gain(run: RunFiles) -> tuple[float, tuple[float, float]]:
    """Tuned minus base and its 95 % interval: over prompts where there are pairs, else from the two intervals."""
    base, tuned = run.evaluation["base"], run.evaluation["tuned"]
    gain = tuned["reward"] - base["reward"]
    pairs = _scored_pairs(run)
    if pairs:
        change = np.array([t["reward"] - b["reward"] for b, t in pairs])
        interval = bootstrap_interval(change, numbered([str(t["prompt"]) for _, t in pairs]))
        if interval is not None:
            return gain, (interval[0], interval[1])
    (b_low, b_high), (t_low, t_high) = (side.get("reward_ci") or [side["reward"]] * 2 for side in (base, tuned))
    half = np.hypot((b_high - b_low) / 2, (t_high - t_low) / 2)  # of a difference of two independent means
    return gain, (float(gain - half), float(gain + half))


def _key_figures(run: RunFiles) -> list[Figure]:
    """The few numbers that stand out; those of the latest line of metrics while nothing is evaluated."""
    base, tuned = run.evaluation.get("base") or {}, run.evaluation.get("tuned") or {}
    last = run.metrics[-1] if run.metrics else {}
    figures = []
    for key, name in (("reward", "Reward, sampled"), ("reward_greedy", "Reward, greedy")):
        if base.get(key) is not None and tuned.get(key) is not None:
            interval = tuned.get(f"{key}_ci")
            note = "95 % interval " + _interval(interval, 3) if interval else "the likeliest token always"
            figures.append(Figure(name, _number(tuned[key], 3), note, _number(base[key], 3)))
    if run.evaluation.get("win_rate") is not None:
        figures.append(Figure("Wins against the base", f"{run.evaluation['win_rate']:.0%}", "ties count half"))
    if tuned.get("kl") is not None:
        whole = f", {tuned['kl'] * tuned['length']:.1f} a completion" if tuned.get("length") else ""
        figures.append(Figure("KL from the base", f"{tuned['kl']:.2f}", f"nats a token{whole}"))
    if not figures:
        known = [(name, key, form) for name, key, form in UNDER_WAY if last.get(key) is not None]
        figures = [Figure(name, format(last[key], form), f"at step {last['step']:,}") for name, key, form in known]
    if last.get("scored_completions"):
        figures.append(
            Figure("Completions scored", f"{last['scored_completions']:,}", "calls of the reward in training")
        )
    return figures


def _compared(evaluation: Line) -> list[tuple[str, list[tuple[str, str]]]]:
    """Rows of the whole table: a name, then (number, interval) of base and tuned."""
    rows = []
    for key, name, digits in COMPARED:
        sides = [evaluation.get(side) or {} for side in ("base", "tuned")]
        if any(side.get(key) is not None for side in sides):
            cells = [(_number(side.get(key), digits), _interval(side.get(f"{key}_ci"), digits)) for side in sides]
            rows.append((name, cells))
    return rows


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def _interval(interval: Sequence[float] | None, digits: int) -> str:
    return " to ".join(_number(end, digits) for end in interval) if interval else ""


def _wins(run: RunFiles) -> str:
    pairs = _scored_pairs(run)
    if not pairs:
        return ""
    changes = [t["reward"] - b["reward"] for b, t in pairs]
    better, worse = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    equal = len(pairs) - better - worse
    count = f"{better:,} of {len(pairs):,} pairs"
    return f"The tuned completion is better in {count}, worse in {worse:,} and equal in {equal:,}."


def _what_was_drawn(run: RunFiles) -> str:
    """Why the points of a curve and the final figures differ."""
    few, many = run.setting("train", "eval_prompts"), (run.evaluation.get("tuned") or {}).get("prompts")
    if few is None or many is None or few >= many:
        return ""
    return f"While training, held-out points are measured on {few:,} prompts; the final figures on {many:,}."


# --- signs and values -----------------------------------------------------------------------------------------------


def _soft(run: RunFiles) -> bool:
    """Whether V is a soft value, which carries the price of leaving the base."""
    return run.setting("dqn", "backup", "soft") == "soft"


def _predictions(run: RunFiles) -> Predictions:
    return calibration.predictions(run.tuned, _soft(run), run.setting("dqn", "gamma", 1.0))


def _signs(run: RunFiles, found: Predictions) -> list[Sign]:
    every = [
        warning_signs.held_out(run.metrics, run.evaluation),
        warning_signs.distance(run.evaluation),
        warning_signs.length(run.base, run.tuned, run.evaluation),
        warning_signs.repetition(run.base, run.tuned),
        warning_signs.sameness(run.base, run.tuned, run.evaluation),
        warning_signs.belief(run.metrics, [*run.base, *run.tuned, *run.samples], found.bias if len(found) else None),
        warning_signs.parts(run.base, run.tuned),
    ]
    return [sign for sign in every if sign is not None]


def _what_v_knows(found: Predictions, soft: bool) -> str:
    """The calibration in a sentence or two."""
    fifths = [part for part in calibration.by_fifth(found) if len(part)] if len(found) else []
    if not fifths:
        return ""
    first, last = fifths[0], fifths[-1]
    what = "the reward" + (" less the price of leaving the base from there on" if soft else "")
    return (
        f"In the first fifth of a completion V is off by {first.error:.3f}, where always saying the mean would be off "
        f"by {first.blind_error:.3f}; in the last fifth by {last.error:.3f}, against {last.blind_error:.3f}. "
        f"On average it is {abs(found.bias):.3f} too {'high' if found.bias > 0 else 'low'}. "
        f"Measured on {len(found):,} tokens of held-out completions; what came is {what}."
    )


# --- samples --------------------------------------------------------------------------------------------------------


def _scored_pairs(run: RunFiles) -> list[tuple[Line, Line]]:
    pairs = zip(run.base, run.tuned, strict=True)
    return [(b, t) for b, t in pairs if b.get("reward") is not None and t.get("reward") is not None]


def _groups(run: RunFiles) -> list[dict[str, Any]]:
    """Pairs of samples under a heading each; no pair comes twice."""
    pairs = _scored_pairs(run)
    by_reward = sorted(range(len(pairs)), key=lambda i: (pairs[i][1]["reward"], i))
    by_change = sorted(range(len(pairs)), key=lambda i: (pairs[i][1]["reward"] - pairs[i][0]["reward"], i))
    lost = [i for i in by_change if pairs[i][1]["reward"] < pairs[i][0]["reward"]]
    wanted = (
        ("First of the list", "Not picked: the first held-out prompts in their order.", range(len(pairs)), 4),
        ("Best", "The highest rewards of the tuned model.", by_reward[::-1], 3),
        ("Worst", "The lowest rewards of the tuned model.", by_reward, 3),
        ("Lost most", "Where the base model's completion scored higher by most.", lost, 3),
    )
    shown: set[int] = set()
    groups = []
    for title, caption, order, count in wanted:
        kept = [i for i in order if i not in shown][:count]
        shown.update(kept)
        if kept:
            groups.append({"title": title, "caption": caption, "pairs": [_pair(*pairs[i]) for i in kept]})
    return groups


def _pair(base: Line, tuned: Line) -> dict[str, str]:
    written = {
        f"{side}{name}": value
        for side, line in (("base", base), ("tuned", tuned))
        for name, value in (("", _sample(line["completion"])), ("_reward", f"{line['reward']:.3f}"))
    }
    return {"prompt": heatmap.prompt_text(tuned["prompt"]), **written}


def _sample(text: str) -> str:
    text = pages.clean(text).strip()
    return text if len(text) <= MAX_SAMPLE else text[:MAX_SAMPLE] + " …"


def _while_learning(samples: Sequence[Line], count: int = 6) -> list[dict[str, str]]:
    """One sample each at evenly spaced moments, the first of its collection."""
    firsts: dict[int, Line] = {}
    for sample in samples:
        if {"step", "prompt", "completion"} <= sample.keys():
            firsts.setdefault(sample["step"], sample)
    steps = sorted(firsts)
    chosen = [steps[round(i)] for i in np.linspace(0, len(steps) - 1, min(count, len(steps)))] if steps else []
    return [
        {
            "step": f"{step:,}",
            "prompt": heatmap.prompt_text(firsts[step]["prompt"]),
            "completion": _sample(firsts[step]["completion"]),
            "reward": "–" if firsts[step].get("reward") is None else f"{firsts[step]['reward']:.3f}",
        }
        for step in chosen
    ]


def _heat_maps(base: Sequence[Line], tuned: Sequence[Line]) -> list[tuple[str, Line]]:
    """The telling ones: best, worst and deepest falls, each once, as many as `MAX_HEAT_TOKENS` lets in."""
    by_reward = sorted((line for line in tuned if line.get("reward") is not None), key=lambda line: line["reward"])
    wanted = [
        *(("Best of the tuned model", line) for line in by_reward[::-1][:2]),
        *(("Worst of the tuned model", line) for line in by_reward[:2]),
        *(("Deepest falls in the tuned model's texts", line) for line in _deepest(tuned)[:2]),
        *(("Deepest falls in the base model's texts", line) for line in _deepest(base)[:2]),
    ]
    kept: list[tuple[str, Line]] = []
    tokens = 0
    for what, line in wanted:
        tokens += min(len(line["tokens"]), heatmap.MAX_TOKENS_A_TEXT)
        if all(line is not other for _, other in kept) and (not kept or tokens <= MAX_HEAT_TOKENS):
            kept.append((what, line))
    return kept


def _deepest(lines: Sequence[Line]) -> list[Line]:
    """Lines with a fall of the value, the deepest first."""
    falls = [(heatmap.largest_drop(heatmap.cells_of(line)), i) for i, line in enumerate(lines)]
    deep = sorted((drop.change or 0.0, i) for drop, i in falls if drop is not None)
    return [lines[i] for _, i in deep]
