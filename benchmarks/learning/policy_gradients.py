"""TRL's GRPO and RLOO on the same tasks, measured between their collections."""

import tempfile
import warnings
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback

from benchmarks.learning.course import Course
from benchmarks.learning.dqn import lora_of
from benchmarks.learning.tasks import Task

COMMON = {
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,  # TRL's default would be bfloat16 and recomputed activations, both slower here
    "gradient_checkpointing": False,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "beta": 0.0,
}


class _Watch(TrainerCallback):
    """Looks at the policy after the last update of each collection."""

    def __init__(self, course: Course, completions: int, updates: int) -> None:
        self.course, self.completions, self.updates = course, completions, updates

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.course.look(0, 0, lambda: model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        collections, rest = divmod(state.global_step, self.updates)
        if rest == 0:
            self.course.look(collections * self.completions, state.global_step, lambda: model)


def train(name: str, task: Task, course: Course, settings: Mapping[str, Any], budget: int, seed: int) -> dict[str, Any]:
    """One run of `budget` scored completions. settings: learning_rate, completions a collection, iterations
    over each, and any other field of TRL's configuration.
    """
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    trainer_of, config_of = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[name]
    chosen = dict(settings)
    completions, iterations = chosen.pop("completions"), chosen.pop("iterations")
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(
            output_dir=folder,
            per_device_train_batch_size=completions,
            steps_per_generation=1,
            num_iterations=iterations,
            max_completion_length=task.length,
            max_steps=budget // completions * iterations,
            seed=seed,
            **{**COMMON, **chosen},
        )
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        trainer = trainer_of(
            model=str(task.base()),
            reward_funcs=[course.scored],
            args=config,
            train_dataset=Dataset.from_list(task.train),
            processing_class=course.tokenizer,
            peft_config=lora_of(task),
            callbacks=[_Watch(course, completions, iterations)],
        )
        trainer.train()
    if course.scored.count != budget:
        raise RuntimeError(f"{course.scored.count} completions were judged, the budget was {budget}")
    return {}
