"""Completions against texts that people wrote: BLEU by sacrebleu, word error rate by jiwer, where these are installed.

References are a list of texts for each completion, empty where there is none.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

COLUMN = "reference"
LIBRARIES = {"BLEU": "sacrebleu", "word error rate": "jiwer"}


def references_of(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The texts in each row's column `reference`, which holds a text or a list of texts; blank ones do not count."""
    cells = [row.get(COLUMN) for row in rows]
    several = [cell if isinstance(cell, list) else [cell] for cell in cells]
    return [[text for text in texts if isinstance(text, str) and text.strip()] for texts in several]


def what_is_missing(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each reason why there will be no figure although there is a column `reference`."""
    if not any(COLUMN in row for row in rows):
        return []
    if not any(references_of(rows)):
        return [f"the column '{COLUMN}' holds no text, so there is no BLEU and no word error rate"]
    return [
        f"the data has a column '{COLUMN}' but {library} is not installed, so there is no {figure}; "
        "pip install 'llm-dqn[text]'"
        for figure, library in LIBRARIES.items()
        if find_spec(library) is None
    ]


def against_references(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`bleu` and `wer` over the texts that have a reference; empty where none has, or no library is installed."""
    referenced = [(text.strip(), several) for text, several in zip(texts, references, strict=True) if several]
    if not referenced:
        return {}
    written, wanted = zip(*referenced, strict=True)
    rules = {"bleu": ("sacrebleu", bleu), "wer": ("jiwer", word_error_rate)}
    return {name: rule(written, wanted) for name, (library, rule) in rules.items() if find_spec(library) is not None}


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 as sacrebleu computes it by default, 0 to 100. Papineni et al. 2002, Post 2018."""
    import sacrebleu

    most = max(len(several) for several in references)
    streams = [[several[i] if i < len(several) else None for several in references] for i in range(most)]
    return sacrebleu.corpus_bleu(list(texts), streams).score


def word_error_rate(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Words to substitute, delete and insert over the words of the references, all texts together; may exceed 1.

    Of several references the closest one counts. Case and punctuation matter.
    """
    import jiwer

    errors, words = 0, 0
    for text, several in zip(texts, references, strict=True):
        closest = min((jiwer.process_words(reference, text) for reference in several), key=lambda found: found.wer)
        errors += closest.substitutions + closest.deletions + closest.insertions
        words += closest.hits + closest.substitutions + closest.deletions
    return errors / words
