"""Figures over many completions that say how sure a number is, or how alike texts are. Needs no model."""

from collections.abc import Sequence

import numpy as np

BLOCK = 2**22  # prompts drawn at a time, over all resamples: 32 MB


def bootstrap_interval(
    values: np.ndarray, clusters: Sequence[int] | None = None, resamples: int = 2000, seed: int = 0
) -> list[float] | None:
    """95 % percentile interval of the mean, resampling prompts with all that was written for them. Efron 1979.

    values: (N,). clusters: (N,) number of the prompt that each value belongs to; completions of one prompt are alike,
    so drawing them one by one would make the interval too narrow. None: each value has a prompt of its own.
    None comes back where there are no values.
    """
    if len(values) == 0:
        return None
    _, prompt_of = np.unique(np.arange(len(values)) if clusters is None else clusters, return_inverse=True)
    sums, counts = np.bincount(prompt_of, weights=values), np.bincount(prompt_of)
    rng, size = np.random.default_rng(seed), len(counts)
    means = np.empty(resamples)
    rows = max(1, BLOCK // size)
    for start in range(0, resamples, rows):
        picks = rng.integers(size, size=(min(rows, resamples - start), size))
        means[start : start + rows] = sums[picks].sum(axis=1) / counts[picks].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return [float(low), float(high)]


def distinct_n(sequences: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams of tokens over all n-grams, over all completions together. Li et al. 2016.

    It falls with the number of completions, so compare only over the same prompts.
    """
    grams = [tuple(sequence[i : i + n]) for sequence in sequences for i in range(len(sequence) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
