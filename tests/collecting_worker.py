"""One of two learner processes whose completions others write: collectors of their own, and then one elsewhere."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from llm_dqn.recipe import load_recipe
from llm_dqn.trainer import DQNTrainer

SIZE, BUDGET, STEPS = 16, 56, 4  # completions of a collection and in all, learner steps between two
SCENES = {"overlap": ["rollout.overlap=1"], "elsewhere": ["rollout.collectors={home}/segments"]}


def settings(home: str, scene: str) -> list[str]:
    """Overrides of hello_world, for learner and collector."""
    facts = [f"reward.funcs=[{home}/judge.py:length]", "reward.cache=false", f"train.output_dir={home}/{scene}"]
    facts += [f"rollout.prompts_per_collect={SIZE}", "replay.learning_starts=8", f"replay.updates_per_collect={STEPS}"]
    facts += ["train.per_device_train_batch_size=8", "train.save_steps=0", "train.eval_steps=0"]
    facts += [f"train.max_scored_completions={BUDGET}", "train.final_eval_prompts=2", "train.logging_steps=1"]
    return [*facts, *(text.format(home=home) for text in SCENES[scene])]


def main(home: str) -> None:
    torch.set_num_threads(1)
    notes: dict[str, Any] = {}
    for scene in SCENES:
        run = DQNTrainer.from_recipe(load_recipe("hello_world", settings(home, scene)))
        run.train()
        weights = float(sum(parameter.detach().double().sum() for parameter in run.parts.trainable))
        notes[scene] = {"scored": run.scored_completions, "held": len(run.replay), "weights": weights}
        notes[scene]["texts"] = [episode.tolist() for episode in run.replay.state_arrays()["tokens"][None]]
    Path(home, f"notes-{torch.distributed.get_rank()}.json").write_text(json.dumps(notes))


if __name__ == "__main__":
    main(sys.argv[1])
