"""What the trained Q and V know: choosing among four candidates at inference, and telling good prefixes from bad."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.learning.measure import Looked, lay_out, logprobs, write
from benchmarks.learning.tasks import Row, Task
from llm_dqn.adapters import Role
from llm_dqn.network import QNetwork
from llm_dqn.replay import collate_tokens
from llm_dqn.scoring import look_at

CANDIDATES = 4
PARTS = (0.25, 0.5, 0.75, 1.0)  # of a completion
BATCH = 64


def search(
    network: QNetwork, tokenizer: PreTrainedTokenizerBase, task: Task, rows: Sequence[Row], seed: int
) -> dict[str, dict[str, float]]:
    """Mean reward of the candidate that each rule chooses, for candidates of the tuned policy and of the base model.

    sample: any; likelihood: of the tuned policy, a token; value: V before the last token; log_ratio: Q - V summed up,
    the value that the policy itself implies; oracle: the best there is. Beside them, `auc_...`: how well V before that
    part's last token, and the sum of Q - V up to it, rank completions of the tuned policy by whether they end above the
    mean reward.
    """
    many = [row for row in rows for _ in range(CANDIDATES)]
    prompts = [row["prompt"] for row in many]
    columns = {name: [row[name] for row in many] for name in many[0] if name != "prompt"}
    found = {}
    roles: tuple[tuple[str, Role], ...] = (("tuned", "online"), ("base", "reference"))
    for name, role in roles:
        with torch.random.fork_rng(devices=[]), network.writer(role) as model:
            torch.manual_seed(seed)
            written = write(model, tokenizer, prompts, task.length)
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        rewards = np.array(task.judge()(prompts=prompts, completions=texts, **columns))
        facts = _facts(network, tokenizer, prompts, written)
        found[name] = _chosen(facts, rewards)
        if role == "online":
            found[name] |= _ranking(facts, rewards)
    return found


def _facts(
    network: QNetwork, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], written: Sequence[list[int]]
) -> dict[str, list[Any]]:
    """Token by token: V, Q - V, and the tuned policy's mean log-probability of the whole."""
    pairs = [(torch.tensor(tokenizer(p)["input_ids"]), torch.tensor(w)) for p, w in zip(prompts, written, strict=True)]
    looks = look_at(network, pairs, BATCH, top=1)
    likelihoods: list[float] = []
    for start in range(0, len(pairs), BATCH):
        starts, ends = zip(*pairs[start : start + BATCH], strict=True)
        tokens = collate_tokens(starts, ends)
        likelihoods += (network.logprobs(tokens, "online").sum(1) / tokens.action_mask.sum(1)).tolist()
    values = [look.values.numpy() for look in looks]
    advantages = [np.cumsum((look.q_values - look.values).numpy()) for look in looks]
    return {"value": values, "log_ratio": advantages, "likelihood": likelihoods}


def critic(
    network: QNetwork, tokenizer: PreTrainedTokenizerBase, task: Task, rows: Sequence[Row], looked: Looked
) -> dict[str, float]:
    """How good V is on completions that the policy has just written, by the part of them that it has seen.

    auc_...: how well it ranks them by whether they end above the mean reward. r2_...: the share of the reward's
    variance that it explains, negative where the mean would do better. oracle_...: the AUC of the probability, by the
    policy itself, of going on to a listed answer; what a critic could reach.
    """
    prompts = [row["prompt"] for row in rows]
    pairs = [
        (torch.tensor(tokenizer(p)["input_ids"]), torch.tensor(w)) for p, w in zip(prompts, looked.written, strict=True)
    ]
    values = [look.values.numpy() for look in look_at(network, pairs, BATCH, top=1)]
    rewards = np.array(looked.rewards)
    good = rewards > rewards.mean()
    oracle = None
    if task.answers is not None:
        with network.writer("online") as model:
            oracle = true_values(model, tokenizer, task, rows, looked.written)
    found = {}
    for part in PARTS:
        seen = np.array([_at(part, one) for one in values])
        found[f"auc_{part:g}"] = auc(seen, good)
        spread = float(((rewards - rewards.mean()) ** 2).mean())
        found[f"r2_{part:g}"] = 1 - float(((rewards - seen) ** 2).mean()) / spread if spread > 0 else 0.0
        if oracle is not None:
            found[f"oracle_{part:g}"] = auc(np.array([_at(part, one) for one in oracle]), good)
    return {name: round(value, 4) for name, value in found.items()}


def _at(part: float, numbers: Sequence[float] | np.ndarray) -> float:
    """Of numbers before each token, the one that has seen this part of the completion, its last token never."""
    return float(numbers[max(0, int(np.ceil(part * len(numbers))) - 1)])


@torch.no_grad()
def true_values(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[Row],
    written: Sequence[list[int]],
) -> list[list[float]]:
    """Before each token of the completions: the model's probability of going on to one of the row's answers, 0 where
    the prefix begins none of them. The exact value of the state if the answers alone were rewarded, with 1.
    """
    assert task.answers is not None
    answers = [[[*tokenizer(a)["input_ids"], tokenizer.eos_token_id] for a in task.answers(row)] for row in rows]
    flat = [(row["prompt"], ids) for row, some in zip(rows, answers, strict=True) for ids in some]
    ahead: list[np.ndarray] = []  # of each answer, the log-probability of all its tokens from each place on
    for start in range(0, len(flat), 2 * BATCH):
        tokens, mask, labels = lay_out(tokenizer, *zip(*flat[start : start + 2 * BATCH], strict=True))
        taken = logprobs(model, tokens, mask, labels)
        for each, own in zip(taken, labels[:, 1:] != -100, strict=True):
            ahead.append(each[own].flip(0).cumsum(0).flip(0).numpy())
    left = iter(ahead)
    found = []
    for some, ids in zip(answers, written, strict=True):
        pairs = [(answer, next(left)) for answer in some]
        sums = [
            sum(
                float(np.exp(logs[place]))
                for answer, logs in pairs
                if answer[:place] == ids[:place] and place < len(answer)
            )
            for place in range(len(ids))
        ]
        found.append(sums)
    return found


def _chosen(facts: dict[str, list[Any]], rewards: np.ndarray) -> dict[str, float]:
    by_prompt = rewards.reshape(-1, CANDIDATES)

    def picked(scores: Sequence[float]) -> float:
        choice = np.array(scores).reshape(-1, CANDIDATES).argmax(1)
        return float(by_prompt[np.arange(len(by_prompt)), choice].mean())

    return {
        "sample": float(rewards.mean()),
        "likelihood": picked(facts["likelihood"]),
        "value": picked([values[-1] for values in facts["value"]]),
        "log_ratio": picked([sums[-1] for sums in facts["log_ratio"]]),
        "oracle": float(by_prompt.max(1).mean()),
    }


def _ranking(facts: dict[str, list[Any]], rewards: np.ndarray) -> dict[str, float]:
    good = rewards > rewards.mean()
    found = {}
    for part in PARTS:
        for name in ("value", "log_ratio"):
            scores = [_at(part, one) for one in facts[name]]
            found[f"auc_{name}_{part:g}"] = auc(np.array(scores), good)
    return found


def auc(scores: np.ndarray, good: np.ndarray) -> float:
    """Probability that a good one scores above a bad one, ties counting half; 0.5 where all are of one kind."""
    above, below = scores[good], scores[~good]
    if len(above) == 0 or len(below) == 0:
        return 0.5
    order = np.sort(below)
    left, right = np.searchsorted(order, above, "left"), np.searchsorted(order, above, "right")
    return float((left + right).mean() / 2 / len(below))
