"""Puts generated tables into `benchmarks/README.md`, between markers that name them."""

import re
from pathlib import Path

README = Path(__file__).parent / "README.md"


def write_table(name: str, text: str) -> None:
    """Replaces what stands between `<!-- NAME -->` and `<!-- /NAME -->`; ValueError when the markers are missing."""
    page = README.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", flags=re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"{README} has no markers for the table {name}")
    README.write_text(pattern.sub(lambda match: f"{match[1]}{text}\n{match[2]}", page), encoding="utf-8")
