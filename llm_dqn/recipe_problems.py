"""What the schema found wrong, in plain words: the key as typed, the value received, what is expected, the cure."""

import types
from collections.abc import Iterator
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from llm_dqn.errors import did_you_mean, nearest
from llm_dqn.recipe_yaml import Document, Problem


def problems_of(error: ValidationError, root: type[BaseModel], document: Document) -> list[Problem]:
    """Every problem of a validation, once a key, at the line where it was written."""
    found: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        model, path = _owner(root, detail["loc"])
        key = ".".join(path)
        if detail["type"] == "missing":
            for missing, description in _required(model, path):
                found.setdefault(missing, document.problem(missing, f"missing, and has no default ({description})"))
        elif detail["type"] == "extra_forbidden":
            found.setdefault(key, document.problem(key, _unknown(root, model, path, detail["input"])))
        else:
            value = _value_at(document.values, path)
            found.setdefault(key, document.problem(key, _wrong_value(model, path[-1], value)))
    return list(found.values())


def _owner(root: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[type[BaseModel], list[str]]:
    """The model that owns the field at a location, and the field's path without pydantic's union tags."""
    model, path = root, []
    for depth, part in enumerate(loc):
        path.append(str(part))
        inner = _model_in(model.model_fields[str(part)].annotation) if part in model.model_fields else None
        if inner is None or depth == len(loc) - 1:
            break
        model = inner
    return model, path


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The section behind an annotation such as `LoraSection | None`."""
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)


def _required(model: type[BaseModel], path: list[str]) -> Iterator[tuple[str, str]]:
    """(key, description) of what is missing: the key itself, or all required keys of a missing section."""
    info = model.model_fields[path[-1]]
    section = _model_in(info.annotation)
    if section is None:
        yield ".".join(path), (info.description or "").rstrip(".")
        return
    for name, inner in section.model_fields.items():
        if inner.is_required():
            yield ".".join([*path, name]), (inner.description or "").rstrip(".")


def _unknown(root: type[BaseModel], model: type[BaseModel], path: list[str], value: Any) -> str:
    """An unknown key, with the key that was probably meant: of the same section first, then of any other."""
    close = nearest(path[-1], model.model_fields)
    if close is None:
        everywhere = dict(_leaves(root))
        name = path[-1] if path[-1] in everywhere else nearest(path[-1], everywhere)
        close = everywhere[name] if name else None
    hint = f"; did you mean {close}?" if close else f"; known here: {', '.join(model.model_fields)}"
    return f"unknown key (got {_shown(value)}){hint}"


def _leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, dotted path) of every key that holds a value."""
    for name, info in model.model_fields.items():
        inner = _model_in(info.annotation)
        if inner is None:
            yield name, prefix + name
        else:
            yield from _leaves(inner, f"{prefix}{name}.")


def _value_at(values: Any, path: list[str]) -> Any:
    for name in path:
        values = values[name] if isinstance(values, dict) else getattr(values, name)
    return values


def _wrong_value(model: type[BaseModel], leaf: str, value: Any) -> str:
    schema = model.model_json_schema()["properties"][leaf]
    hint = ""
    if isinstance(value, str):
        choices = [choice for option in schema.get("anyOf", [schema]) for choice in option.get("enum", [])]
        hint = did_you_mean(value, choices)
    return f"expected {_in_words(schema)}, got {_shown(value)}{hint}"


def _in_words(schema: dict[str, Any]) -> str:
    """A JSON schema as a person would say it."""
    if "anyOf" in schema:
        return " or ".join(_in_words(option) for option in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(str(choice) for choice in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    kind = schema.get("type", "object")
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _bounds(schema)
    if kind == "array":
        return "a list" + (" with at least one entry" if schema.get("minItems") else "")
    names = {"string": "text", "boolean": "true or false", "null": "null"}
    return names.get(kind, "a section of `key: value` lines")


def _bounds(schema: dict[str, Any]) -> str:
    words = {
        "minimum": "of at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    said = [f"{text} {schema[name]:g}" for name, text in words.items() if name in schema]
    return f" {' and '.join(said)}" if said else ""


def _shown(value: Any) -> str:
    """The value as YAML has it, cut to a readable length."""
    plain = {None: "null", True: "true", False: "false"}
    text = plain[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
