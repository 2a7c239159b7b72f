"""Starting several processes, and being sure that they did start."""

import logging
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from llm_dqn.errors import RunError, UserError
from llm_dqn.processes import LAUNCHER, end_with_launcher

WORLD_SIZE = "LLM_DQN_WORLD_SIZE"  # how many processes were asked for
STOPPING = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # seconds in which processes that were asked to stop may save


def launch_processes(count: int, arguments: Sequence[str]) -> int:
    """Runs `python -m llm_dqn ARGUMENTS` in `count` processes of this machine by torch's launcher; its exit code.

    Raises UserError when there are fewer GPUs than processes on a machine that has any, RunError when a process was
    killed.
    """
    if count < 1:
        raise UserError(f"--num-processes must be at least 1, got {count}")
    gpus = torch.cuda.device_count()
    if gpus and count > gpus:
        raise UserError(f"--num-processes {count}: this machine has {gpus} GPUs")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    os.environ[WORLD_SIZE], os.environ[LAUNCHER] = str(count), str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    os.environ.setdefault(STOPPING, "600")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # pages of frames when a process is lost
    # The processes say themselves what happened; the launcher would add a page about exit codes.
    for name in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        main(["--standalone", f"--nproc-per-node={count}", "-m", "llm_dqn", *arguments])
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        return _exit_code(error.failures)
    finally:
        del os.environ[WORLD_SIZE], os.environ[LAUNCHER]
    return 0


def _exit_code(failures: Mapping[int, Any]) -> int:
    """What the processes agreed on, from what is known of each that failed; RunError when none of them could say."""
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    said = [code for code in codes.values() if code > 0]
    if said:
        return min(said)
    rank, code = next(iter(codes.items()))
    raise RunError(f"process {rank} was ended from outside by {signal.Signals(-code).name}; --resume goes on")


def check_launch() -> None:
    """Refuses what `accelerate launch` would turn into something else than was asked for, without a word.

    Raises UserError that names the setting and what to do instead.
    """
    environment = os.environ
    if environment.get("ACCELERATE_USE_FSDP") == "true":
        where = "" if torch.cuda.is_available() else "; without a GPU Accelerate would train whole copies (DDP) instead"
        raise UserError(
            "accelerate launch: distributed_type FSDP is not supported by `train`: completions are written by each "
            "process in its own number of steps, and sharded weights would wait for one another for ever" + where + "; "
            "use recipes/accelerate/ddp.yaml and train.sharding=fsdp2 in the recipe, which shards while it learns"
        )
    for name, what in (("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED"), ("ACCELERATE_USE_MEGATRON_LM", "MEGATRON_LM")):
        if environment.get(name) == "true":
            raise UserError(f"accelerate launch: distributed_type {what} is not supported; use MULTI_GPU")
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise UserError(
            f"accelerate launch: mixed_precision {precision} would reach the online network and not the target; "
            "set it to 'no', and train.bf16=true in the recipe"
        )
    asked = _asked_of_accelerate()
    if asked > 1 and "WORLD_SIZE" not in environment:
        raise UserError(
            f"accelerate launch was asked for {asked} processes and started one, as it always does on CPUs; use "
            f"`llm-dqn train ... --num-processes {asked}`, `torchrun --nproc-per-node {asked} -m llm_dqn train ...` or "
            f"`accelerate launch --multi_gpu --num_processes {asked} -m llm_dqn train ...`, which works on CPUs, too"
        )


def _asked_of_accelerate() -> int:
    """Processes that the `accelerate launch` which started this one was asked for; 1 where that cannot be known."""
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    if "ACCELERATE_USE_CPU" not in os.environ or not parent.is_file():
        return 1
    typed = parent.read_bytes().decode(errors="replace").split("\0")[:-1]
    if "launch" not in typed:
        return 1
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    options = launch_command_parser().parse_args(typed[typed.index("launch") + 1 :])
    if options.num_processes is not None:
        return options.num_processes
    known = options.config_file or (default_config_file if os.path.isfile(default_config_file) else None)
    return load_config_from_file(known).num_processes if known and not options.cpu else 1


def accelerator_for() -> Accelerator:
    """Accelerate on whatever started this process. Without a GPU several processes talk over gloo.

    Raises RunError when fewer processes run than were asked for: a second one that silently did not start would train
    on half of everything without a word. Raises UserError as `check_launch` does.
    """
    check_launch()
    end_with_launcher()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    accelerator = Accelerator(
        cpu=several and not torch.cuda.is_available(),
        mixed_precision="no",  # train.bf16 reaches all roles alike
    )
    wanted = int(os.environ.get(WORLD_SIZE, os.environ.get("WORLD_SIZE", "1")))
    if accelerator.num_processes != wanted:
        raise RunError(f"{wanted} processes were asked for and {accelerator.num_processes} run")
    return accelerator
