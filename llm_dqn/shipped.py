"""Where things lie: the recipes, data and tiny models that come with the package, and paths written in a recipe."""

import os
import re
from itertools import chain, islice
from pathlib import Path

from llm_dqn.errors import UserError, did_you_mean, nearest
from llm_dqn.recipe_yaml import Problem, RecipeError


def shipped_root() -> Path:
    """The folder that holds `recipes/` and `data/`: the package in a wheel, the repository root in a checkout."""
    package = Path(__file__).resolve().parent
    return package if (package / "recipes").is_dir() else package.parent


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every recipe that comes with the package."""
    return {path.stem: path for path in sorted((shipped_root() / "recipes").glob("*.yaml"))}


def find_recipe(path_or_name: str | os.PathLike[str]) -> tuple[str, str]:
    """(path, text) of a recipe file, or of the shipped recipe of that name."""
    typed = os.fspath(path_or_name)
    shipped = shipped_recipes()
    path = Path(typed).expanduser()
    if not path.is_file():
        name = path.name.removesuffix(".yaml")
        # a bare name, or a path like recipes/quickstart.yaml typed away from the repository
        if name in shipped and path.parent in (Path("."), Path("recipes")):
            path = _for_people(shipped[name])
        else:
            kind = "is a folder" if path.is_dir() else "no such file"
            known = f"no shipped recipe ({', '.join(shipped)}) has that name"
            raise UserError(f"recipe {typed}: {kind}, and {known}{did_you_mean(name, shipped)}")
    try:
        content = path.read_bytes()
        return str(path), content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise UserError(f"recipe {typed}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"not UTF-8 text (byte {content[error.start]:#04x}); save the file as UTF-8"
        raise RecipeError([Problem(str(path), line, "", message)]) from error


def copy_recipe(path_or_name: str | os.PathLike[str], destination: str | os.PathLike[str]) -> Path:
    """Writes a copy to a file or into a folder; returns the file. Raises UserError rather than overwrite one."""
    path, text = find_recipe(path_or_name)
    target = Path(destination).expanduser()
    target = target / Path(path).name if target.is_dir() else target
    if target.exists():
        raise UserError(f"{target} exists already; remove it or choose another name")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from error
    return target


def _for_people(path: Path) -> Path:
    """Relative to the current folder where that is shorter to read."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def resolve_path(value: str, recipe_dir: str | os.PathLike[str] | None = None) -> str:
    """Where a path written in a recipe lies: here, beside the recipe, or among the shipped files.

    `file.py:function` and `folder#LABEL` keep their ending. What is found nowhere comes back unchanged: it may be a Hub
    id, and whoever opens it says what is wrong with it.
    """
    path, ending = _without_ending(value)
    found = (place / path for place in _places(recipe_dir) if (place / path).exists())
    first = next(found, None)
    return value if first is None else str(first) + ending


def lies_here(value: str, recipe_dir: str | os.PathLike[str] | None = None) -> bool:
    """Whether a path written in a recipe, with or without an ending, lies anywhere on this machine."""
    path, _ = _without_ending(value)
    return any((place / path).exists() for place in _places(recipe_dir))


def mislaid(value: str, recipe_dir: str | os.PathLike[str] | None = None) -> str | None:
    """What to say of a path that lies nowhere though its folder does: it is mistyped rather than a Hub id.

    None where it exists, or where its folder does not.
    """
    path, _ = _without_ending(value)
    places = [place for place in _places(recipe_dir) if (place / path.parent).is_dir()]
    if path.parent == Path(".") or not places or lies_here(value, recipe_dir):
        return None
    there = [entry.name for place in places for entry in (place / path.parent).iterdir()]
    return f"there is no {path.name} in {path.parent}{did_you_mean(path.name, there)}"


def similar_nearby(value: str, recipe_dir: str | os.PathLike[str] | None = None) -> str:
    """'; did you mean data/tiny_lm?' for a bare name that lies nowhere but is like one here, beside the recipe, in a
    folder below these, or among the shipped files; else nothing.
    """
    path, _ = _without_ending(value)
    if path.parent != Path(".") or lies_here(value, recipe_dir):
        return ""
    paths: dict[str, Path] = {}
    for place in _places(recipe_dir):
        for entry in islice(chain(place.glob("*"), place.glob("*/*")), 10_000):  # a home folder may be large
            paths.setdefault(entry.name, entry.relative_to(place))
    close = nearest(path.name, paths)
    return f"; did you mean {paths[close]}?" if close else ""


def _without_ending(value: str) -> tuple[Path, str]:
    """A path and what may stand behind it, `:function` or `#LABEL`."""
    match = re.fullmatch(r"(?P<file>.+\.py)(?P<function>:\w+)|(?P<model>.+?)(?P<label>#.+)", value)
    path, ending = (match["file"] or match["model"], match["function"] or match["label"]) if match else (value, "")
    return Path(path).expanduser(), ending


def _places(recipe_dir: str | os.PathLike[str] | None) -> list[Path]:
    """Where relative paths are looked up."""
    return [Path("."), *([Path(recipe_dir)] if recipe_dir is not None else []), shipped_root()]
