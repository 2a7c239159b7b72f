"""Two real processes over gloo: the same gradients as one, a whole run, and a failure that ends both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _run(*command: str, timeout: int = 240) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout
    )


def test_two_processes_with_half_the_batch_each_have_the_gradients_of_one(tiny_llama_path, tmp_path):
    """Invariant 5, second half. Episodes differ in length, so a mean of means would not do."""
    one = _run("-m", "tests.gradient_worker", tiny_llama_path, str(tmp_path))
    assert one.returncode == 0, one.stderr[-3000:]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = _run(*launch, "-m", "tests.gradient_worker", tiny_llama_path, str(tmp_path))
    assert two.returncode == 0, two.stderr[-3000:]
    alone = load_file(tmp_path / "gradients-1-0.safetensors")
    assert max(gradient.abs().max().item() for gradient in alone.values()) > 1e-3
    for rank in (0, 1):
        shared = load_file(tmp_path / f"gradients-2-{rank}.safetensors")
        assert shared.keys() == alone.keys()
        for name, gradient in alone.items():
            assert torch.allclose(shared[name], gradient, atol=1e-6), name


def _recipe(path: str, folder: Path, reward: str) -> Path:
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"the film {i}"}) + "\n" for i in range(16)))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {{model_name_or_path: {path}}}\n"
        f"data: {{train: {folder}/prompts.jsonl}}\n"
        "rollout: {max_completion_length: 5, prompts_per_collect: 8}\n"
        f"reward: {{funcs: ['{reward}']}}\n"
        "replay: {learning_starts: 4, updates_per_collect: 2, capacity: 64}\n"
        f"train: {{output_dir: {folder}/run, max_steps: 4, per_device_train_batch_size: 4, logging_steps: 2,\n"
        "        eval_steps: 0, save_steps: 2, final_eval_prompts: 3}\n"
    )
    return recipe


@pytest.mark.slow
def test_num_processes_trains_and_resumes_with_both(tiny_llama_path, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text("def length(completions, **columns):\n    return [float(len(text)) for text in completions]\n")
    recipe = _recipe(tiny_llama_path, tmp_path, f"{reward}:length")
    for extra, steps in ((), 4), (("train.max_steps=6", "--resume"), 6):
        ran = _run("-m", "llm_dqn", "train", str(recipe), *extra, "--num-processes", "2")
        assert ran.returncode == 0, ran.stderr[-3000:]
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == steps and lines[-1]["scored_completions"] == 4 * steps
    names = {path.name for path in (tmp_path / "run" / "checkpoints" / "step-000006").iterdir()}
    assert {"replay-00000.safetensors", "replay-00001.safetensors"} <= names


def test_fewer_processes_than_asked_for_is_an_error(tiny_llama_path, tmp_path, monkeypatch):
    from llm_dqn.errors import RunError
    from llm_dqn.launch import WORLD_SIZE, accelerator_for

    monkeypatch.setenv(WORLD_SIZE, "2")
    with pytest.raises(RunError, match="2 processes were asked for and 1 run"):
        accelerator_for()
