"""Writes docs/reliability.md: every fault, what happens, and the test that shows it. `python -m tests.faults.table`

A test answers the fault of its number, `test_case_NN_...`; the first line of its docstring is what happens. A fault
that cannot occur is answered by `NOT_APPLICABLE = {number: reason}` in any file beside this one.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from re import fullmatch

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "reliability.md"
SECTIONS: dict[str, dict[int, str]] = {
    "Checkpoints and resume": {
        1: "`kill -9` while a checkpoint is written",
        2: "`kill -9` at any step, then `--resume`",
        3: "SIGTERM, Ctrl-C",
        4: "A flipped byte in a checkpoint",
        5: "A truncated or missing file of a checkpoint",
        6: "The disk is full",
        7: "`save_total_limit` deletes old checkpoints",
        8: "The recipe was changed before `--resume`",
        9: "Another number of processes resumes",
        10: "A planted pickle",
        11: "A checkpoint of another version",
    },
    "Rewards": {
        12: "A reward function raises",
        13: "None, NaN or infinity for a completion",
        14: "None for every completion",
        15: "A wrong length, a scalar, an array, a generator, text",
        16: "A reward function hangs",
        17: "A reward function fails on one process only",
        18: "A reward function prints, changes its inputs, seeds the random streams",
        19: "A reward function that is not there, is none, or needs what nobody gives",
        20: "A reward that is always the same",
        21: "A reward model with several labels, without padding, with another tokenizer",
    },
    "Data, tokenizer, model": {
        22: "No rows, no such split, no such column, mixed or missing prompts",
        23: "A prompt is too long",
        24: "A tokenizer without padding token",
        25: "A tokenizer with no or several end-of-sequence tokens",
        26: "Conversations, and no chat template",
        27: "More rows in the output layer than tokens",
        28: "More tokens than rows in the output layer",
        29: "An output layer tied to the input embedding",
        30: "A model that caps or scales its logits",
        31: "bfloat16",
        32: "A completion reaches the length cap",
        33: "A batch without a single action",
        34: "A model that brings its own code",
        35: "A model with pickled weights only",
    },
    "Numerics and run": {
        36: "NaN or infinity in loss or gradient",
        37: "Q-values explode",
        38: "Out of memory",
        39: "A damaged replay, or one of another tokenizer",
        40: "A replay that is empty, small, wrapped around, or has odd priorities",
        41: "Fewer completions than prompts",
        42: "The target network after a resume, in the gradient, in an upload",
        43: "Another clock or locale, a read-only home, no network",
        44: "Two runs in one folder",
    },
    "Security": {
        45: "Tags, depth, size and aliases in YAML",
        46: "Access tokens",
        47: "What is uploaded",
        48: "Strangers' recipes, which are code",
        49: "HTML, markup and terminal codes in texts",
        50: "Paths in a manifest that lead elsewhere",
    },
}
FAULTS = {number: fault for faults in SECTIONS.values() for number, fault in faults.items()}
INTRODUCTION = """# What happens when things go wrong

Fifty faults, what llm_dqn does about each, and the test that shows it. Written by `python -m tests.faults.table` from
the tests in `tests/faults/`: the middle column is what each of them asserts.
"""


@dataclass(frozen=True)
class Answer:
    """What happens at a fault, and the test that shows it (its file alone where the fault cannot occur)."""

    outcome: str
    test: str


def answers(folder: Path = HERE) -> dict[int, list[Answer]]:
    """Fault -> what answers it, in the order of files and lines."""
    found: dict[int, list[Answer]] = {}
    for path in sorted(folder.glob("*.py")):
        for number, answer in _answers_in(path):
            found.setdefault(number, []).append(answer)
    return found


def _answers_in(path: Path) -> Iterator[tuple[int, Answer]]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and (case := fullmatch(r"test_case_(\d+)_\w+", node.name)):
            said = ast.get_docstring(node)
            if not said:
                raise ValueError(f"{path.name}:{node.lineno}: {node.name} does not say what happens (a docstring)")
            yield int(case[1]), Answer(said.splitlines()[0], f"{path.name}::{node.name}")
        elif isinstance(node, ast.Assign | ast.AnnAssign) and path.name != "table.py":
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if node.value is not None and any(ast.unparse(target) == "NOT_APPLICABLE" for target in targets):
                for number, reason in ast.literal_eval(node.value).items():
                    yield number, Answer(f"Cannot occur: {reason}", path.name)


def page(found: dict[int, list[Answer]]) -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for section, faults in SECTIONS.items():
        parts.append(f"\n## {section}\n\n| | Fault | What happens | Test |\n|---|---|---|---|\n")
        for number, fault in faults.items():
            given = found.get(number, [])
            outcomes = "<br>".join(_cell(answer.outcome) for answer in given)
            tests = "<br>".join(f"`{answer.test}`" for answer in given)
            parts.append(f"| {number} | {fault} | {outcomes} | {tests} |\n")
    return "".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(answers()), encoding="utf-8")
    missing = sorted(set(FAULTS) - set(answers()))
    print(f"{PAGE} written; {len(FAULTS) - len(missing)} of {len(FAULTS)} faults answered")
    if missing:
        print(f"without an answer: {', '.join(map(str, missing))}")
