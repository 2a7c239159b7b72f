"""Keeps what a benchmark measured: as JSON, and as a table in `benchmarks/README.md` between markers that name it."""

import json
import re
from pathlib import Path
from typing import Any

README = Path(__file__).parent / "README.md"
RESULTS = Path(__file__).parent / "results"


def publish(name: str, results: dict[str, Any], text: str) -> None:
    """Writes `benchmarks/results/NAME.json` and the table of that name, and prints the table."""
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_table(name, text)
    print(text)


def write_table(name: str, text: str) -> None:
    """Replaces what stands between `<!-- NAME -->` and `<!-- /NAME -->`; ValueError when the markers are missing."""
    page = README.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", flags=re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"{README} has no markers for the table {name}")
    README.write_text(pattern.sub(lambda match: f"{match[1]}{text}\n{match[2]}", page), encoding="utf-8")
