"""Being asked to stop: finish the step, save, leave. Asked twice: leave at once."""

import signal
import sys
from types import FrameType


class StopRequest:
    """While the context is open, SIGTERM and Ctrl-C only take note; the loop looks at `requested`."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested: int | None = None
        self._before: dict[int, object] = {}

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells count: 143 or 130; 143 when only another process was asked."""
        return 128 + (self.requested or signal.SIGTERM)

    def __enter__(self) -> "StopRequest":
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._take_note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            sys.exit(self.exit_code)
        self.requested = number
