"""The tasks: a base model, prompts in three parts, a judge of whole completions, and what is exactly right."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.learning import graphs, letters, sums, unseen
from benchmarks.learning.bases import Built
from llm_dqn.reward_model import RewardModel

Row = dict[str, Any]  # `prompt`, and columns for the judge
Parts = tuple[list[Row], list[Row], list[Row]]  # to train on, to tune on, to test on
Judge = Callable[..., list[float]]  # called as TRL calls a reward function
DATA = Path(__file__).parents[2] / "data"


class Shipped:
    """A folder that comes with the repository."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name

    def __call__(self) -> Path:
        return self.folder


DEAR = 4  # `Task.costs` of completions that take long


@dataclass(frozen=True)
class Task:
    """What a method is given.

    tuned: "lora" or "full", the same for every method. length: tokens that a completion may have. base: gives the
    folder of the base model, built when asked for first. judge: the terminal reward. prompts: to train on, to tune on,
    to test on, no one in two of them. answers: the completions of a row that are exactly right, where they can be
    listed; their probability has no sampling noise. costs: about how many times as long as the shortest a completion
    takes, with the updates on it; budgets are divided by it. predictable: the rewards of completions nobody scored can
    be told from those of others. graded: a judge's grades, of which none comes twice. counted: neither these nor
    right or wrong.
    """

    name: str
    about: str
    tuned: str
    length: int
    base: Built | Shipped
    judge: Callable[[], Judge]
    prompts: Callable[[], Parts]
    answers: Callable[[Row], list[str]] | None = None
    costs: int = 1
    predictable: bool = False
    graded: bool = False
    counted: bool = False

    @property
    def train(self) -> list[Row]:
        return self.prompts()[0]

    @property
    def tuning(self) -> list[Row]:
        return self.prompts()[1]

    @property
    def test(self) -> list[Row]:
        return self.prompts()[2]


def parted(rows: Iterator[Row], train: int, tuning: int, test: int) -> Parts:
    """Lists of so many rows each; no prompt comes twice, in one of them or in two."""
    total = train + tuning + test
    seen: dict[str, Row] = {}
    for row in rows:
        seen.setdefault(row["prompt"], row)
        if len(seen) == total:
            break
    if len(seen) < total:
        raise ValueError(f"{total} different prompts are needed, there are {len(seen)}")
    left = iter(seen.values())
    return list(islice(left, train)), list(islice(left, tuning)), list(islice(left, test))


def _lines(name: str) -> list[Row]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@cache
def _reviews() -> Parts:
    rows = _lines("prompts_train.jsonl")
    return rows[:1280], rows[1280:], _lines("prompts_eval.jsonl")


@cache
def _sums() -> Parts:
    return parted(sums.rows(11, additions=(3, 5)), 4096, 256, 256)


@cache
def _rare_sums() -> Parts:
    return parted(sums.rows(12, additions=(5, 6), high=(3, 4)), 4096, 256, 256)


@cache
def _long_sums() -> Parts:
    return parted(sums.rows(13, additions=(8, 10)), 4096, 256, 256)


