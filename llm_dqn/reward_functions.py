"""Finds the reward functions that a recipe or a script names. To load one is to run the code of its file or package."""

import ast
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from llm_dqn.errors import UserError, did_you_mean
from llm_dqn.isolation import undisturbed
from llm_dqn.reward_model import RewardModel
from llm_dqn.reward_worker import Location, load_module, location_of

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*[.:][A-Za-z_]\w*")


class RewardFunction:
    """A callable with the name it is logged under, the arguments it takes, and where another process finds it."""

    def __init__(self, function: Callable[..., Any], name: str | None = None, location: Location | None = None) -> None:
        if not callable(function):
            raise UserError(f"reward: {function!r:.80} is {type(function).__name__}, not a function, path or Hub id")
        own = function.name if isinstance(function, RewardModel) else getattr(function, "__name__", None)
        self.function = function
        self.name = str(name or own or type(function).__name__)
        self.location = location or location_of(function)
        self.is_model = isinstance(function, RewardModel)
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 -- an instance may be async through its class
        )
        self._takes, self._needs = _parameters(function)

    def select(self, arguments: dict[str, Any], table: str = "the data") -> dict[str, Any]:
        """Those of the arguments that the function takes, or all for **kwargs; `UserError` if one is missing."""
        missing = [name for name in self._needs if name not in arguments]
        if missing:
            raise UserError(
                f"the reward '{self.name}' needs '{missing[0]}', which is no column of {table}"
                f"{did_you_mean(missing[0], arguments)} (it gets: {', '.join(sorted(arguments))})"
            )
        return (
            arguments if self._takes is None else {name: arguments[name] for name in self._takes if name in arguments}
        )

    def __call__(self, **arguments: Any) -> Any:
        """Calls the function as it is."""
        return self.function(**arguments)


