"""When memory runs out: half as many rows at a time, once; the second time is the end."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from llm_dqn.errors import StepFailed

T = TypeVar("T")
_SAYINGS = ("out of memory", "can't allocate memory", "CUDNN_STATUS_NOT_SUPPORTED")  # what torch's allocators say


class OutOfMemory(StepFailed):
    """Even half of the rows at a time were too many."""


class MicroBatch:
    """How many rows go through the model at a time in one kind of work.

    work: its name for people. cure: what to set lower for good. say: where a line for people goes.
    """

    def __init__(self, size: int, work: str, cure: str, say: Callable[[str], None], may_halve: bool = True) -> None:
        self.size, self.work, self.cure, self.say = size, work, cure, say
        self.may_halve = may_halve

    def run(self, work: Callable[[int], T], rows: int) -> T:
        """`work(size)` on so many rows; when memory runs out, again with half the size.

        Raises OutOfMemory when that, too, is more than there is.
        """
        while True:
            try:
                return work(self.size)
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                self._halve(min(self.size, rows), str(error))
            # only here, where the error no longer holds on to the tensors of what failed, can memory be freed
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def _halve(self, rows: int, reason: str) -> None:
        if not self.may_halve or rows == 1:
            first = reason.splitlines()[0] if reason else "no reason given"
            raise OutOfMemory(f"out of memory while {self.work}, {rows} rows at a time ({first}); {self.cure}")
        self.say(f"out of memory while {self.work}, {rows} rows at a time: from now on {rows // 2}")
        self.size, self.may_halve = rows // 2, False


def writing_batch(size: int, say: Callable[[str], None]) -> MicroBatch:
    """Completions written at a time."""
    cure = "set rollout.max_completion_length or data.max_prompt_length lower"
    return MicroBatch(size, "writing completions", cure, say)


def learning_batch(size: int, say: Callable[[str], None], alone: bool) -> MicroBatch:
    """Episodes in a forward and backward pass, in which processes wait for one another: none can begin again alone."""
    cure = "halve train.per_device_train_batch_size and double train.gradient_accumulation_steps"
    return MicroBatch(size, "learning", cure, say, may_halve=alone)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on a GPU or in the machine."""
    return isinstance(error, torch.OutOfMemoryError) or any(saying in str(error) for saying in _SAYINGS)
