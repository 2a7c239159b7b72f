"""What a replay buffer holds, in figures."""

from hashlib import blake2b
from typing import Any

import numpy as np

from llm_dqn.replay import ENDED, SOURCES
from llm_dqn.replay_browser import NEVER_MEASURED, Remembered

WIDTH = 40  # of the longest bar of a histogram, in characters


def statistics(remembered: Remembered) -> dict[str, Any]:
    """What the buffer holds, in figures. Lengths in tokens, age in learner steps, bytes of the store."""
    distinct = _distinct(remembered)
    lengths, prompt_lengths = (
        np.concatenate([store.column(name) for store in remembered.stores]) for name in ("lengths", "prompt_lengths")
    )
    facts = remembered.facts
    return {
        "step": remembered.step,
        "episodes": len(remembered),
        "by_process": np.bincount(facts["process"]).tolist(),
        "capacity": remembered.capacity,
        "added": remembered.added,
        "distinct_prompts": len({prompt for prompt, _ in distinct}),
        "distinct_completions": len({completion for _, completion in distinct}),
        "duplicates": len(remembered) - len(distinct),
        "prompt_tokens": _spread(prompt_lengths),
        "completion_tokens": _spread(lengths - prompt_lengths),
        "bytes": sum(store.nbytes for store in remembered.stores),
        "ended": {name: int((facts["ended"] == name).sum()) for name in ENDED},
        "source": {name: int((facts["source"] == name).sum()) for name in SOURCES},
        "reward": _spread(facts["reward"]),
        "reward_histogram": histogram(facts["reward"]),
        "age": _spread(facts["age"]),
        "td_error": _spread(facts["td_error"]) if remembered.prioritized else None,
    }


def _distinct(remembered: Remembered) -> set[tuple[bytes, bytes]]:
    """Digests of the pairs of prompt and completion: a million texts need not be in memory to be told apart."""
    found = set()
    for store in remembered.stores:
        for begin in range(0, len(store), store.segment_size):
            slots = np.arange(begin, min(begin + store.segment_size, len(store)))
            tokens, rows = store.flat(slots, ("tokens",))["tokens"], store.rows(slots)
            starts = np.cumsum(rows["lengths"]) - rows["lengths"]
            splits, ends = starts + rows["prompt_lengths"], starts + rows["lengths"]
            for start, split, end in zip(starts.tolist(), splits.tolist(), ends.tolist(), strict=True):
                found.add((_digest(tokens[start:split]), _digest(tokens[split:end])))
    return found


def _digest(ids: np.ndarray) -> bytes:
    return blake2b(ids.tobytes(), digest_size=16).digest()


def _spread(values: np.ndarray) -> dict[str, float]:
    low, first, median, third, high = np.percentile(values, [0, 25, 50, 75, 100]).tolist()
    mean, total = float(np.mean(values)), float(np.sum(values))
    return {"mean": mean, "min": low, "q25": first, "median": median, "q75": third, "max": high, "sum": total}


def histogram(values: np.ndarray, bins: int = 10) -> list[tuple[float, float, int]]:
    """(from, to, how many), low to high; each value by itself where they are at most `bins` different ones."""
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= bins:
        return [(float(value), float(value), int(count)) for value, count in zip(distinct, counts, strict=True)]
    counts, edges = np.histogram(values, bins)
    return [(float(edges[i]), float(edges[i + 1]), int(count)) for i, count in enumerate(counts)]


def described(figures: dict[str, Any], bar: str = "█") -> list[str]:
    """`statistics` as lines of text."""
    count, processes = figures["episodes"], figures["by_process"]
    shares = {
        kind: ", ".join(f"{name} {number:,} ({number / count:.0%})" for name, number in figures[kind].items())
        for kind in ("ended", "source")
    }
    room = f"room for {figures['capacity']:,}" + (" a process" if len(processes) > 1 else "")
    by_process = f" ({', '.join(f'{size:,}' for size in processes)} by process)" if len(processes) > 1 else ""
    td_error = figures["td_error"]
    lines = {
        "episodes": f"{count:,}{by_process}, {room}, {figures['added']:,} ever put in",
        "prompts": f"{figures['distinct_prompts']:,} different, {_in_words(figures['prompt_tokens'], '.0f')} tokens",
        "completions": f"{figures['distinct_completions']:,} different, "
        f"{_in_words(figures['completion_tokens'], '.0f')} tokens",
        "duplicates": f"{figures['duplicates']:,} episodes repeat a prompt and completion of another",
        "tokens": f"{figures['prompt_tokens']['sum']:,.0f} of prompts, "
        f"{figures['completion_tokens']['sum']:,.0f} of completions; {figures['bytes'] / 1e6:,.1f} MB with all facts",
        "ended by": shares["ended"],
        "source": shares["source"],
        "age": f"{_in_words(figures['age'], '.0f')} learner steps since written",
        "TD error": NEVER_MEASURED if td_error is None else _in_words(td_error, ".3g"),
        "reward": _in_words(figures["reward"], ".3f"),
    }
    most = max(number for _, _, number in figures["reward_histogram"])
    bars = [
        f"  {_bin(low, high):>20}  {bar * round(WIDTH * number / most)} {number:,}"
        for low, high, number in figures["reward_histogram"]
    ]
    return [*(f"{label:<12} {text}" for label, text in lines.items()), *bars]


def _in_words(spread: dict[str, float], spec: str) -> str:
    low, middle, high = (format(spread[name], spec) for name in ("min", "median", "max"))
    return f"{low} to {high}, median {middle}, mean {spread['mean']:.3g}"


def _bin(low: float, high: float) -> str:
    return f"{low:.3g}" if low == high else f"{low:.3f} to {high:.3f}"
