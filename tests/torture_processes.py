"""The same torture for two processes that train together: `kill -9` ends one of them at a random moment.

    python -m tests.torture_processes --kills 100     # some seconds of two cores for each kill

The other one must be gone within 20 seconds: while it starts, after the SIGTERM that a launcher sends it, and from then
on by itself. Then both are resumed, and must leave what the two that were never killed have left, replays and all.
"""

import contextlib
import os
import random
import signal
import socket
import threading
import time
from pathlib import Path

from tests.torture import KILLED, Torture, Watch, forked, main, train

LIMIT = 20.0  # seconds


class Two(Watch):
    """Follows one of two processes, the one to be killed, and sees that the other does not outlive it."""

    def __init__(self, victim: Watch, other: Watch) -> None:
        super().__init__(victim.child, victim.reading)
        self.other = other

    def kill(self) -> int:
        """Ends the victim at once, which must end the other; the exit code, of both when the victim was faster."""
        code, began = super().kill(), time.monotonic()
        if code != KILLED:
            return code
        self.other.follow(until=began + 0.01)
        if not self.other.entered or "start" in self.other.active:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.other.child, signal.SIGTERM)
        if self.other.follow(until=began + LIMIT):
            os.kill(self.other.child, signal.SIGKILL)
            raise RuntimeError(
                f"one process was killed in {self.where()!r}, and {LIMIT:g} s later the other was still there"
            )
        self.other.ended()
        return code

    def ended(self) -> int:
        """Waits for both; an exit code that is not 0 where there is one."""
        codes = [super().ended()]
        if codes[0] != KILLED:  # else `kill` looks after the other
            self.other.follow(until=time.monotonic() + 600)
            codes.append(self.other.ended())
        return next((code for code in codes if code != 0), 0)


class TortureOfTwo(Torture):
    """Trials of two processes each."""

    def start(self, run: Path, resume: bool) -> Watch:
        """Both, on their way; which of them may be killed depends on seed, trial and whether it is resumed."""
        port = free_port()
        watches = []
        for rank in range(2):

            def work(told: int, rank: int = rank) -> None:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                train(run, resume, told)

            watches.append(Watch(*forked(work, run.with_suffix(".log"))))
        victim = random.Random(f"{self.seed} {run.name} {resume}").randrange(2)
        return Two(watches[victim], watches[1 - victim])


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    assert threading.active_count() == 1
    main(TortureOfTwo, "python -m tests.torture_processes")
