"""Is the last number of a solution the right one? Written as TRL has it, so that GRPOTrainer takes it, too."""

import re
from decimal import Decimal
from typing import Any

_NUMBER = re.compile(r"(?<!\d)-?\$?\d[\d,]*(?:\.\d+)?")


def correct_answer(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """1 where the last number of a completion equals the one after `####` in the column `answer`, else 0."""
    return [
        float(
            (number := last_number(_text(completion))) is not None and number == last_number(solution.split("####")[-1])
        )
        for completion, solution in zip(completions, answer, strict=True)
    ]


def last_number(text: str) -> Decimal | None:
    """The last number written in a text: 1,234.50 and $1234.5 are the same."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("$", "")) if found else None


def _text(completion: Any) -> str:
    """Completions of chat prompts are lists of messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
