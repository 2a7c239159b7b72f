"""When memory runs out: half as many rows at a time, once; the second time is the end.

Several processes that learn together begin again together: `Attempt` holds back the error of the one whose memory ran
out until all have met in the sum of their gradients, where the others hear of it.
"""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from llm_dqn.errors import StepFailed

T = TypeVar("T")
_SAYINGS = ("out of memory", "can't allocate memory", "CUDNN_STATUS_NOT_SUPPORTED")  # what torch's allocators say


class OutOfMemory(StepFailed):
    """Even half of the rows at a time were too many."""


class RanOutTogether(RuntimeError):
    """Memory ran out somewhere; every process raises this at the same place. here: whether on this one."""

    def __init__(self, reason: str, here: bool) -> None:
        super().__init__(reason)
        self.here = here


class Attempt:
    """Work that all processes do side by side, in pieces, and in which memory may run out on some of them.

    alone: nobody waits for this process, so errors go their way at once.
    """

    def __init__(self, alone: bool) -> None:
        self.alone = alone
        self.reason = ""  # what the allocator said when memory ran out here

    def do(self, work: Callable[[], T], otherwise: T) -> T:
        """What `work` returns; `otherwise` when memory runs out, here or in a piece before."""
        if self.alone:
            return work()
        if not self.reason:
            try:
                return work()
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                self.reason = str(error) or "no reason given"
            _free()
        return otherwise


class MicroBatch:
    """How many rows go through the model at a time in one kind of work.

    work: its name for people. cure: what to set lower for good. say: where a line for people goes. agree: of the
    processes that begin again together, and then only after RanOutTogether; None where each does so for itself.
    """

    def __init__(
        self, size: int, work: str, cure: str, say: Callable[[str], None], agree: Callable | None = None
    ) -> None:
        self.size, self.work, self.cure, self.say, self.agree = size, work, cure, say, agree
        self.may_halve = True

    def run(self, work: Callable[[int], T], rows: int) -> T:
        """`work(size)` on so many rows; when memory runs out, again with half the size.

        Raises OutOfMemory when that, too, is more than there is.
        """
        while True:
            try:
                return work(self.size)
            except RuntimeError as error:
                if not (ran_out(error) if self.agree is None else isinstance(error, RanOutTogether)):
                    raise
                self._halve(min(self.size, rows), error)
            # only here, where the error no longer holds on to the tensors of what failed, can memory be freed
            _free()

    def _halve(self, rows: int, error: RuntimeError) -> None:
        if self.may_halve and rows > 1:
            self.say(f"out of memory while {self.work}, {rows} rows at a time: from now on {rows // 2}")
            self.size, self.may_halve = rows // 2, False
            return
        first = str(error).splitlines()[0] if str(error) else "no reason given"
        failure = OutOfMemory(f"out of memory while {self.work}, {rows} rows at a time ({first}); {self.cure}")
        if self.agree is not None:
            self.agree(lambda: _fail(failure) if getattr(error, "here", True) else None)
        raise failure


def _fail(error: Exception) -> None:
    raise error


def _free() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def writing_batch(size: int, say: Callable[[str], None]) -> MicroBatch:
    """Completions written at a time."""
    cure = "set rollout.max_completion_length or data.max_prompt_length lower"
    return MicroBatch(size, "writing completions", cure, say)


def learning_batch(size: int, say: Callable[[str], None], agree: Callable | None) -> MicroBatch:
    """Episodes in a forward and backward pass. agree: see `MicroBatch`."""
    cure = "halve train.per_device_train_batch_size and double train.gradient_accumulation_steps"
    return MicroBatch(size, "learning", cure, say, agree)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on a GPU or in the machine."""
    return isinstance(error, torch.OutOfMemoryError) or any(saying in str(error) for saying in _SAYINGS)
