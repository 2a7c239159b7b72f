"""The two ways in which a command can end badly, told apart so that people know whose turn it is."""


class UserError(ValueError):
    """What the user gave is wrong: a recipe key, a file, a column, a reward.

    The message names the thing as it was typed, the value received and the cure. The command line prints it without a
    traceback and exits with 2.
    """


class RunError(RuntimeError):
    """The input was fine and the run failed all the same; the command line exits with 1."""


class NotReachable(UserError):
    """Something that lies on the Hub cannot be had now: not in the cache, and no connection (or no such repository)."""
