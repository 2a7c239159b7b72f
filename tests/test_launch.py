"""The launchers with real processes, what `accelerate launch` would do silently, and the shipped configurations."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from llm_dqn.errors import UserError
from llm_dqn.launch import check_launch

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "recipes" / "accelerate"
SETTINGS = ["train.max_steps=4", "train.eval_steps=0", "train.save_steps=0", "train.final_eval_prompts=4"]
LAUNCHERS = {  # `--num-processes` is proven in test_processes
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "llm_dqn"],
    "accelerate": [
        *("-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(CONFIGS / "ddp.yaml")),
        *("--num_processes", "2", "-m", "llm_dqn"),
    ],
}


def launched(before: list[str], after: list[str], **environment: str) -> subprocess.CompletedProcess:
    settings = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *before, "train", "hello_world", *after]
    return subprocess.run(command, cwd=ROOT, env=settings | environment, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_by_every_launcher(launcher, tmp_path):
    """They are two: both have a replay, and each wrote half of a collection."""
    ran = launched(LAUNCHERS[launcher], [*SETTINGS, f"train.output_dir={tmp_path}/run"])
    assert ran.returncode == 0, ran.stderr[-3000:]
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 4 and line["scored_completions"] == 128  # 64 a collection; each must hold 64
    names = {path.name for path in (tmp_path / "run" / "checkpoints" / "step-000004").iterdir()}
    assert {"replay-00000.safetensors", "replay-00001.safetensors"} <= names


def test_accelerate_launch_on_a_cpu_that_would_run_one_process_is_an_error(tmp_path):
    """`--cpu --num_processes 2` starts one; the message says what to type instead."""
    before = ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2", "-m", "llm_dqn"]
    ran = launched(before, [f"train.output_dir={tmp_path}/run"])
    assert ran.returncode != 0 and not (tmp_path / "run").exists()
    assert "asked for 2 processes and started one" in ran.stderr and "--num-processes 2" in ran.stderr


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP is not supported by `train`.*Accelerate would train whole copies"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DEEPSPEED is not supported"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "MEGATRON_LM is not supported"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "train.bf16=true"),
    ],
)
def test_what_accelerate_would_do_otherwise_is_refused(variable, value, said, monkeypatch):
    check_launch()
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=said):
        check_launch()


@pytest.mark.parametrize(
    ("name", "kind", "processes", "machines"),
    [
        ("single", DistributedType.NO, 1, 1),
        ("ddp", DistributedType.MULTI_GPU, 8, 1),
        ("fsdp2", DistributedType.FSDP, 8, 1),
        ("multi_node", DistributedType.MULTI_GPU, 16, 2),
    ],
)
def test_shipped_configurations_are_what_accelerate_understands(name, kind, processes, machines, monkeypatch):
    """Read by Accelerate's own classes, which refuse unknown keys, and taken through its launcher up to the start."""
    config = ClusterConfig.from_yaml_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes, config.num_machines) == (kind, processes, machines)
    assert config.mixed_precision == "no" and not config.use_cpu
    arguments = ["--config_file", str(CONFIGS / f"{name}.yaml"), "-m", "llm_dqn", "train", "hello_world"]
    options, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    assert options.multi_gpu == (kind == DistributedType.MULTI_GPU) and options.use_fsdp == (
        kind == DistributedType.FSDP
    )
    if name == "single":
        return
    environment = prepare_multi_gpu_env(options)
    assert options.nproc_per_node == "8" and environment["ACCELERATE_MIXED_PRECISION"] == "no"
    if name == "multi_node":
        assert options.nnodes == "2" and options.rdzv_endpoint == "127.0.0.1:29500"
    if name == "fsdp2":
        for key, value in environment.items():
            if "FSDP" in key:
                monkeypatch.setenv(key, value)
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
        with pytest.raises(UserError, match="FSDP is not supported"):
            check_launch()
