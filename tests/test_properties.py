"""Random input: a mutilated recipe is refused line by line, a lying reward function is found out."""

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_dqn.recipe import Recipe, RecipeError, load_recipe, parse_recipe, shipped_recipes
from llm_dqn.rewards import RewardError, Rewards

# --- the recipe loader ------------------------------------------------------------------------------------------------

SHIPPED = {name: path.read_bytes() for name, path in shipped_recipes().items()}
SMALLEST = (
    "model: {model_name_or_path: m}\ndata: {train: d.jsonl}\nreward: {funcs: ['r.py:f']}\ntrain: {output_dir: runs/x}\n"
)
SCRAPS = (
    *(
        b"\x00",
        b"\x1b[31m",
        b"\xff\xfe",
        b"\xe2\x80\xae",
        "\ud7ff\u2028\x85".encode(),
        b"\xef\xbb\xbf",
        b"\r",
        b"\t",
        b"  ",
    ),
    *(b"- ", b": ", b"? ", b"{", b"}", b"[", b"]", b"|", b">", b"'", b'"', b"#", b"%YAML 9.9\n", b"---\n", b"...\n"),
    *(b"&a ", b"*a ", b"<<: *a\n", b"!!python/object/apply:os.system [id]", b"!!int x", b"!!binary x", b"!!float"),
    *(b"~", b"null", b"yes", b".nan", b"-.inf", b"1e999", b"9" * 5000, b"0x", b"1_000", b"2024-01-01", b"12:30:45"),
    *(b"a" * 300, b"[" * 60, b"{a: " * 60, b"-1", b"0", b"3.5", b"[1, 2]", b"{a: 1}", b"text"),
)


def delete_line(lines: list[bytes], at: int, scrap: bytes) -> None:
    del lines[at]


def duplicate_line(lines: list[bytes], at: int, scrap: bytes) -> None:
    lines.insert(at, lines[at])


def swap_lines(lines: list[bytes], at: int, scrap: bytes) -> None:
    lines[at], lines[at - 1] = lines[at - 1], lines[at]


def indent(lines: list[bytes], at: int, scrap: bytes) -> None:
    lines[at] = b" " * (1 + len(scrap) % 4) + lines[at]


def outdent(lines: list[bytes], at: int, scrap: bytes) -> None:
    lines[at] = lines[at].lstrip()


def insert(lines: list[bytes], at: int, scrap: bytes) -> None:
    middle = at * 7 % (len(lines[at]) + 1)
    lines[at] = lines[at][:middle] + scrap + lines[at][middle:]


def replace_value(lines: list[bytes], at: int, scrap: bytes) -> None:
    lines[at] = re.sub(rb"(: *)[^:{\n]*\n", lambda match: match[1] + scrap + b"\n", lines[at], count=1)


def misspell(lines: list[bytes], at: int, scrap: bytes) -> None:
    lines[at] = re.sub(rb"(\w+)\w:", rb"\1:", lines[at], count=1)


def cut_off(lines: list[bytes], at: int, scrap: bytes) -> None:
    del lines[at + 1 :]
    lines[at] = lines[at][: at * 5 % (len(lines[at]) + 1)]


MUTATIONS = (delete_line, duplicate_line, swap_lines, indent, outdent, insert, replace_value, misspell, cut_off)


@st.composite
def mutilated(draw: st.DrawFn) -> bytes:
    """A shipped recipe after one to five accidents."""
    lines = SHIPPED[draw(st.sampled_from(sorted(SHIPPED)))].splitlines(keepends=True)
    for _ in range(draw(st.integers(1, 5))):
        scrap = draw(st.one_of(st.sampled_from(SCRAPS), st.binary(max_size=6), st.text(max_size=6).map(str.encode)))
        draw(st.sampled_from(MUTATIONS))(lines, draw(st.integers(0, len(lines) - 1)), scrap)
        lines = lines or [b"\n"]
    return b"".join(lines)


