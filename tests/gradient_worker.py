"""One process of `test_processes`: learns from its share of fixed episodes and writes its gradients."""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from llm_dqn.policy import sampled
from llm_dqn.rollout import rollout
from tests.networks import shake
from tests.test_trainer import trainer


def main(path: str, folder: str) -> None:
    torch.set_num_threads(1)
    run = trainer(path, Path(folder) / "run", max_grad_norm=1e9, temperature=1.0, advantage_weight=1.0)
    rank, world = run.parts.accelerator.process_index, run.parts.accelerator.num_processes
    prompts = run.parts.stream.prompts[:8]  # the same on every process
    episodes = run.score(rollout(run.parts.writer, prompts, sampled(), seed=5))
    run.replay.add(episodes)
    shake(run.network, 0.05)
    run.network.sync_target(0.5)
    slots = np.arange(8)[rank * 8 // world : (rank + 1) * 8 // world]
    batch = run.replay.batch(slots)
    gradients = {}

    def note() -> None:
        for name, parameter in run.network.named_parameters():
            if parameter.grad is not None:
                gradients[name] = parameter.grad.clone()

    run.parts.optimizer.step = note  # type: ignore[method-assign]
    run.parts.scheduler.step = lambda: None  # type: ignore[method-assign]
    run.update([batch])
    save_file(gradients, Path(folder) / f"gradients-{world}-{rank}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
