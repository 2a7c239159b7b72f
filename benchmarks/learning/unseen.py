"""Tasks on which nothing was chosen: written when the defaults stood, to see whether they hold elsewhere.

Sorting pays parts of a reward, coins all or nothing on a GPT-2 with few prompts, and words is the reward function
of many a first example: below zero, and of another size. Runs came later, when sorting and words had been looked at,
and shift when runs had been.
"""

import random
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.learning.bases import BaseRecipe, base_model

# --- sorting: the base has the habit of swapping neighbours -----------------------------------------------------------

SORTING = BaseRecipe("sorting", {"shortest": 5, "longest": 8, "swap": 0.6}, (*map(str, range(10)), ":"), steps=1200)


def _digits(rng: random.Random) -> list[int]:
    facts = SORTING.parameters
    return [rng.randint(0, 9) for _ in range(rng.randint(int(facts["shortest"]), int(facts["longest"])))]


def _nearly_sorted(rng: random.Random) -> str:
    digits = _digits(rng)
    written = sorted(digits)
    for place in range(len(written) - 1):
        if rng.random() < SORTING.parameters["swap"]:
            written[place], written[place + 1] = written[place + 1], written[place]
    return f"{' '.join(map(str, digits))} : {' '.join(map(str, written))}"


SORTING_BASE = base_model(SORTING, _nearly_sorted)


def sorting_rows(seed: int) -> Iterator[dict[str, str]]:
    """Endless rows: digits as prompt, the sorted ones as `answer`."""
    rng = random.Random(seed)
    while True:
        digits = _digits(rng)
        yield {"prompt": f"{' '.join(map(str, digits))} :", "answer": " ".join(map(str, sorted(digits)))}


