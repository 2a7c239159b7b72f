"""Runs a reward function in a process of its own, because a function that hangs can only be stopped by ending it.

Imports the standard library alone: this is what the other process loads before the user's file.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import multiprocessing
import signal
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

START_SECONDS = 120.0  # for a worker to import the user's file, which may import a lot; not part of the timeout

# Where a function can be found again: (path of a file or name of a module, dotted name inside it).
Location = tuple[str, str]


class WorkerError(Exception):
    """What went wrong in the worker, with its traceback as text."""


def load_module(place: str) -> types.ModuleType:
    """A module by its dotted name, or the module of a '.py' file under a name that nothing else has."""
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).resolve()
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    written = path.stat().st_mtime_ns
    if name in sys.modules and vars(sys.modules[name]).get("_written") == written:
        return sys.modules[name]  # two functions of one file share what the file holds
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # so that the file can import its neighbours
    vars(module)["_written"] = written
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def find(location: Location) -> Any:
    """The object at a location."""
    found: Any = load_module(location[0])
    for name in location[1].split("."):
        found = getattr(found, name)
    return found


def plain_list(result: Any) -> list[Any]:
    """What a reward function returned as a list of plain values; TypeError unless it is a list, tuple or 1-D array."""
    if hasattr(result, "tolist") and hasattr(result, "shape"):
        if len(result.shape) != 1:
            raise TypeError(f"returned an array of shape {tuple(result.shape)}; expected (n,)")
        return result.tolist()
    if not isinstance(result, list | tuple):
        raise TypeError(f"returned {type(result).__name__}; expected a list with one number or None a completion")
    return [row.item() if getattr(row, "shape", None) == () and hasattr(row, "item") else row for row in result]


def ignore(*args: Any, **kwargs: Any) -> None:
    """Stands in for the logging callables that a reward function may expect."""


def _serve(connection: Connection, location: Location, search: list[str]) -> None:
    """The worker's life: say that the function is there, then answer calls until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    sys.path.extend(folder for folder in search if folder not in sys.path)
    try:
        function = find(location)
    except BaseException:
        connection.send((False, traceback.format_exc()))
        return
    connection.send((True, None))
    with contextlib.suppress(EOFError, OSError):
        while True:
            arguments = connection.recv()
            answer: tuple[bool, Any]
            try:
                answer = (True, plain_list(function(**arguments)))
            except BaseException as error:
                answer = (False, (f"{type(error).__name__}: {error}", traceback.format_exc()))
            _reply(connection, answer)


def _reply(connection: Connection, answer: tuple[bool, Any]) -> None:
    try:
        connection.send(answer)
    except (TypeError, AttributeError, ValueError) as error:  # a row that cannot travel is no number anyway
        connection.send((False, (f"returned values that cannot be sent between processes ({error})", "")))


class Worker:
    """Calls one reward function in another process, at most `timeout` seconds a call."""

    def __init__(self, location: Location, timeout: float) -> None:
        self.location, self.timeout = location, timeout
        self._process: Any = None
        self._connection: Connection | None = None

    def __call__(self, **arguments: Any) -> list[Any]:
        """The function's answer; TimeoutError when it takes too long (the process is ended), WorkerError otherwise."""
        connection = self._connected()
        try:
            connection.send(arguments)
            if not connection.poll(self.timeout):
                raise TimeoutError(f"no answer within {self.timeout:g} s")
            good, value = connection.recv()
        except BaseException as error:  # whatever it was, the next call must not find the answer to this one
            self.close()
            if isinstance(error, EOFError | ConnectionError):
                raise WorkerError("its process ended in the middle of a call") from error
            raise
        if not good:
            message, trace = value
            raise WorkerError(message) from (WorkerError(trace) if trace else None)
        return value

    def _connected(self) -> Connection:
        if self._connection is not None and self._process.is_alive():
            return self._connection
        self.close()
        context = multiprocessing.get_context("spawn")
        self._connection, far_end = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(far_end, self.location, list(sys.path)), daemon=True, name="reward"
        )
        with _without_main():
            self._process.start()
        far_end.close()
        try:
            ready, trace = self._connection.recv() if self._connection.poll(START_SECONDS) else (False, "no start")
        except EOFError:
            ready, trace = False, "its process ended while starting"
        if not ready:
            self.close()
            raise WorkerError(f"cannot be loaded in another process:\n{trace}")
        return self._connection

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
        self._process = self._connection = None


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keeps a new process from running the user's script again, which may have no __main__ guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def location_of(function: Callable[..., Any]) -> Location | None:
    """Where another process finds the same function, or None: lambdas, closures and notebook cells have no address."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not module or not name or module == "__main__" or "<" in name:
        return None
    try:
        return (module, name) if find((module, name)) is function else None
    except (ImportError, AttributeError):
        return None
