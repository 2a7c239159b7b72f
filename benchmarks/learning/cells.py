"""One cell of the benchmark, (task, regime, method, configuration, seed, prompts), and how it is run."""

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.learning import dqn, fine_tuning, policy_gradients, reinforce
from benchmarks.learning.bases import cache_folder, digest
from benchmarks.learning.course import Course
from benchmarks.learning.measure import write
from benchmarks.learning.methods import REGIMES, for_task
from benchmarks.learning.tasks import TASKS, Row, Task
from llm_dqn import DQNConfig
from llm_dqn.assembly import price, return_lambda
from llm_dqn.logged import IMITATED_OF_LOG

LOGGED_ROWS = 2000
# Settings of llm_dqn that decide what is learned. A key that the library gets later joins them once its default does.
DECISIVE = (
    *("num_generations", "prompts_per_collect", "temperature", "top_k", "top_p", "min_p", "epsilon", "explore"),
    *("q_head", "beta", "gamma", "backup", "double", "n_step", "lam", "corrected", "loss", "target"),
    "importance_sampling_cap",
    *("target_sync_steps", "target_tau", "prior", "support_top_k", "advantage_weight", "expectile", "cql_weight"),
    *("negative_weight", "imagined", "reward_scale"),
    *(
        "truncated",
        "capacity",
        "learning_starts",
        "updates_per_collect",
        "prioritized",
        "success_share",
        "success_odds",
        "success_half_life",
        "target_kl",
    ),
    *("learning_rate", "value_learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "lr_scheduler_type"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
)


@dataclass(frozen=True)
class Cell:
    """What is run once. part: "tuning" or "test", the prompts it is measured on. marks: where it is measured; scored
    completions online (the last is the budget), updates on logged data.
    """

    task: str
    regime: str
    method: str
    settings: dict[str, Any]
    seed: int
    part: str
    marks: tuple[int, ...]

    @property
    def key(self) -> str:
        """Changes with anything that decides the outcome, the library's defaults among it."""
        facts: dict[str, Any] = {**asdict(self), "base": TASKS[self.task].base.name}
        if REGIMES[self.regime].methods[self.method].kind == "dqn":
            own = {name: self.settings[name] for name in dqn.OWN & self.settings.keys()}
            given = {name: value for name, value in self.settings.items() if name not in own}
            config = DQNConfig(output_dir="-", max_completion_length=TASKS[self.task].length, **given)
            rules = {"lam": return_lambda(config), "beta": price(config)}
            rules["imitated_share"] = config.imitated_share or IMITATED_OF_LOG
            resolved = config.model_dump() | rules
            logged_only = () if REGIMES[self.regime].online else ("held_out_share", "sharpened", "imitated_share")
            facts["settings"] = own | {name: resolved[name] for name in (*DECISIVE, *logged_only)}
        return digest(facts)


def logged_rows(task: Task) -> list[Row]:
    """2,000 completions that the base model once wrote to the training prompts, with their rewards."""
    file = cache_folder(f"logged-{task.name}-{task.base.name}.jsonl")
    if not file.exists():
        tokenizer = AutoTokenizer.from_pretrained(task.base())
        model = AutoModelForCausalLM.from_pretrained(task.base())
        rows = [task.train[number % len(task.train)] for number in range(LOGGED_ROWS)]
        prompts = [row["prompt"] for row in rows]
        torch.manual_seed(17)
        written = write(model, tokenizer, prompts, task.length)
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        rewards = task.judge()(prompts=prompts, completions=texts, **columns)
        ended = ["eos" if ids[-1] == tokenizer.eos_token_id else "length" for ids in written]
        names = ("prompt", "completion", "reward", "ended")
        # an empty completion is the end-of-sequence token alone: nothing that a text could say again
        lines = [dict(zip(names, facts, strict=True)) for facts in zip(prompts, texts, rewards, ended, strict=True)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines if line["completion"]), encoding="utf-8")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def run(cell: Cell) -> dict[str, Any]:
    """Runs the cell: its facts, and the points of its course."""
    task, regime = TASKS[cell.task], REGIMES[cell.regime]
    kind = regime.methods[cell.method].kind
    settings = for_task(cell.settings, task, kind)
    rows = task.tuning if cell.part == "tuning" else task.test
    logged = logged_rows(task)[: regime.logged] if regime.logged else []
    started, worked = time.time(), time.process_time()
    course = Course(task, rows, cell.marks, cell.seed)
    budget = cell.marks[-1] if regime.online else 0
    given = (task, course, settings, budget, cell.seed)
    if kind == "dqn":
        facts = dqn.train(*given, logged, regime.stale, search_too=regime.online and cell.part == "test")
    elif kind == "sft" and regime.online:
        facts = fine_tuning.train_online(*given, logged, regime.stale)
    elif kind == "sft":
        facts = fine_tuning.train_logged(task, course, settings, logged, cell.seed)
    elif kind == "reinforce":
        facts = reinforce.train(*given)
    else:
        facts = policy_gradients.train(kind, *given, logged, regime.stale)
    if course.marks:
        raise RuntimeError(f"{cell} ended before its marks {course.marks}")
    spent = {"wall": round(time.time() - started, 1), "cpu": round(time.process_time() - worked, 1)}
    return {**asdict(cell), **facts, "points": course.points, **spent}
