"""The outcome model that llm_dqn fits to a log, as a reward function: what any other method could do with it."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from benchmarks.learning.dqn import lora_of, written_log
from benchmarks.learning.tasks import Row, Task
from llm_dqn import DQNConfig, DQNTrainer
from llm_dqn.rollout import describe
from llm_dqn.types import Prompt


def predicted_rewards(task: Task, logged: Sequence[Row]) -> Callable[..., list[float]]:
    """A reward function for TRL, which hands over the token ids, that asks no judge."""
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": f"{folder}/run",
            "max_completion_length": task.length,
            "max_scored_completions": 0,
            "warm_start": written_log(logged, Path(folder)),
            "held_out_share": 0.0,
        }
        trainer = DQNTrainer(
            str(task.base()),
            [task.judge()],
            DQNConfig(**settings),
            train_dataset=Dataset.from_list(task.train),
            eval_dataset=Dataset.from_list(task.tuning[:8]),
            peft_config=lora_of(task),
        )
    dyna, writer = trainer.parts.dyna, trainer.parts.writer
    assert dyna is not None
    dyna.learn([dyna.unknown(trainer.replay)], least_skill=0.0)
    end = writer.tokenizer.eos_token_id

    def predicted(prompts: Sequence[str], completion_ids: Sequence[list[int]], **columns: Any) -> list[float]:
        asked = [Prompt(text, text, writer.tokenizer(text)["input_ids"], {}) for text in prompts]
        written = [torch.tensor(ids) for ids in completion_ids]
        unasked = [torch.zeros(len(ids)) for ids in written]  # how likely the policy of llm_dqn finds them
        episodes = [
            replace(episode, ended="eos" if ids[-1] == end else "length")
            for episode, ids in zip(describe(writer, asked, written, unasked), written, strict=True)
        ]
        return [episode.reward for episode in dyna.judged(episodes)[0]]

    return predicted
