"""The smallest useful reward: whole completions in, one number for each out."""

from typing import Any

GOAL = "你好世界"


def characters(completions: list[str], **columns: Any) -> list[float]:
    """One point for each character of 你好世界 that stands in its place."""
    return [
        float(sum(written == wanted for written, wanted in zip(completion, GOAL, strict=False)))
        for completion in completions
    ]
