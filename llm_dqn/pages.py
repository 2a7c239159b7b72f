"""HTML files that stand alone: one style, one script, no address, and a policy that forbids the browser any network."""

import base64
import hashlib
import os
import re
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from llm_dqn import charts
from llm_dqn.errors import RunError

# an escape sequence of a terminal: colours and cursor (CSI), titles and links (OSC), anything else of two characters
_TERMINAL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-_]")
# controls but tab and newline, and the marks that turn the direction of what follows around
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff]")


def render(template: str, title: str, **values: Any) -> str:
    """A whole page from `templates/<template>`. Everything but Markup is escaped."""
    style, script = _asset("page.css") + charts.STYLE, _asset("page.js")
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    page = environment().get_template(template)
    return page.render(title=clean(title), style=style, script=script, policy=policy, **values)


def write(path: Path, page: str) -> Path:
    """Puts a page where `path` says, whole or not at all. Raises RunError where the disk refuses."""
    temporary = None
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as stream:
            temporary = Path(stream.name)
            stream.write(page)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise RunError(f"could not write {path}: {error}") from error
    return path


def clean(text: str) -> str:
    """Text of a model without terminal codes; other invisible controls are spelled out, line ends and tabs stay."""
    return _CONTROL.sub(_spelled, _TERMINAL.sub("", text.replace("\r\n", "\n")))


def _spelled(match: re.Match[str]) -> str:
    code = ord(match[0])
    return chr(0x2400 + code) if code < 0x20 else f"\u27e8U+{code:04X}\u27e9"


@cache
def environment() -> Environment:
    """Templates with everything escaped and nothing undefined."""
    made = Environment(
        loader=PackageLoader("llm_dqn"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["clean"] = clean
    return made


@cache
def _asset(name: str) -> str:
    return files("llm_dqn").joinpath("templates", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
