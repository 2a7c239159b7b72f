"""REINFORCE without groups: one completion a prompt, the running mean as baseline, clipped ratios for reuse."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.learning.course import Course
from benchmarks.learning.fine_tuning import Tuner, judged
from benchmarks.learning.measure import lay_out, logprobs, write
from benchmarks.learning.tasks import Task

CLIP = 0.2  # Schulman et al. 2017, equation 7
REMEMBERED = 1024  # rewards behind the baseline and the scale


def train(task: Task, course: Course, settings: Mapping[str, Any], budget: int, seed: int) -> dict[str, Any]:
    """One run of `budget` scored completions. settings: learning_rate, completions a collection, iterations: updates on
    each collection, all of it at a time, with the clipped surrogate of PPO; the mean over tokens; temperature of all
    collections but the first.

    Methods that compare within a group of completions have nothing to learn from where each prompt gets one.
    """
    tuner = Tuner(task, course, settings["learning_rate"], seed)
    size = settings["completions"]
    order: list[Any] = []
    seen: list[Any] = []
    while True:
        course.look(course.scored.count, tuner.updates, lambda: tuner.model)
        if course.scored.count >= budget:
            return {}
        rows = []
        for _ in range(size):
            order = order or tuner.rng.permutation(len(task.train)).tolist()
            rows.append(task.train[order.pop()])
        prompts = [row["prompt"] for row in rows]
        heat = settings.get("temperature", 1.0) if seen else 1.0
        written = write(tuner.model, tuner.tokenizer, prompts, task.length, temperature=heat)
        rewards = judged(course, rows, written)
        seen = [*seen, *rewards][-REMEMBERED:]
        if np.std(seen) == 0:
            continue
        advantages = torch.tensor((np.array(rewards) - np.mean(seen)) / np.std(seen), dtype=torch.float32)[:, None]
        batch = lay_out(tuner.tokenizer, prompts, written)
        with torch.no_grad():
            before = logprobs(tuner.model, *batch)
        tokens = batch[2][:, 1:] != -100
        for _ in range(settings["iterations"]):
            ratio = (logprobs(tuner.model, *batch) - before).exp()
            gains = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
            tuner.descend(-(gains * tokens).sum() / tokens.sum())
