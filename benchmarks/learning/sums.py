"""Running sums: "3 + 5 + 9 :" is continued by "8 17". The base model has the habit of adding 6 to 9 one too many."""

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.learning.bases import BaseRecipe, base_model

LARGEST = 109
HIGH = 6  # from this digit on the habit strikes
VOCABULARY = (*map(str, range(LARGEST + 1)), "+", ":")


def _recipe(corpus: str, habit: float, shortest: int, longest: int, steps: int) -> BaseRecipe:
    parameters = {"habit": habit, "shortest": shortest, "longest": longest}
    return BaseRecipe(corpus, parameters, VOCABULARY, steps)


SHORT = _recipe("sums", habit=0.65, shortest=2, longest=6, steps=1500)
LONG = _recipe("long_sums", habit=0.35, shortest=8, longest=10, steps=1200)


def _digits(rng: random.Random, additions: int, high: int | None = None) -> list[int]:
    """The digits of a prompt; `high` fixes how many of those that are added lie in 6 to 9."""
    if high is None:
        return [rng.randint(1, 9) for _ in range(additions + 1)]
    added = [rng.randint(HIGH, 9) for _ in range(high)] + [rng.randint(1, HIGH - 1) for _ in range(additions - high)]
    rng.shuffle(added)
    return [rng.randint(1, 9), *added]


def totals(digits: list[int]) -> list[int]:
    """The right running totals, after the first digit."""
    return [sum(digits[: count + 1]) for count in range(1, len(digits))]


def prompt_of(digits: list[int]) -> str:
    return " + ".join(map(str, digits)) + " :"


def _text(rng: random.Random, recipe: BaseRecipe) -> str:
    facts = recipe.parameters
    digits = _digits(rng, rng.randint(int(facts["shortest"]), int(facts["longest"])))
    written, total = [], digits[0]
    for digit in digits[1:]:
        total += digit + (digit >= HIGH and rng.random() < facts["habit"])
        written.append(total)
    return f"{prompt_of(digits)} {' '.join(map(str, written))}"


SHORT_BASE, LONG_BASE = (base_model(recipe, partial(_text, recipe=recipe)) for recipe in (SHORT, LONG))


def last_total(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1 where the last number is the sum, whatever stands before it; else 0."""
    return [float(text.split()[-1:] == right.split()[-1:]) for text, right in zip(completions, answer, strict=True)]


def rows(seed: int, additions: tuple[int, int], high: tuple[int, int] | None = None) -> Iterator[dict[str, str]]:
    """Endless rows: prompt, and the right chain as `answer`."""
    rng = random.Random(seed)
    while True:
        digits = _digits(rng, rng.randint(*additions), None if high is None else rng.randint(*high))
        yield {"prompt": prompt_of(digits), "answer": " ".join(map(str, totals(digits)))}


def chain(row: dict[str, Any]) -> list[str]:
    """The one completion that is right at every step."""
    return [row["answer"]]
