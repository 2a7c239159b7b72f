"""The two ways in which a command can end badly, told apart so that people know whose turn it is."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What the user gave is wrong: a recipe key, a file, a column, a reward.

    The message names the thing as it was typed, the value received and the cure. The command line prints it without a
    traceback and exits with 2.
    """


class RunError(RuntimeError):
    """The input was fine and the run failed all the same; the command line exits with 1."""

    heading = "the run failed"  # what people read before the message


class StepFailed(RunError):
    """A step could not be finished, and everything before it is whole: it can be saved and tried again."""


class NotReachable(UserError):
    """Something that lies on the Hub cannot be had now: not in the cache, and no connection (or no such repository)."""


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice that was probably meant by a mistyped name, or None when nothing is close."""
    by_form = {_form(choice): choice for choice in choices}
    close = difflib.get_close_matches(_form(name), by_form, n=1, cutoff=0.6)
    return by_form[close[0]] if close else None


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """'; did you mean x?' for the choice that was probably meant, or nothing."""
    close = nearest(name, choices)
    return f"; did you mean {close}?" if close else ""


def _form(name: str) -> str:
    return name.lower().replace("-", "_")