@cache
def _paths() -> Parts:
    rows = list(graphs.path_rows(14))
    return parted(iter(rows), len(rows) - 2 * (len(rows) // 4), len(rows) // 4, len(rows) // 4)


@cache
def _star() -> Parts:
    return parted(graphs.star_rows(15), 4096, 256, 256)


@cache
def _letters() -> Parts:
    return parted(letters.rows(16), 2048, 256, 256)


@cache
def _sorting() -> Parts:
    return parted(unseen.sorting_rows(21), 4096, 256, 256)


@cache
def _coins() -> Parts:
    return parted(unseen.amounts(22), 87, 30, 30)


@cache
def _runs() -> Parts:
    return parted(unseen.runs_rows(23), 4096, 256, 256)


@cache
def _shift() -> Parts:
    return parted(unseen.shift_rows(24), 4096, 256, 256)


@cache
def _reward_model(folder: Path) -> Judge:
    return RewardModel(str(folder))


TASKS = {
    task.name: task
    for task in (
        Task(
            "sums",
            "running sums, 3 to 5 additions; the base adds 6 to 9 one too many in two of three cases",
            "full",
            8,
            sums.SHORT_BASE,
            lambda: sums.last_total,
            _sums,
            sums.chain,
        ),
        Task(
            "rare_sums",
            "the same base, 5 or 6 additions with 3 or 4 such digits: rarely right",
            "full",
            9,
            sums.SHORT_BASE,
            lambda: sums.last_total,
            _rare_sums,
            sums.chain,
        ),
        Task(
            "long_sums",
            "8 to 10 additions, wrong in one of three such cases: where did it go wrong?",
            "full",
            13,
            sums.LONG_BASE,
            lambda: sums.last_total,
            _long_sums,
            sums.chain,
        ),
        Task(
            "reviews",
            "the quickstart: continue a review so that the shipped reward model finds it positive",
            "lora",
            40,
            Shipped(DATA / "tiny_lm"),
            lambda: _reward_model(DATA / "tiny_reward_model"),
            _reviews,
            costs=DEAR,
            predictable=True,
            graded=True,
        ),
        Task(
            "paths",
            "walks on a graph of 21 nodes, learned from random walks; reward: shortest length over length",
            "lora",
            graphs.WALK + 2,
            graphs.PATHS_BASE,
            lambda: graphs.optimality,
            _paths,
            graphs.shortest_paths,
            predictable=True,
            counted=True,
        ),
        Task(
            "star",
            "star graphs with 5 arms of 2 nodes; the base has the habit of walking the first that was named",
            "full",
            4,
            graphs.STAR_BASE,
            lambda: graphs.is_answer,
            _star,
            lambda row: [row["answer"]],
        ),
        Task(
            "letters",
            "letters to a shop of 60 to 100 words; a learned judge wants them polite and whole",
            "lora",
            letters.LENGTH,
            letters.LETTERS_BASE,
            lambda: _reward_model(letters.LETTERS_JUDGE()),
            _letters,
            costs=DEAR,
            predictable=True,
            graded=True,
        ),
        Task(
            "sorting",
            "5 to 8 digits to be sorted; the base swaps neighbours; reward: the share of places that are right",
            "full",
            9,
            unseen.SORTING_BASE,
            lambda: unseen.places_right,
            _sorting,
            lambda row: [row["answer"]],
            predictable=True,
            counted=True,
        ),
        Task(
            "coins",
            "an amount to be paid with exactly 5 coins; a GPT-2; 87 prompts to learn from",
            "lora",
            11,
            unseen.PAYING_BASE,
            lambda: unseen.paid,
            _coins,
            unseen.ways,
            predictable=True,
        ),
        Task(
            "words",
            "continue a review in exactly 12 words; reward: minus those too many or too few",
            "lora",
            40,
            Shipped(DATA / "tiny_lm"),
            lambda: unseen.near_length,
            _reviews,
            costs=DEAR,
            predictable=True,
            counted=True,
        ),
        Task(
            "runs",
            "3 to 5 runs of letters to be counted; the base counts long ones short; reward: minus the edits to be made",
            "full",
            11,
            unseen.RUNS_BASE,
            lambda: unseen.edits,
            _runs,
            lambda row: [row["answer"]],
            predictable=True,
            counted=True,
        ),
        Task(
            "shift",
            "5 to 8 letters, their successors to be written; the base copies some; reward: the share before a mistake",
            "lora",
            9,
            unseen.SHIFT_BASE,
            lambda: unseen.before_the_first_mistake,
            _shift,
            lambda row: [row["answer"]],
            predictable=True,
            counted=True,
        ),
    )
}
UNSEEN = ("sorting", "coins", "words", "runs", "shift")  # how little was chosen on these, `unseen` says
SEEN = tuple(name for name in TASKS if name not in UNSEEN)


class Counted:
    """A judge that counts the completions it is given: what a method has spent."""

    def __init__(self, judge: Judge) -> None:
        self.judge, self.count = judge, 0
        self.__name__ = "judge"  # TRL names its metrics after the function

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        self.count += len(completions)
        return self.judge(prompts=list(prompts), completions=list(completions), **columns)
