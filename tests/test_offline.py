"""Nobody waits for a Hub that is out of reach, and nobody is asked where everything is here."""

import os
import socket
from pathlib import Path

import pytest

from llm_dqn.offline import keep_to_cache_when_offline


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Hosts that were tried; none of them answers."""
    hosts: list[tuple[str, int]] = []

    def refuse(address: tuple[str, int], timeout: float) -> socket.socket:
        hosts.append(address)
        raise OSError("no way")

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "")  # so that what is set below is undone after the test
        monkeypatch.delenv(name)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    return hosts


@pytest.mark.parametrize("name", ["gpt2", "openai/gsm8k:main", "lvwerra/distilbert-imdb#POSITIVE", "data/tinylm"])
def test_what_may_be_on_the_hub_is_looked_for_once(asked: list, name: str) -> None:
    assert keep_to_cache_when_offline(["data/tiny_lm", name])
    assert asked == [("huggingface.co", 443)] and os.environ["HF_HUB_OFFLINE"] == "1"
    assert not keep_to_cache_when_offline([name]) and len(asked) == 1


@pytest.mark.parametrize(
    "name",
    ["data/tiny_lm", "recipes/rewards/gsm8k.py:correct_answer", "no/such.py:f", "package.module:f", "x.jsonl", "/a/b"],
)
def test_nothing_is_looked_for_where_all_is_here(asked: list, name: str) -> None:
    assert not keep_to_cache_when_offline([name]) and asked == []


def test_files_beside_the_recipe_are_here(asked: list, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert not keep_to_cache_when_offline(["mine"], tmp_path) and asked == []
    assert keep_to_cache_when_offline(["mine"])


def test_a_mirror_and_a_proxy_are_respected(asked: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example:8080")
    monkeypatch.setenv("https_proxy", "http://proxy.example")
    assert not keep_to_cache_when_offline(["gpt2"]) and asked == []
    monkeypatch.delenv("https_proxy")
    assert keep_to_cache_when_offline(["gpt2"]) and asked == [("mirror.example", 8080)]


def test_a_hub_that_answers_is_used(asked: list, monkeypatch: pytest.MonkeyPatch) -> None:
    class Connection:
        def close(self) -> None:
            pass

    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: Connection())
    assert not keep_to_cache_when_offline(["gpt2"]) and "HF_HUB_OFFLINE" not in os.environ
