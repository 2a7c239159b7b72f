"""Completions that were scored elsewhere: what of them is learned from, and what is kept apart to look at."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from llm_dqn.data import LoggedRow
from llm_dqn.replay import PrefixReplay
from llm_dqn.reward_kinds import RewardKinds
from llm_dqn.rollout import Writer, describe

FEWEST = 8  # episodes worth imitating, held out at least
SPARED = 4  # times as many such episodes must there be that prompts are added to find those
IMITATED_OF_LOG = 0.1  # share of it, unless another is given
FEWEST_IMITATED = 200  # of a short log: fewer would be learned by heart
MOST = 128  # such episodes that are looked at, by all processes together


def mean_reward(logged: Sequence[LoggedRow]) -> float:
    """Of completions scored elsewhere."""
    return float(np.mean([row.reward for row in logged]))


def least_imitated(logged: Sequence[LoggedRow], share: float) -> float:
    """The least reward above the mean that is also among the best `share` of the log; of 0 and 1 it is 1.

    Who writes anew goes on from what was above the mean, and the mean rises; that of a log stays where it is. Of a
    short log the share is as large as `FEWEST_IMITATED` ask for.
    """
    kinds = RewardKinds.of([row.reward for row in logged])
    return kinds.best(max(share, FEWEST_IMITATED / len(logged)))


def kept_apart(
    logged: Sequence[LoggedRow], share: float, seed: int, least: float = -math.inf
) -> tuple[Sequence[LoggedRow], Sequence[LoggedRow]]:
    """(rows to learn from, rows above the mean reward that say when to stop), which have no prompt in common.

    least: reward that the latter must have, too. share: of the prompts that are kept apart; fewer where `MOST` good
    rows are found sooner, more where it takes more to find `FEWEST` and these are no more than a quarter of the good
    ones. Else all rows are learned from.
    """
    mean = mean_reward(logged) if logged else 0.0
    worth = [row for row in logged if row.reward > mean and row.reward >= least]
    good = Counter(row.prompt.text for row in worth)
    texts = sorted({row.prompt.text for row in logged})
    order = [texts[index] for index in np.random.default_rng(seed).permutation(len(texts))]
    found = np.cumsum([good[text] for text in order])
    fewest, most = (int(np.searchsorted(found, wanted)) + 1 for wanted in (FEWEST, MOST))
    count = min(int(len(texts) * share), most)
    if share and len(worth) >= FEWEST * SPARED:
        count = max(count, fewest)
    if count in (0, len(texts)) or found[count - 1] < FEWEST:
        return logged, ()
    apart = set(order[:count])
    return [row for row in logged if row.prompt.text not in apart], [row for row in worth if row.prompt.text in apart]


def fill_from_log(memory: PrefixReplay, writer: Writer, logged: Sequence[LoggedRow]) -> None:
    """Logged completions with their rewards become episodes like any other."""
    for start in range(0, len(logged), writer.batch_size):
        rows = logged[start : start + writer.batch_size]
        completions = [torch.tensor(row.completion_ids) for row in rows]
        for row, episode in zip(rows, describe(writer, [row.prompt for row in rows], completions), strict=True):
            memory.add([replace(episode, reward=row.reward, ended=row.ended, source="logged")])
