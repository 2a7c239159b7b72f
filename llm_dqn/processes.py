"""Several processes that end together: what fails on one of them ends all, in seconds, with the same message.

A process that waits in a collective for one that failed would wait for half an hour. Two things keep it from that.
Where the user's code runs, the processes `agree` on how it went before they go on, so that they can still save. For
everything else each process watches the others: a failure is posted where all see it, a process that was killed is
missed by those on the same machine, and whoever still waits `GRACE` seconds later is ended.
"""

import json
import multiprocessing
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from llm_dqn.errors import RunError, StepFailed, UserError
from llm_dqn.signals import Stopped, ignore_signals
from llm_dqn.terminal import say

T = TypeVar("T")
PERIOD = 0.3  # seconds between two looks at the others
GRACE = 10.0  # seconds that a process has to end by itself once another one failed
LAUNCHER = "LLM_DQN_LAUNCHER"  # process id of the launcher, where it could say
_FAILURE = "failure"
_KINDS: dict[str, type[Exception]] = {"UserError": UserError, "StepFailed": StepFailed, "RunError": RunError}
Failure = tuple[str, str]  # (one of _KINDS, message)


class Processes:
    """The processes of a run, seen from one of them. With a single process everything here is a plain call.

    device: where tensors for collectives must be. All processes make and leave this context together.
    """

    def __init__(self, rank: int, world: int, device: torch.device | str = "cpu") -> None:
        self.rank, self.world, self.device = rank, world, device
        self._store: dist.Store | None = None
        self._places: list[str] = []  # "host pid" of every process
        self._known: Failure | None = None  # the first one, wherever it was
        self._agreed = False
        self._over = threading.Event()

    def __enter__(self) -> "Processes":
        if self.world > 1:
            self._known, self._agreed = None, False
            self._over.clear()
            self._meet()
            threading.Thread(target=self._watch, daemon=True, name="watches-other-processes").start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.world == 1:
            return
        if isinstance(error, Exception | Stopped):
            ignore_signals()  # a launcher that loses one process asks the others to stop, and they have more to say
        try:
            if error is None:
                self.gather(None)
            elif isinstance(error, Exception):
                raise self._failed(error) from error
            elif isinstance(error, Stopped) and (failure := self._awaited()) is not None:
                raise _error_of(failure)
        finally:
            self._leave()

    @property
    def together(self) -> bool:
        """Whether all processes are at the same place and may still work together, though something failed."""
        return self.world == 1 or self._agreed

    # --- agreeing ---------------------------------------------------------------------------------------------------

    def agree(self, work: Callable[[], T]) -> T:
        """What `work` returns. When it fails on some process, all raise the same error, naming that process."""
        if self.world == 1:
            return work()
        result: Any = None
        failure: Failure | None = None
        try:
            result = work()
        except Exception as error:
            failure = self._post(error)
        failed = torch.tensor(0.0 if failure is None else 1.0, device=self.device)
        dist.all_reduce(failed)  # one short message; what went wrong needs longer ones
        for first in self.gather(failure) if failed > 0 else ():
            if first is not None:
                self._known, self._agreed = first, True
                raise _error_of(first)
        return result

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank."""
        if self.world == 1:
            return [value]
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, value)
        return everyone

    def gather_all(self, values: Sequence[T]) -> list[T]:
        """The values of all processes in one list, by rank."""
        return [value for each in self.gather(values) for value in each]

    def share(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """What each job returns, in order, on all processes; each job runs on one of them, as `agree` runs it."""
        mine = self.agree(lambda: [job() for job in jobs[self.rank :: self.world]])
        everyone = self.gather(mine)
        return [everyone[number % self.world][number // self.world] for number in range(len(jobs))]

    # --- watching ---------------------------------------------------------------------------------------------------

    def _meet(self) -> None:
        """Opens a place for messages, which process 0 keeps, and learns where everyone is."""
        host = os.environ.get("MASTER_ADDR", "localhost")
        if self.rank == 0:
            self._store = dist.TCPStore(host, 0, self.world, is_master=True, wait_for_workers=False)
        ports = [self._store.port if self.rank == 0 else 0]  # type: ignore[union-attr]
        dist.broadcast_object_list(ports, src=0, device=torch.device(self.device))
        if self.rank != 0:
            seconds = timedelta(seconds=60)
            self._store = dist.TCPStore(host, ports[0], self.world, is_master=False, timeout=seconds)
        self._places = self.gather(f"{socket.gethostname()} {os.getpid()}")

    def _watch(self) -> None:
        noticed = None
        while not self._over.wait(PERIOD):
            try:
                self._look()
            except RuntimeError:  # the store is gone, and process 0 with it
                self._known = self._known or ("RunError", self._missing(0))
            if self._known is None or self._agreed:
                continue
            noticed = noticed or time.monotonic()
            if time.monotonic() - noticed > GRACE:
                self._end()

    def _look(self) -> None:
        assert self._store is not None
        if self._store.check([_FAILURE]):
            self._known = self._known or tuple(json.loads(self._store.get(_FAILURE)))
            return
        here = socket.gethostname()
        for rank, place in enumerate(self._places):
            host, pid = place.rsplit(" ", 1)
            if host == here and not _exists(int(pid)) and not self._store.check([f"left {rank}"]):
                self._known = self._publish("RunError", self._missing(rank))

    def _end(self) -> None:
        """Ends this process from outside its main thread, which waits for one that will not come."""
        assert self._known is not None
        _end_now(self._known[1], 2 if self._known[0] == "UserError" else 1)

    def _leave(self) -> None:
        """Says goodbye; process 0 stays until the others have had time to read why it goes."""
        try:
            if self._store is not None:
                self._store.set(f"left {self.rank}", "")
            if self._known is not None and self.rank == 0:
                time.sleep(3 * PERIOD)
        except RuntimeError:
            self._store = None
        finally:
            self._over.set()

    # --- failing ----------------------------------------------------------------------------------------------------

    def _failed(self, error: Exception) -> Exception:
        """What to raise for an error: the failure of another process when that came first."""
        if not isinstance(error, UserError | RunError):
            self._awaited()
        self._known = self._known or self._post(error)
        return _error_of(self._known)

    def _awaited(self) -> Failure | None:
        """The failure of another process; a broken connection is noticed a little before its reason is."""
        deadline = time.monotonic() + 4 * PERIOD
        while self._known is None and time.monotonic() < deadline:
            time.sleep(PERIOD / 4)
        return self._known

    def _post(self, error: Exception) -> Failure:
        if not isinstance(error, UserError | RunError):
            traceback.print_exception(error)
        kind = next((name for name, kind in _KINDS.items() if isinstance(error, kind)), None)
        text = str(error) if kind else f"{type(error).__name__}: {error}"
        return self._publish(kind or "RunError", f"process {self.rank} of {self.world}: {text}")

    def _publish(self, kind: str, message: str) -> Failure:
        """Posts a failure unless there is one; returns the one that stands."""
        mine = json.dumps([kind, message])
        if self._store is None:
            return kind, message
        try:
            return tuple(json.loads(self._store.compare_set(_FAILURE, "", mine)))
        except RuntimeError:  # process 0 took the store with it
            return kind, message

    def _missing(self, rank: int) -> str:
        return f"process {rank} of {self.world} was ended from outside (killed, or memory ran out)"


def end_with_launcher() -> None:
    """Has this process end when torch's launcher, which started it, is killed.

    It would otherwise go on and hold the run folder where nobody looks, or wait half an hour for others at its start.
    """
    launcher = int(os.environ.get(LAUNCHER, os.getppid()))

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(PERIOD)
        _end_now("the launcher of the processes was ended from outside (killed); --resume goes on", 1)

    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=watch, daemon=True, name="watches-launcher").start()


def _end_now(message: str, code: int) -> None:
    for child in multiprocessing.active_children():
        child.kill()
    say(f"the run failed: {message}", err=True)
    os._exit(code)


def _error_of(failure: Failure) -> Exception:
    return _KINDS[failure[0]](failure[1])


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
