"""Starting several processes, and being sure that they did start."""

import logging
import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from llm_dqn.errors import RunError, UserError

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

    os.environ[WORLD_SIZE] = str(count)
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
        del os.environ[WORLD_SIZE]
    return 0


def _exit_code(failures: Mapping[int, Any]) -> int:
    """What the processes agreed on, from what is known of each that failed; RunError when none of them could say."""
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    said = [code for code in codes.values() if code > 0]
    if said:
        return min(said)
    rank, code = next(iter(codes.items()))
    raise RunError(f"process {rank} was ended from outside by {signal.Signals(-code).name}; --resume goes on")


def accelerator_for(find_unused_parameters: bool) -> Accelerator:
    """Accelerate on whatever started this process. Without a GPU several processes talk over gloo.

    Raises RunError when fewer processes run than were asked for: a second one that silently did not start would train
    on half of everything without a word.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    accelerator = Accelerator(
        cpu=several and not torch.cuda.is_available(),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)],
    )
    wanted = int(os.environ.get(WORLD_SIZE, os.environ.get("WORLD_SIZE", "1")))
    if accelerator.num_processes != wanted:
        raise RunError(f"{wanted} processes were asked for and {accelerator.num_processes} run")
    return accelerator
