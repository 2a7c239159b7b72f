"""The desk at which faults happen."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.desk import Desk


@pytest.fixture
def desk(
    tmp_path: Path, tiny_llama_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Desk]:
    """A folder in which a small run works; signal handlers are put back afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    home = tmp_path / "home"
    home.mkdir()
    yield Desk(home, tiny_llama_path, monkeypatch, capsys)
    for number, handler in before.items():
        signal.signal(number, handler)
