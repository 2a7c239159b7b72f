"""TRL's GRPO and RLOO on the same tasks, measured between their collections."""

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback

from benchmarks.learning.course import Course
from benchmarks.learning.dqn import lora_of
from benchmarks.learning.fine_tuning import Tuner, successes
from benchmarks.learning.methods import LORA_FACTOR
from benchmarks.learning.predicted import predicted_rewards
from benchmarks.learning.tasks import Row, Task

FIRST_RATE, FIRST_BATCH = 1e-4, 16  # of fine-tuning on a log
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
    """Looks at the policy after the last update of each collection. completions: that it takes; 0: updates count."""

    def __init__(self, course: Course, completions: int, updates: int) -> None:
        self.course, self.completions, self.updates = course, completions, updates

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.course.look(0, 0, lambda: model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        collections, rest = divmod(state.global_step, self.updates)
        if rest == 0:
            at = collections * self.completions or state.global_step
            self.course.look(at, state.global_step, lambda: model)


def train(
    name: str,
    task: Task,
    course: Course,
    settings: Mapping[str, Any],
    budget: int,
    seed: int,
    logged: Sequence[Row] = (),
    stale: int = 0,
) -> dict[str, Any]:
    """One run of `budget` scored completions; of none, as many updates as the last mark says by `predicted_rewards` of
    the logged ones. settings: learning_rate, completions an update, iterations over each, and any other field of TRL's
    configuration.

    logged: the model is first fine-tuned on its successes for `logged_updates`, since these methods cannot use them.
    stale: so many completions are written at once and then learned from in turn, importance ratios against the policy
    that wrote them; 0: as many as an update takes.
    """
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    trainer_of, config_of = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[name]
    chosen = dict(settings)
    completions, iterations = chosen.pop("completions"), chosen.pop("iterations")
    slices = max(1, stale // completions)
    first = chosen.pop("logged_updates", 0)
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(
            output_dir=folder,
            per_device_train_batch_size=completions,
            steps_per_generation=slices,
            num_iterations=iterations,
            max_completion_length=task.length,
            max_steps=budget // completions * iterations or -(-course.marks[-1] // iterations) * iterations,
            seed=seed,
            **{**COMMON, **chosen},
        )
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        trainer = trainer_of(
            model=_tuned_on(logged, task, course, first, seed, Path(folder)) if first else str(task.base()),
            reward_funcs=[course.scored if budget else predicted_rewards(task, logged)],
            args=config,
            train_dataset=Dataset.from_list(task.train),
            processing_class=course.tokenizer,
            peft_config=lora_of(task),
            callbacks=[_Watch(course, completions * slices if budget else 0, iterations * slices)],
        )
        trainer.train()
    if course.scored.count != budget:
        raise RuntimeError(f"{course.scored.count} completions were judged, the budget was {budget}")
    return {}


def _tuned_on(logged: Sequence[Row], task: Task, course: Course, updates: int, seed: int, folder: Path) -> str:
    """A folder with the base model after so many updates on the successes of a log, at the rate that suits those."""
    course.look(0, 0, lambda: course.base)
    tuner = Tuner(task, course, FIRST_RATE * (LORA_FACTOR["sft"] if task.tuned == "lora" else 1), seed)
    kept = successes(tuner, logged)
    for _ in range(updates):
        tuner.step(kept, FIRST_BATCH)
    model: Any = tuner.model
    if task.tuned == "lora":
        model = model.merge_and_unload()
    model.save_pretrained(folder / "tuned")
    return str(folder / "tuned")