def _parameters(function: Callable[..., Any]) -> tuple[list[str] | None, list[str]]:
    """Names that the function takes (None = any) and names that it cannot do without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in callables do not tell
        return None, []
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needs = [p.name for p in named if p.default is p.empty]
    return (None if any(p.kind is p.VAR_KEYWORD for p in parameters) else [p.name for p in named]), needs


def load_reward(
    spec: Any, base_dirs: Sequence[str | os.PathLike[str]] = (), device: str | torch.device | None = None
) -> RewardFunction:
    """The reward function behind 'file.py:function', 'package.module.function', a model folder or a Hub id.

    Files and folders are looked up in `base_dirs`, or else in the current directory. A model with several labels needs
    one of them: 'folder#LABEL'. Callables are taken as they are. Raises `UserError` naming `spec` and the cure.
    """
    if isinstance(spec, RewardFunction):
        return spec
    if isinstance(spec, os.PathLike):
        spec = os.fspath(spec)
    if not isinstance(spec, str):
        return RewardFunction(spec)
    folders = [Path(folder) for folder in base_dirs] or [Path.cwd()]
    place, _, name = spec.rpartition(":")
    if spec.endswith(".py") or place.endswith(".py"):
        return _from_file(spec, place or spec, name if place else "", folders)
    path, _, label = spec.partition("#")
    for folder in folders:
        if (folder / Path(path).expanduser()).is_dir():
            return RewardFunction(RewardModel(str(folder / Path(path).expanduser()), label or None, device=device))
    if _DOTTED.fullmatch(spec) and (found := _from_module(spec, folders)):
        return found
    return _from_hub(spec, path, label or None, device)


def _from_hub(spec: str, path: str, label: str | None, device: str | torch.device | None) -> RewardFunction:
    hint = "a function is written 'file.py:function' or 'package.module.function'"
    if "/" not in path and "." in path:
        raise UserError(f"reward '{spec}': no module '{re.split('[.:]', path)[0]}' can be imported; {hint}")
    try:
        return RewardFunction(RewardModel(path, label, device=device))
    except UserError as error:
        raise error if "/" in path else type(error)(f"reward '{spec}': {error}; {hint}") from error


def code_behind(spec: str, base_dirs: Sequence[str | os.PathLike[str]] = ()) -> str | None:
    """What code a reward would run, found without running it; None where it is a model, which runs none of its own.

    Raises UserError where the file is not there, is no Python, or has no such function.
    """
    folders = [Path(folder) for folder in base_dirs] or [Path.cwd()]
    place, _, name = spec.rpartition(":")
    if spec.endswith(".py") or place.endswith(".py"):
        path = _find_file(spec, place or spec, folders)
        names = _names_in(spec, path)
        if names is not None and name not in names:
            raise UserError(f"reward '{spec}': {place or spec} has no '{name}'{did_you_mean(name, names)}")
        return f"{spec} ({path} is there)"
    there = any((folder / Path(spec.partition("#")[0]).expanduser()).is_dir() for folder in folders)
    return None if there or "/" in spec or not _DOTTED.fullmatch(spec) else f"{spec} (a module; not looked for)"


def _names_in(spec: str, path: Path) -> list[str] | None:
    """Names that a file defines at its top level; None where that cannot be known without running it."""
    try:
        body = ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError) as error:
        raise UserError(f"reward '{spec}': {path} is no Python that can be read: {error}") from error
    names: list[str] = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names += [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.If | ast.Try | ast.With):
            return None
    return None if "*" in names else names


def _from_file(spec: str, place: str, name: str, folders: Sequence[Path]) -> RewardFunction:
    path = _find_file(spec, place, folders)
    module = _load(spec, str(path))
    return RewardFunction(_pick(spec, module, name, place), location=(str(path), name))


def _find_file(spec: str, place: str, folders: Sequence[Path]) -> Path:
    candidates = [folder / Path(place).expanduser() for folder in folders]
    path = next((candidate.resolve() for candidate in candidates if candidate.is_file()), None)
    if path is None:
        nearby = [file.name for folder in candidates if folder.parent.is_dir() for file in folder.parent.glob("*.py")]
        looked = ", ".join(dict.fromkeys(str(candidate.parent) for candidate in candidates))
        raise UserError(
            f"reward '{spec}': no file '{place}'{did_you_mean(Path(place).name, nearby)} (looked in: {looked})"
        )
    return path


def _from_module(spec: str, folders: Sequence[Path]) -> RewardFunction | None:
    """None when there is no such module, so that the name may mean something else."""
    module_name, name = re.split(r"[.:](?=[^.:]*$)", spec)
    for folder in folders:
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    try:
        known = importlib.util.find_spec(module_name) is not None
    except (ModuleNotFoundError, ValueError):
        known = False
    except Exception as error:  # a parent package that fails while it is imported
        raise UserError(f"reward '{spec}': importing {module_name} failed: {type(error).__name__}: {error}") from error
    if not known:
        return None
    return RewardFunction(_pick(spec, _load(spec, module_name), name, module_name), location=(module_name, name))


def _load(spec: str, place: str) -> Any:
    try:
        with undisturbed():  # a file may seed everything or switch gradients off at its top
            return load_module(place)
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        raise UserError(f"reward '{spec}': importing {place} failed: {type(error).__name__}: {error}") from error


def _pick(spec: str, module: Any, name: str, place: str) -> Callable[..., Any]:
    own = [
        key
        for key, value in vars(module).items()
        if callable(value) and not key.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    listed = f"{place} has: {', '.join(own) or 'no function'}"
    if not name:
        raise UserError(f"reward '{spec}': which function? write '{place}:{own[0] if own else 'function'}' ({listed})")
    if not hasattr(module, name):
        raise UserError(f"reward '{spec}': {place} has no '{name}'{did_you_mean(name, own)} ({listed})")
    found = getattr(module, name)
    if not callable(found):
        raise UserError(f"reward '{spec}': '{name}' is {type(found).__name__}, not a function ({listed})")
    return found
