"""Charts are drawn where the numbers say, and say what they draw to those who cannot see them."""

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from llm_dqn.charts import Axis, Series, histogram, line_chart, tick_text, ticks

SVG = "{http://www.w3.org/2000/svg}"


def drawn(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def path_points(svg: str, kind: int) -> list[list[tuple[float, float]]]:
    """Each unbroken run of a series' line in pixels."""
    for path in drawn(svg).iter(f"{SVG}path"):
        if path.get("class") == f"line s{kind}" and "h22" not in path.get("d", ""):
            runs = [run for run in path.get("d", "").split("M") if run]
            return [[tuple(map(float, point.split())) for point in run.split("L")] for run in runs]
    return []


def frame(svg: str) -> list[float]:
    return [float(edge) for edge in drawn(svg).get("data-plot", "").split()]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (64, 1536, [0, 500, 1000, 1500, 2000]),
        (0.36, 0.93, [0.2, 0.4, 0.6, 0.8, 1.0]),
        (-3, 7, [-4, -2, 0, 2, 4, 6, 8]),
        (0.011, 0.028, [0.01, 0.015, 0.02, 0.025, 0.03]),
    ],
)
def test_ticks_are_round_and_enclose(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 5) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [
        (0.2, 0.2, "0.2"),
        (1536, 500, "1,536"),
        (-0.5, 0.5, "−0.5"),
        (0.025, 0.005, "0.025"),
        (0.25, 0.25, "0.25"),
        (0.0, 0.2, "0.0"),
        (-0.0, 0.2, "0.0"),
        (2e7, 1e7, "2e7"),
        (2.5, 2.5, "2.5"),
        (3e-6, 1e-6, "3e−6"),
    ],
)
def test_tick_texts(value: float, step: float, text: str) -> None:
    assert tick_text(value, step) == text


def test_points_lie_where_the_numbers_say() -> None:
    svg = line_chart([Series("a", [0, 5, 10], [0, 1, 0.5])], "t", Axis("x"), Axis("y", 0, 1))
    left, top, right, bottom, *ranges = frame(svg)
    assert ranges == [0, 10, 0, 1]
    (run,) = path_points(svg, 0)
    middle = (left + right) / 2
    assert run == [
        pytest.approx(place, abs=0.06) for place in ((left, bottom), (middle, top), (right, (top + bottom) / 2))
    ]


def test_a_gap_is_a_gap_and_a_lonely_point_a_dot() -> None:
    svg = line_chart([Series("a", range(6), [0, 1, None, 2, math.nan, 3])], "t", Axis("x"), Axis("y"))
    assert [len(run) for run in path_points(svg, 0)] == [2]
    assert len(list(drawn(svg).iter(f"{SVG}circle"))) == 2
    (group,) = (g for g in drawn(svg).iter(f"{SVG}g") if g.get("class") == "series")
    assert group.get("data-y") == "0 1 - 2 - 3"


def test_everything_stays_inside_the_plot() -> None:
    """Intervals widen the axis, also where the line itself has a gap."""
    series = [
        Series("a", [1, 2, 3, 4], [1, None, 3, None], low=[0, 0, 2, 2], high=[2, 2, 9, 9]),
        Series("b", [2, 3], [-1, 4], low=[-5, 3], high=[0, 5], dots=True),
    ]
    svg = line_chart(series, "t", Axis("x"), Axis("y"))
    left, top, right, bottom, *_ = frame(svg)
    for path in drawn(svg).iter(f"{SVG}path"):
        if re.search(r"\bs\d", path.get("class", "")) and "h22" not in path.get("d", ""):
            for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path.get("d", "")):
                assert left - 0.1 <= float(x) <= right + 0.1 and top - 0.1 <= float(y) <= bottom + 0.1


def test_series_differ_without_colour_too() -> None:
    """Five looks, five dash patterns, whatever the colours."""
    style = line_chart([Series("a", [0, 1], [0, 1])], "t", Axis("x"), Axis("y"), standalone=True)
    dashes = [re.search(rf"\.chart \.s{i}{{[^}}]*?(stroke-dasharray:[^;}}]*)?}}", style).group(1) for i in range(5)]  # type: ignore[union-attr]
    assert len(set(dashes)) == 5


def test_names_at_the_lines_do_not_touch() -> None:
    series = [Series(f"name {i}", [0, 1], [0, 0.5 + i / 1000]) for i in range(4)]
    svg = line_chart(series, "t", Axis("x"), Axis("y", 0, 0.51), size=(900, 300))
    rows = sorted(float(t.get("y", 0)) for t in drawn(svg).iter(f"{SVG}text") if t.get("class") == "name")
    assert len(rows) == 4 and all(b - a >= 16 for a, b in pairwise(rows))


def test_a_chart_says_what_it_shows_and_escapes_it() -> None:
    svg = line_chart([Series("<b>&", [0, 1], [0.5, 2])], "a <script> & more", Axis('"x"'), Axis("<y>"))
    root = drawn(svg)
    assert root.findtext(f"{SVG}title") == "a <script> & more"
    assert root.findtext(f"{SVG}desc") == "<b>&: 2 points from 0.5 to 2, lowest 0.5, highest 2."
    assert root.get("role") == "img" and "<script>" not in svg


def test_nothing_measured_is_said() -> None:
    for svg in (
        line_chart([], "t", Axis("x"), Axis("y")),
        line_chart([Series("a", [1], [None])], "t", Axis("x"), Axis("y")),
        histogram([("a", [])], "t", Axis("x")),
    ):
        assert "nothing measured yet" in "".join(drawn(svg).itertext())


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [-2.0], [1e9, 1e9]])
def test_constant_values_still_have_an_axis(values: list[float]) -> None:
    svg = line_chart([Series("a", list(range(len(values))), values)], "t", Axis("x"), Axis("y"))
    _, top, _, bottom, x0, x1, y0, y1 = frame(svg)
    assert x0 < x1 and y0 < values[0] < y1
    assert top < bottom


def test_histograms_count_shares_and_keep_the_last_edge() -> None:
    svg = histogram([("base", [0.0, 0.1, 0.6, 1.0]), ("tuned", [1.0])], "t", Axis("reward", 0, 1), bins=2)
    groups = [g for g in drawn(svg).iter(f"{SVG}g") if g.get("class") == "series"]
    assert [g.get("data-y") for g in groups] == ["50 50", "0 100"]
    assert groups[0].get("data-x") == "0.25 0.75" and groups[0].get("data-half") == "0.25"


def test_a_file_of_its_own_is_coloured_and_asks_for_nothing() -> None:
    alone = line_chart([Series("a", [0, 1], [0, 1])], "t", Axis("x"), Axis("y"), standalone=True)
    assert "prefers-color-scheme:dark" in alone and "url(" not in alone
    assert re.findall(r"https?://[^\"]*", alone) == ["http://www.w3.org/2000/svg"]
