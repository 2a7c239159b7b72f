"""Being asked to stop: finish the step, save, leave. Asked twice: leave at once."""

import os
import signal
import threading
import time
from types import FrameType

SAME = 1.0  # seconds in which a launcher's signal is the terminal's once more: Ctrl-C arrives by both ways


class Stopped(BaseException):
    """Leave now, with this exit code. No `Exception` nor `SystemExit`, which reward functions are guarded against."""

    def __init__(self, code: int) -> None:
        super().__init__(f"stopped by signal {code - 128}")
        self.code = code


class StopRequest:
    """While the context is open, SIGTERM and Ctrl-C only take note; the loop looks at `requested`.

    A second signal unwinds whatever is going on, and a third one does not even do that.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested: int | None = None
        self._when = 0.0
        self._leaving = False
        self._window = SAME if "LOCAL_RANK" in os.environ else 0.0
        self._before: dict[int, object] = {}

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells count: 143 or 130; 143 when only another process was asked."""
        return 128 + (self.requested or signal.SIGTERM)

    @property
    def at_once(self) -> bool:
        """Whether it was asked twice."""
        return self._leaving

    def __enter__(self) -> "StopRequest":
        on_main_thread = threading.current_thread() is threading.main_thread()
        for number in self.SIGNALS if on_main_thread else ():  # Python tells no other thread of signals
            self._before[number] = signal.signal(number, self._take_note)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if isinstance(error, Stopped):
            raise SystemExit(error.code) from None

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested is None:
            self.requested, self._when = number, now
        elif now - self._when < self._window:
            return
        elif self._leaving:
            os._exit(self.exit_code)
        else:
            self._leaving, self._when = True, now
            raise Stopped(self.exit_code)


def ignore_signals() -> None:
    """For the last moments of a process that ends anyway."""
    if threading.current_thread() is threading.main_thread():
        for number in StopRequest.SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def leave(number: int, frame: FrameType | None) -> None:
    """Handler for all that is not training: unwinds, so that temporary files go."""
    raise Stopped(128 + number)
