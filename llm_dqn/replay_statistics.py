"""What a replay buffer holds, in figures."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_dqn.replay import ENDED, SOURCES
from llm_dqn.replay_browser import NEVER_MEASURED, Remembered

WIDTH = 40  # of the longest bar of a histogram, in characters


def statistics(remembered: Remembered) -> dict[str, Any]:
    """What the buffer holds, in figures. Lengths in tokens, age in learner steps, bytes in memory."""
    prompts = [ids.tobytes() for ids in remembered.prompt_ids]
    completions = [ids.tobytes() for ids in remembered.completion_ids]
    lists = (
        remembered.prompt_ids,
        remembered.completion_ids,
        remembered.ref_logprobs,
        remembered.behaviour_logprobs,
        remembered.facts.values(),
    )
    facts = remembered.facts
    return {
        "step": remembered.step,
        "episodes": len(remembered),
        "by_process": np.bincount(facts["process"]).tolist(),
        "capacity": remembered.capacity,
        "added": remembered.added,
        "distinct_prompts": len(set(prompts)),
        "distinct_completions": len(set(completions)),
        "duplicates": len(remembered) - len(set(zip(prompts, completions, strict=True))),
        "prompt_tokens": _spread([len(ids) for ids in remembered.prompt_ids]),
        "completion_tokens": _spread([len(ids) for ids in remembered.completion_ids]),
        "bytes": sum(array.nbytes for arrays in lists for array in arrays if array.dtype.kind != "U"),
        "ended": {name: int((facts["ended"] == name).sum()) for name in ENDED},
        "source": {name: int((facts["source"] == name).sum()) for name in SOURCES},
        "reward": _spread(facts["reward"]),
        "reward_histogram": histogram(facts["reward"]),
        "age": _spread(facts["age"]),
        "td_error": _spread(facts["td_error"]) if remembered.prioritized else None,
    }


def _spread(values: Sequence[float] | np.ndarray) -> dict[str, float]:
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
