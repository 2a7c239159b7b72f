"""Figures over many completions that say how sure a number is, or how alike texts are. Needs no model."""

from collections.abc import Sequence

import numpy as np


def bootstrap_interval(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> list[float]:
    """95 % percentile interval of the mean, resampling prompts. Efron 1979."""
    if len(values) == 0:
        return [float("nan"), float("nan")]
    picks = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return [float(low), float(high)]


def distinct_n(sequences: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams of tokens over all n-grams, over all completions together. Li et al. 2016.

    It falls with the number of completions, so compare only over the same prompts.
    """
    grams = [tuple(sequence[i : i + n]) for sequence in sequences for i in range(len(sequence) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
