"""YAML read strictly: every value keeps the place it was written at, and whatever is wrong is a line people can act on.

PyYAML alone lets the last of two equal keys win, forgets line numbers, follows aliases without end and turns dates into
objects. Recipes are written by hand, so each of those is a mistake to report.
"""

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from llm_dqn.errors import UserError

MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 20
MAX_VALUES = 10_000  # counted after aliases are followed, so nested aliases cannot multiply without end


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with what the user gave."""

    source: str  # the file as it was typed, or "override key=value"
    line: int | None  # counted from 1; null where the thing is missing or has no place in a file
    key: str  # dotted path such as train.learning_rate; empty when the whole file is meant
    message: str

    def __str__(self) -> str:
        """`recipes/x.yaml:12: train.learning_rat: unknown key ...`"""
        where = self.source if self.line is None else f"{self.source}:{self.line}"
        named_already = f" {self.key}=" in self.source
        return f"{where}: {self.message}" if not self.key or named_already else f"{where}: {self.key}: {self.message}"


class RecipeError(UserError):
    """Everything that is wrong with a recipe, one line each."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = list(problems)


@dataclass
class Document:
    """Plain values of a recipe, and where each of them was written."""

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)  # dotted path -> line
    overridden: dict[str, str] = field(default_factory=dict)  # dotted path -> the override as typed

    def problem(self, key: str, message: str) -> Problem:
        """A problem at the place of `key`, or of the innermost section around it that was written down."""
        below = [path for path in self.overridden if path.startswith(f"{key}.")]
        path = below[0] if below and key not in self.lines else key
        while path:
            if path in self.overridden:
                return Problem(f"override {self.overridden[path]}", None, key, message)
            if path in self.lines:
                return Problem(self.source, self.lines[path], key, message)
            path = path.rpartition(".")[0]
        return Problem(self.source, None, key, message)


class _Loader(yaml.SafeLoader):
    """SafeLoader that bounds nesting while composing and leaves dates as text."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=self._mark())
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def _mark(self) -> Any:
        return self.peek_event().start_mark


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.1 reads 1e-5 as text because it has no dot; people write learning rates that way
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null")}


def read_yaml(text: str, source: str) -> tuple[Document, list[Problem]]:
    """The document and everything that is wrong with it as YAML; a syntax error leaves the document empty."""
    document = Document(source)
    if len(text) > MAX_CHARACTERS:
        return document, [Problem(source, None, "", f"longer than {MAX_CHARACTERS:,} characters; is this a recipe?")]
    lines = _Lines(text)
    try:
        loader = _Loader(text)
        builder = _Builder(document, loader, lines)
        node = loader.get_single_node()
        values = {} if node is None else builder.value(node, "", MAX_DEPTH)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = f"not valid YAML: {error.problem or error.context}"
        return Document(source), [Problem(source, lines.at(mark.index if mark else 0), "", message)]
    except yaml.reader.ReaderError as error:
        message = f"not valid YAML: the character {error.character!r:.12} is not allowed in a recipe"
        return Document(source), [Problem(source, lines.at(error.position), "", message)]
    if not isinstance(values, dict | None):
        line = lines.at(node.start_mark.index) if node else 1
        return Document(source), [
            Problem(source, line, "", "expected sections such as `train:`, with their keys below")
        ]
    document.values = values or {}
    return document, builder.problems


class _Lines:
    """Which line a character is in, as editors count: YAML also ends lines at marks that no editor shows."""

    def __init__(self, text: str) -> None:
        self._ends = [match.start() for match in re.finditer("\n", text)]
        self._last = max(1, len(self._ends) + (not text.endswith("\n")))

    def at(self, index: int) -> int:
        """Line of a character, counted from 1."""
        return min(bisect.bisect_left(self._ends, index) + 1, self._last)


class _Builder:
    """Turns YAML nodes into plain values while noting lines and duplicate keys."""

    def __init__(self, document: Document, loader: _Loader, lines: _Lines) -> None:
        self.document = document
        self.loader = loader
        self.line = lines.at
        self.problems: list[Problem] = []
        self.count = 0

    def value(self, node: yaml.Node, path: str, levels_left: int) -> Any:
        self.count += 1
        if self.count > MAX_VALUES or not levels_left:
            limit = f"{MAX_VALUES:,} values" if levels_left else f"{MAX_DEPTH} levels"
            raise yaml.MarkedYAMLError(problem=f"aliases unfold to more than {limit}", problem_mark=node.start_mark)
        if path:
            self.document.lines.setdefault(path, self.line(node.start_mark.index))
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self.mapping(node, path, levels_left)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.value(item, f"{path}.{i}", levels_left - 1) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag in _PLAIN:
            return self.scalar(node)
        raise yaml.MarkedYAMLError(
            problem=f"the tag {node.tag} is not allowed; write plain values", problem_mark=node.start_mark
        )

    def scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            return self.loader.construct_object(node)
        except (ValueError, OverflowError, LookupError) as error:  # `!!int x`, `!!float`, ten thousand digits
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(
                problem=f"{node.value!r:.40} cannot be read as {kind}", problem_mark=node.start_mark
            ) from error

    def mapping(self, node: yaml.MappingNode, path: str, levels_left: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = self.line(key_node.start_mark.index)
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a single word", problem_mark=key_node.start_mark)
            key = key_node.value  # as typed: YAML would read a key `on` as true
            inner = f"{path}.{key}" if path else key
            if key in values:
                first = self.document.lines[inner]
                message = f"written twice (lines {first} and {line}); keep one"
                self.problems.append(Problem(self.document.source, line, inner, message))
                continue
            self.document.lines[inner] = line
            values[key] = self.value(value_node, inner, levels_left - 1)
        return values


def apply_override(document: Document, override: str) -> list[Problem]:
    """Set one `a.b=value` in the document (the value is YAML); unknown keys are left for the schema to report."""
    source = f"override {override}"
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key or "" in key.split("."):
        return [Problem(source, None, "", "expected key=value with a dotted key, such as train.max_steps=100")]
    written, problems = read_yaml(f"value: {text}" if text.strip() else "value: null", source)
    if problems or list(written.values) != ["value"]:
        said = problems[0].message.removeprefix("not valid YAML: ") if problems else "one value was expected"
        return [Problem(source, None, key, f"the value is not valid YAML: {said}")]
    value = written.values["value"]
    problem = _set(document.values, key.split("."), value)
    if problem:
        return [Problem(source, None, key, problem)]
    inside = [path for path in (*document.lines, *document.overridden) if path == key or path.startswith(f"{key}.")]
    for path in inside:
        document.lines.pop(path, None)
        document.overridden.pop(path, None)
    document.overridden[key] = override
    return []


def _set(values: dict[str, Any], path: list[str], value: Any) -> str | None:
    """Put a value at a path, opening sections on the way; the reason where that is impossible."""
    here: Any = values
    for depth, name in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(here, list):
            if not name.isdigit() or int(name) >= len(here):
                return f"{'.'.join(path[:depth])} has {len(here)} entries, counted from 0; there is no entry {name}"
            slot: Any = int(name)
        elif isinstance(here, dict):
            slot = name
        else:
            return f"{'.'.join(path[:depth])} is a single value ({here!r}) and has no keys below it"
        if last:
            here[slot] = value
            return None
        if isinstance(here, dict) and here.get(slot) is None:
            here[slot] = {}
        here = here[slot]
    return None
