"""Text of models, data and strangers' files is shown in a terminal, never obeyed by it."""

import io
import logging
import re
import sys
import warnings
from typing import Any

# C0 and C1 controls and DEL; marks that turn the direction of text around or are invisible; half characters, which no
# terminal can be sent
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def harmless(text: Any) -> str:
    r"""The text with its control characters spelled out (`\x1b`, `\u202e`); line ends and tabs stay."""
    return _CONTROL.sub(_spelled, str(text).replace("\r\n", "\n"))


def one_line(text: Any) -> str:
    """The same as one line: line ends become ⏎, tabs become blanks."""
    return harmless(text).replace("\n", " ⏎ ").replace("\t", " ")


def _spelled(match: re.Match[str]) -> str:
    number = ord(match[0])
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def any_script() -> None:
    """Spells out what the terminal's encoding cannot say, instead of failing: 你 becomes a number where LC_ALL is C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def say(text: str, err: bool = False, nl: bool = True) -> None:
    """Prints what may hold text of strangers; commands print through this or through `console`."""
    print(harmless(text), end="\n" if nl else "", file=sys.stderr if err else sys.stdout, flush=True)


class HarmlessHandler(logging.Handler):
    """Prints the messages of log records, whatever stderr is at that moment (a live panel takes its place)."""

    def emit(self, record: logging.LogRecord) -> None:
        print(harmless(self.format(record)), file=sys.stderr)


def hush() -> None:
    """Keeps transformers' loading bars and its notes to other libraries' authors off the screen of a run."""
    from transformers.utils import logging as library

    library.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
