"""The charts of a report, from the lines of a run folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from llm_dqn import calibration, pages
from llm_dqn.calibration import Predictions
from llm_dqn.charts import Axis, Series, histogram, line_chart, ticks
from llm_dqn.run_files import RunFiles

Rows = Sequence[Mapping[str, Any]]
MAX_POINTS = 300  # of one line; longer ones are averaged in groups
WIDE, NARROW = (1040, 380), (400, 320)

# (title, explanation, unit, [(label, metric)], lowest value of the axis)
LEARNING: tuple[tuple[str, str, str, tuple[tuple[str, str], ...], float | None], ...] = (
    ("TD loss", "squared error of Q against its target", "reward squared", (("TD loss", "train/td_loss"),), 0.0),
    (
        "Q of the tokens taken",
        "said, and should have said",
        "reward",
        (("Q", "train/q_taken"), ("target", "train/td_target")),
        None,
    ),
    ("Largest |Q|", "of any token learned from", "reward", (("largest |Q|", "train/q_max"),), 0.0),
    ("Distance from the base", "KL of the policy, on replayed texts", "nats a token", (("KL", "train/kl"),), 0.0),
    ("Exploration", "share of it in what is written", "epsilon", (("epsilon", "rollout/epsilon"),), 0.0),
    ("Length", "of what the behaviour policy writes", "tokens", (("length", "rollout/length"),), 0.0),
    ("Age of the replay", "since sampled episodes were written", "learner steps", (("age", "replay/age"),), 0.0),
    ("Episodes remembered", "in the replay buffer", "episodes", (("episodes", "replay/episodes"),), 0.0),
    ("Gradient norm", "before clipping", "", (("norm", "train/grad_norm"),), 0.0),
    ("Size of advantages", "how decisive single tokens are", "reward", (("|A|", "train/advantage"),), 0.0),
    ("Speed", "of writing and scoring", "tokens a second", (("tokens", "tokens_per_second"),), 0.0),
)


@dataclass(frozen=True)
class Picture:
    """A chart with its words."""

    title: str
    caption: str
    svg: Markup
    narrow: Markup | None = None  # the same for narrow windows, where it differs


@dataclass(frozen=True)
class Across:
    """What runs along the horizontal axis: a metric divided by `unit`."""

    name: str
    label: str
    metric: str
    unit: float = 1.0

    def of(self, rows: Rows) -> list[float]:
        return [float(row.get(self.metric) or 0) / self.unit for row in rows]


def horizontal_axes(rows: Rows) -> list[Across]:
    """Scored completions, time and learner steps, as far as they move in this run."""
    seconds = max((row.get("seconds") or 0 for row in rows), default=0)
    unit, word = (3600.0, "hours") if seconds > 7200 else (60.0, "minutes") if seconds > 90 else (1.0, "seconds")
    every = [
        Across("completions", "completions scored", "scored_completions"),
        Across("time", word, "seconds", unit),
        Across("steps", "learner steps", "step"),
    ]
    return [across for across in every if len({row.get(across.metric) for row in rows}) > 1] or every[2:]


def reward_charts(run: RunFiles) -> list[tuple[Across, Picture]]:
    """Reward while training and on held-out prompts, against each horizontal axis."""
    drawn = []
    for across in horizontal_axes(run.metrics):
        series = [
            _series("while training", "rollout/reward", run.metrics, across),
            _series("held out, sampled", "eval/reward", run.metrics, across, dots=True),
            _series("held out, greedy", "eval/reward_greedy", run.metrics, across, dots=True),
        ]
        base = run.evaluation.get("base") or {}
        if base.get("reward") is not None and run.metrics:
            xs = series[0].x or across.of(run.metrics)
            low, high = base.get("reward_ci") or (None, None)
            level, lows, highs = ([value] * len(xs) for value in (base["reward"], low, high))
            series.append(Series("base model", xs, level, lows, highs, kind=4))
        sizes = (
            Markup(line_chart(series, f"Reward against {across.label}", Axis(across.label), Axis("reward"), size))
            for size in (WIDE, NARROW)
        )
        drawn.append((across, Picture("", "", *sizes)))
    return drawn


def learning_charts(run: RunFiles) -> list[Picture]:
    """All other curves that the run has, and one for the reward functions where there are several."""
    across = horizontal_axes(run.metrics)[0]
    parts = sorted({name for row in run.metrics for name in row if name.startswith("rollout/reward/")})
    every = list(LEARNING)
    if parts:
        named = tuple((pages.clean(name.removeprefix("rollout/reward/")), name) for name in parts[:5])
        every.insert(0, ("Reward by function", "while training, before weights", "reward", named, None))
    pictures = []
    for title, caption, unit, lines, low in every:
        series = [_series(label, metric, run.metrics, across) for label, metric in lines]
        series = [one for one in series if one.x]
        if series:
            svg = line_chart(series, title, Axis(across.label), Axis(unit, low))
            pictures.append(Picture(title, caption, Markup(svg)))
    return pictures


def distribution(run: RunFiles) -> Picture | None:
    """How the rewards of the held-out completions are spread, before and after."""
    samples = [
        (name, [line["reward"] for line in lines if line.get("reward") is not None])
        for name, lines in (("tuned model", run.tuned), ("base model", run.base))
    ]
    if not all(values for _, values in samples):
        return None
    svg = histogram(samples, "Rewards before and after", Axis("reward"), (440, 300), kinds=(0, 4))
    return Picture("Distribution of the reward", "of sampled held-out completions", Markup(svg))


def strength(run: RunFiles) -> list[Picture]:
    """Reward and KL of policies between the base model and beyond the tuned one."""
    measured = run.evaluation.get("strength") or []
    points = [point for point in measured if point.get("reward") is not None and point.get("kl") is not None]
    if len(points) < 2:
        return []
    scales = [point["beta_scale"] for point in points]
    intervals = [point.get("reward_ci") or (None, None) for point in points]
    rewards = [point["reward"] for point in points]
    reward = Series("reward", scales, rewards, [low for low, _ in intervals], [high for _, high in intervals])
    kl = Series("KL", scales, [point["kl"] for point in points])
    bought = sorted((point["kl"], got) for point, got in zip(points, rewards, strict=True))
    frontier = Series("reward", [distance for distance, _ in bought], [got for _, got in bought], dots=True)
    across = Axis("strength (0 is the base model, 1 the tuned one)")
    drawn = [
        (
            "Reward by strength",
            "with its 95 % interval",
            line_chart([reward], "Reward by strength", across, Axis("reward")),
        ),
        (
            "Distance by strength",
            "KL from the base",
            line_chart([kl], "KL by strength", across, Axis("nats a token", 0)),
        ),
        (
            "What distance buys",
            "each point is a strength",
            line_chart([frontier], "Reward by KL", Axis("KL from the base, nats a token"), Axis("reward")),
        ),
    ]
    return [Picture(title, caption, Markup(svg)) for title, caption, svg in drawn]


def calibration_charts(found: Predictions) -> list[Picture]:
    """Whether V means what it says, and from where in a completion on."""
    reliable = []
    for name, part in calibration.by_third(found):
        points = calibration.reliability(part)
        predicted, realised = [p for p, _, _ in points], [r for _, r, _ in points]
        bounds = [interval or (None, None) for _, _, interval in points]
        reliable.append(Series(name, predicted, realised, [b[0] for b in bounds], [b[1] for b in bounds], dots=True))
    everything = [v for s in reliable for part in (s.x, s.y, s.low or (), s.high or ()) for v in part if v is not None]
    fifths = [(i, part) for i, part in enumerate(calibration.by_fifth(found)) if len(part)]
    middles = [100 * (i + 0.5) / calibration.FIFTHS for i, _ in fifths]
    errors = [
        Series("error of V", middles, [part.error for _, part in fifths]),
        Series("always saying the mean", middles, [part.blind_error for _, part in fifths]),
    ]
    along = [
        Series("V", middles, [float(part.predicted.mean()) for _, part in fifths]),
        Series("what came", middles, [float(part.realised.mean()) for _, part in fifths]),
    ]
    ends = ticks(min(everything), max(everything), 5) if everything else [0.0, 1.0]
    place = Axis("place in the completion, %", 0, 100)
    drawn = [
        (
            "Promise and outcome",
            "on the dotted line V is right",
            line_chart(
                reliable,
                "Reliability of V",
                Axis("V", ends[0], ends[-1]),
                Axis("what came", ends[0], ends[-1]),
                (400, 320),
                diagonal=True,
            ),
        ),
        (
            "How far V is off",
            "root mean square; the lower, the more it knows",
            line_chart(errors, "Error of V along the completion", place, Axis("reward", 0), (400, 320)),
        ),
        (
            "Too high or too low",
            "mean of V and of what came",
            line_chart(along, "V and outcome along the completion", place, Axis("reward"), (400, 320)),
        ),
    ]
    return [Picture(title, caption, Markup(svg)) for title, caption, svg in drawn]


def _series(label: str, metric: str, rows: Rows, across: Across, dots: bool = False) -> Series:
    """A metric's values where it has one, at most `MAX_POINTS` of them."""
    there = [row for row in rows if row.get(metric) is not None]
    x, y = across.of(there), [float(row[metric]) for row in there]
    if len(x) > MAX_POINTS:
        x, y = ([float(part.mean()) for part in np.array_split(np.array(values), MAX_POINTS)] for values in (x, y))
    return Series(label, x, y, dots=dots)
