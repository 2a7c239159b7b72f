"""Supervised fine-tuning on what scored well: best of n, and all successes, fresh or logged. Plain loops."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.learning.course import Course
from benchmarks.learning.dqn import lora_of
from benchmarks.learning.measure import lay_out, logprobs, write
from benchmarks.learning.tasks import Row, Task

LOOK_STEPS = 25  # between two looks at completions that are not learned from
Kept = tuple[str, list[int]]  # prompt, completion ids


class Tuner:
    """A model and its optimizer: one step of maximum likelihood at a time."""

    def __init__(self, task: Task, course: Course, learning_rate: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.rng = np.random.default_rng(seed)
        model: Any = AutoModelForCausalLM.from_pretrained(task.base())
        lora = lora_of(task)
        self.model: PreTrainedModel = model if lora is None else get_peft_model(model, lora)
        self.tokenizer = course.tokenizer
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=learning_rate, weight_decay=0.0)
        self.updates = 0

    def step(self, kept: Sequence[Kept], batch: int) -> None:
        """One update on `batch` of the kept completions, drawn with replacement: the mean over their tokens."""
        picks = [kept[index] for index in self.rng.integers(len(kept), size=batch)]
        ids, mask, labels = lay_out(self.tokenizer, *zip(*picks, strict=True))
        self.model.train()
        self.descend(-logprobs(self.model, ids, mask, labels).sum() / (labels[:, 1:] != -100).sum())

    @torch.no_grad()
    def probability(self, kept: Sequence[Kept], batch: int) -> float:
        """Mean of pi over the tokens of completions, which llm_dqn stops by as well."""
        self.model.eval()
        total = count = 0.0
        for start in range(0, len(kept), batch):
            ids, mask, labels = lay_out(self.tokenizer, *zip(*kept[start : start + batch], strict=True))
            tokens = labels[:, 1:] != -100
            total += float(logprobs(self.model, ids, mask, labels)[tokens].exp().sum())
            count += int(tokens.sum())
        return total / count

    def descend(self, loss: Tensor) -> None:
        """One step down the gradient of the loss."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1


def train_online(
    task: Task,
    course: Course,
    settings: Mapping[str, Any],
    budget: int,
    seed: int,
    logged: Sequence[Row] = (),
    stale: int = 0,
) -> dict[str, Any]:
    """Writes, keeps the best, learns from it, again and again, until the budget of scored completions is spent.

    logged: what is kept of it is learned from first, alone for `logged_updates`, and then as a collection. stale: the
    policy that writes is refreshed every so many completions; 0: before each collection.
    settings: learning_rate; completions a collection; of_each, completions a prompt: the best of more than one is kept
    where they differ, a single one where it beats the running mean, and is not below the quantile `above` of all
    rewards; remember, collections that are learned from; updates a collection, of `batch` completions; temperature of
    all collections but the first.
    """
    tuner = Tuner(task, course, settings["learning_rate"], seed)
    memory: list[list[Kept]] = [successes(tuner, logged)] if logged else []
    rewards_seen: list[float] = []
    order: list[int] = []
    writer = tuner.model if stale == 0 else copy.deepcopy(tuner.model)
    while True:
        course.look(course.scored.count, tuner.updates, lambda: tuner.model)
        if course.scored.count >= budget:
            return {}
        if not rewards_seen and logged:
            for _ in range(settings["logged_updates"]):
                tuner.step(memory[0], settings["batch"])
        if stale and course.scored.count % stale == 0:
            writer.load_state_dict(tuner.model.state_dict())
        rows = []
        for _ in range(settings["completions"] // settings["of_each"]):
            order = order or tuner.rng.permutation(len(task.train)).tolist()
            rows += [task.train[order.pop()]] * settings["of_each"]
        heat = settings.get("temperature", 1.0) if rewards_seen else 1.0
        written = write(writer, tuner.tokenizer, [row["prompt"] for row in rows], task.length, temperature=heat)
        rewards = judged(course, rows, written)
        rewards_seen += rewards
        least = float(np.quantile(rewards_seen, settings.get("above", 0.0)))
        memory.append(_best(rows, written, rewards, settings["of_each"], float(np.mean(rewards_seen)), least))
        kept = [one for some in memory[-settings["remember"] :] for one in some]
        for _ in range(settings["updates"] if kept else 0):
            tuner.step(kept, settings["batch"])


def judged(course: Course, rows: Sequence[Row], written: Sequence[list[int]]) -> list[float]:
    """Rewards of completions of the rows, counted."""
    texts = course.tokenizer.batch_decode(written, skip_special_tokens=True)
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    return course.scored([row["prompt"] for row in rows], texts, **columns)


def _best(
    rows: Sequence[Row],
    written: Sequence[list[int]],
    rewards: Sequence[float],
    of_each: int,
    usual: float,
    least: float,
) -> list[Kept]:
    kept = []
    for start in range(0, len(rows), of_each):
        group = rewards[start : start + of_each]
        best = start + int(np.argmax(group))
        if rewards[best] > (usual if of_each == 1 else float(np.mean(group))) and rewards[best] >= least:
            kept.append((rows[best]["prompt"], written[best]))
    return kept


def train_logged(
    task: Task, course: Course, settings: Mapping[str, Any], logged: Sequence[Row], seed: int
) -> dict[str, Any]:
    """Learns from logged completions above the quantile `above` of their rewards (null: above the mean).

    held_out: share of the prompts that is not learned from. What is measured then is the policy under which their
    completions were likeliest so far.
    """
    tuner = Tuner(task, course, settings["learning_rate"], seed)
    kept, held = _apart(successes(tuner, logged, settings["above"]), settings.get("held_out", 0.0), tuner.rng)
    best, most = tuner.model, 0.0
    for step in range(course.marks[-1] + 1):
        if held and step % LOOK_STEPS == 0 and (seen := tuner.probability(held, settings["batch"])) > most:
            best, most = copy.deepcopy(tuner.model), seen
        course.look(step, tuner.updates, best.eval)
        if course.marks:
            tuner.step(kept, settings["batch"])
    return {"kept": len(kept)}


def _apart(kept: Sequence[Kept], share: float, rng: np.random.Generator) -> tuple[list[Kept], list[Kept]]:
    """(completions to learn from, those of a share of the prompts)."""
    prompts = sorted({prompt for prompt, _ in kept})
    apart = set(rng.permutation(prompts)[: int(len(prompts) * share)].tolist())
    return [one for one in kept if one[0] not in apart], [one for one in kept if one[0] in apart]


def successes(tuner: Tuner, logged: Sequence[Row], above: float | None = None) -> list[Kept]:
    """Logged completions above a quantile of their rewards; None: above the mean."""
    rewards = np.array([row["reward"] for row in logged])
    least = rewards.mean() if above is None else np.quantile(rewards, above)
    return [(row["prompt"], _ids(tuner, row)) for row in logged if row["reward"] > min(least, rewards.max() - 1e-9)]


def _ids(tuner: Tuner, row: Row) -> list[int]:
    ids = tuner.tokenizer(row["completion"])["input_ids"]
    return [*ids, tuner.tokenizer.eos_token_id] if row["ended"] == "eos" else ids