def places_right(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """The share of places where the right digit stands; what is too long or too short loses places."""
    shares = []
    for text, right in zip(completions, answer, strict=True):
        written, wanted = text.split(), right.split()
        same = sum(one == other for one, other in zip(written, wanted, strict=False))
        shares.append(same / max(len(written), len(wanted)))
    return shares


# --- coins: an amount to be paid with five coins; the base pays with any number, and miscounts ------------------------

COINS = (1, 2, 5, 10, 20, 50)
MANY = 5  # neither more nor fewer
_NAMES = tuple(f"c{coin}" for coin in COINS)
PAYING = BaseRecipe("coins", {"longest": 10}, (*map(str, range(1, 501)), ":", *_NAMES), steps=1500, width=64)


def _payment(rng: random.Random) -> str:
    coins = [rng.choice(COINS) for _ in range(rng.randint(2, int(PAYING.parameters["longest"])))]
    return f"{sum(coins)} : {' '.join(f'c{coin}' for coin in coins)}"


def gpt2(tokenizer: PreTrainedTokenizerFast, recipe: BaseRecipe) -> PreTrainedModel:
    """Untrained, of the recipe's size."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=recipe.context,
            n_embd=recipe.width,
            n_layer=recipe.layers,
            n_head=recipe.heads,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


PAYING_BASE = base_model(PAYING, _payment, gpt2)


@cache
def payments() -> dict[int, list[tuple[int, ...]]]:
    """By amount, every way to lay down five coins one after the other."""
    found: dict[int, list[tuple[int, ...]]] = {}
    for coins in product(COINS, repeat=MANY):
        found.setdefault(sum(coins), []).append(coins)
    return found


def amounts(seed: int) -> Iterator[dict[str, str]]:
    """Every amount that five coins come to, once, in random order."""
    for amount in random.Random(seed).sample(sorted(payments()), len(payments())):
        yield {"prompt": f"{amount} :", "amount": str(amount)}


def ways(row: dict[str, Any]) -> list[str]:
    """Every completion that pays the amount."""
    return [" ".join(f"c{coin}" for coin in coins) for coins in payments()[int(row["amount"])]]


def paid(completions: list[str], amount: list[str], **columns: Any) -> list[float]:
    """1 where the coins come to the amount and are five; else 0."""
    found = []
    for text, due in zip(completions, amount, strict=True):
        words = text.split()
        coins = [int(word[1:]) for word in words if word in _NAMES]
        found.append(float(len(coins) == len(words) == MANY and sum(coins) == int(due)))
    return found


# --- words: a completion of twelve of them ----------------------------------------------------------------------------

WANTED = 12


def near_length(completions: list[str], **columns: Any) -> list[float]:
    """Minus the number of words that a completion has too many or too few."""
    return [-float(abs(len(text.split()) - WANTED)) for text in completions]


# --- runs: letters in a row, counted; the base has the habit of counting one too few of a long run --------------------

RUNS = BaseRecipe(
    "runs", {"fewest": 3, "most": 5, "longest": 5, "short": 0.6}, ("a", "b", "c", *"12345", ":"), steps=1500
)


def _runs(rng: random.Random) -> list[tuple[str, int]]:
    """(letter, how often), neighbours never of the same letter."""
    facts, found = RUNS.parameters, list[tuple[str, int]]()
    for _ in range(rng.randint(int(facts["fewest"]), int(facts["most"]))):
        letter = rng.choice([one for one in "abc" if not found or one != found[-1][0]])
        found.append((letter, rng.randint(1, int(facts["longest"]))))
    return found


def _in_a_row(runs: list[tuple[str, int]]) -> str:
    return " ".join(" ".join(letter * count) for letter, count in runs)


def _counted(rng: random.Random) -> str:
    runs = _runs(rng)
    habit = [(letter, count - (count > 2 and rng.random() < RUNS.parameters["short"])) for letter, count in runs]
    return f"{_in_a_row(runs)} : {' '.join(f'{letter} {count}' for letter, count in habit)}"


RUNS_BASE = base_model(RUNS, _counted)


def runs_rows(seed: int) -> Iterator[dict[str, str]]:
    """Endless rows: letters in runs as prompt, each letter and how often it comes as `answer`."""
    rng = random.Random(seed)
    while True:
        runs = _runs(rng)
        yield {"prompt": f"{_in_a_row(runs)} :", "answer": " ".join(f"{letter} {count}" for letter, count in runs)}


def edits(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """Minus the words that must be put in, taken out or changed to get the answer (Levenshtein distance)."""
    return [-float(_distance(text.split(), right.split())) for text, right in zip(completions, answer, strict=True)]


def _distance(first: list[str], second: list[str]) -> int:
    row = list(range(len(second) + 1))
    for above, one in enumerate(first, start=1):
        corner, row[0] = row[0], above
        for place, other in enumerate(second, start=1):
            corner, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, corner + (one != other))
    return row[-1]


# --- shift: every letter's successor; the base has the habit of copying some letters ----------------------------------

ALPHABET = "abcdefghij"
COPIED = "fghij"
SHIFT = BaseRecipe("shift", {"fewest": 5, "most": 8, "copy": 0.5}, (*ALPHABET, ":"), steps=1200)


def _letters(rng: random.Random) -> list[str]:
    facts = SHIFT.parameters
    return [rng.choice(ALPHABET) for _ in range(rng.randint(int(facts["fewest"]), int(facts["most"])))]


def _successor(letter: str) -> str:
    return ALPHABET[(ALPHABET.index(letter) + 1) % len(ALPHABET)]


def _nearly_shifted(rng: random.Random) -> str:
    letters = _letters(rng)
    written = [
        letter if letter in COPIED and rng.random() < SHIFT.parameters["copy"] else _successor(letter)
        for letter in letters
    ]
    return f"{' '.join(letters)} : {' '.join(written)}"


SHIFT_BASE = base_model(SHIFT, _nearly_shifted)


def shift_rows(seed: int) -> Iterator[dict[str, str]]:
    """Endless rows: letters as prompt, their successors in the alphabet as `answer`."""
    rng = random.Random(seed)
    while True:
        letters = _letters(rng)
        yield {"prompt": f"{' '.join(letters)} :", "answer": " ".join(map(_successor, letters))}


def before_the_first_mistake(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """The share of the answer that is right up to the first mistake; what follows the answer is one."""
    shares = []
    for text, right in zip(completions, answer, strict=True):
        written, wanted = [*text.split(), None], [*right.split(), None]
        same = next((place for place, one in enumerate(wanted) if one != written[place]), len(wanted))
        shares.append(same / len(wanted))
    return shares