def test_a_thousand_mutilated_recipes_are_read_or_refused_at_their_lines(tmp_path: Path) -> None:
    file, outcomes = tmp_path / "r.yaml", Counter[str]()

    @settings(max_examples=1000, derandomize=True, deadline=None)
    @given(content=mutilated())
    def read_or_refuse(content: bytes) -> None:
        file.write_bytes(content)
        try:
            assert isinstance(load_recipe(file), Recipe)
            outcomes["read"] += 1
        except RecipeError as error:
            outcomes["refused"] += 1
            assert error.problems
            for problem in error.problems:
                assert problem.source == str(file)
                absent = problem.line is None and problem.message.startswith("missing, and has no default")
                assert absent or 1 <= (problem.line or 0) <= len(content.splitlines()) + 1, str(problem)

    read_or_refuse()
    assert outcomes["read"] >= 50 and outcomes["refused"] >= 500, outcomes


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    key=st.one_of(
        st.sampled_from(["train.seed", "reward.funcs.0", "lora", "model", "a.b", "train..x"]), st.text(max_size=9)
    ),
    value=st.one_of(st.sampled_from([scrap.decode(errors="replace") for scrap in SCRAPS]), st.text(max_size=9)),
)
def test_an_override_is_taken_or_refused_as_it_was_typed(key: str, value: str) -> None:
    override = f"{key}={value}"
    try:
        assert isinstance(parse_recipe(SMALLEST, "x.yaml", [override]), Recipe)
    except RecipeError as error:
        assert error.problems
        assert all(problem.source in (f"override {override}", "x.yaml") for problem in error.problems)


# --- the reward wrapper -----------------------------------------------------------------------------------------------

PROMPTS = ["p one", "p two", "p three"]


class Spiteful:
    """An object that raises whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __repr__(self) -> str:
        raise RuntimeError("repr")

    def __len__(self) -> int:
        raise RuntimeError("len")

    def __float__(self) -> float:
        raise RuntimeError("float")


class FalseLength(list):
    """A list that says it has three entries."""

    def __len__(self) -> int:
        return 3


class Turncoat(float):
    """A number that is finite until it is used."""

    def __float__(self) -> float:
        return math.nan


NUMBERS = st.one_of(st.floats(width=64), st.integers(-(10**400), 10**400), st.booleans())
ROWS = st.one_of(
    st.none(),
    NUMBERS,
    st.text(max_size=3),
    st.binary(max_size=3),
    st.complex_numbers(),
    st.decimals(),
    st.fractions(),
    st.builds(Spiteful),
    st.builds(Turncoat),
    st.builds(np.float32, st.floats(width=32)),
    st.builds(torch.tensor, st.floats(width=32)),
    st.lists(st.integers(), max_size=2),
    st.just(float),
)
LENGTHS = st.sampled_from([3, 3, 3, 3, 0, 1, 2, 4])
RESULTS = st.one_of(
    LENGTHS.flatmap(lambda count: st.lists(ROWS, min_size=count, max_size=count)),
    LENGTHS.flatmap(lambda count: st.lists(st.one_of(st.none(), st.floats(-10, 10)), min_size=count, max_size=count)),
    LENGTHS.flatmap(lambda count: st.tuples(*[NUMBERS] * count)),
    LENGTHS.flatmap(lambda count: st.lists(NUMBERS, min_size=count, max_size=count).map(FalseLength)),
    LENGTHS.flatmap(lambda count: st.lists(st.floats(width=32), min_size=count, max_size=count).map(torch.tensor)),
    LENGTHS.flatmap(lambda count: st.lists(ROWS, min_size=count, max_size=count).map(iter)),
    st.lists(st.floats(), max_size=4).map(np.array),
    st.builds(np.ones, st.tuples(st.integers(0, 3), st.integers(0, 3))),
    st.dictionaries(st.text(max_size=2), NUMBERS, max_size=3),
    ROWS,
)


@settings(max_examples=600, derandomize=True, deadline=None)
@given(result=RESULTS, policy=st.sampled_from(["fail", "skip", 0.5]), thrown=st.sampled_from([None] * 9 + [KeyError]))
@example(result=[None, None, Turncoat(0.0)], policy="fail", thrown=None)
@example(result=[None, None, Turncoat(0.0)], policy="skip", thrown=None)
def test_whatever_a_reward_returns_is_a_finite_number_nothing_or_a_named_error(
    result: Any, policy: Any, thrown: type[Exception] | None
) -> None:
    def reward(prompts: list[str], completions: list[str]) -> Any:
        if thrown is not None:
            raise thrown("no judge")
        return result

    rewards = Rewards([reward], on_error=policy)
    try:
        judged = rewards.score(PROMPTS, ["a", "b", "c"])
    except RewardError as error:
        assert policy == "fail"
        assert re.match(r"the reward 'reward' failed (in row [123] of 3 )?\(prompt 'p (one|two|three)'\): ", str(error))
        return
    totals = [one.total for one in judged]
    assert len(totals) == 3
    assert all(total is None or (type(total) is float and math.isfinite(total)) for total in totals)
    if rewards.failed:
        assert policy != "fail" and rewards.last_fault.startswith("the reward 'reward' failed ")
        assert totals.count(None if policy == "skip" else 0.5) >= rewards.failed
