"""Tokens a second of rollouts against plain `model.generate` of the same prompts, policy and lengths.

    python -m benchmarks.rollout --quick     # three repeats
    python -m benchmarks.rollout             # nine

A rollout also asks base and tuned model for the log-probability of every token; that is counted apart and together.
CPU seconds on one thread, medians of repeats that take turns. Writes `benchmarks/results/rollout.json` and the table in
`benchmarks/README.md`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.tables import write_table
from benchmarks.textbook import machine
from benchmarks.update import model as qwen
from llm_dqn import models
from llm_dqn.adapters import lora_config
from llm_dqn.network import QNetwork
from llm_dqn.policy import BehaviourPolicy
from llm_dqn.rollout import Writer, describe, rollout
from llm_dqn.shipped import shipped_root
from llm_dqn.types import Prompt

RESULTS = Path(__file__).parent / "results" / "rollout.json"
MODELS = ("Qwen2.5-0.5B, 2 layers", "quickstart")
ROWS, PROMPT, COMPLETION, TOKENS = 16, 16, 64, 32_000


def writer_on(which: str, tokenizer: PreTrainedTokenizerBase) -> Writer:
    """The quickstart's model, or two layers of Qwen2.5-0.5B with a vocabulary of 32,000, with a fresh adapter."""
    base = models.load_causal_lm(str(shipped_root() / "data" / "tiny_lm")) if which == "quickstart" else qwen(TOKENS, 2)
    tokens = len(tokenizer) if which == "quickstart" else TOKENS
    network = QNetwork(base, tokens, lora=lora_config(16, 32, 0.0, "all-linear"))
    return Writer(network, tokenizer, frozenset({tokenizer.eos_token_id}), COMPLETION, ROWS)


def measure(writer: Writer, repeats: int) -> dict[str, float]:
    """Tokens a CPU second of plain generation, of writing in a rollout, and of whole rollouts."""
    generator = torch.Generator().manual_seed(0)
    # A stop token that no row reaches makes all lengths equal: of two kinds of generation, neither stops early.
    never = writer.network.num_tokens - 1
    writer = Writer(writer.network, writer.tokenizer, frozenset({never}), COMPLETION, ROWS)
    ids = torch.randint(5, never, (ROWS, PROMPT), generator=generator)
    prompts = [Prompt("", "", row.tolist()) for row in ids]
    policy = BehaviourPolicy()

    def plain() -> int:
        torch.manual_seed(0)
        with torch.no_grad(), writer.network.roles.acting_as("online") as base:
            written = base.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=COMPLETION,
                do_sample=True,
                top_k=0,
                eos_token_id=never,
                pad_token_id=0,
            )
        return written[:, PROMPT:].numel()

    def whole() -> int:
        episodes = rollout(writer, prompts, policy, seed=0)
        kept.append([episode.completion_ids for episode in episodes])
        return sum(len(episode.completion_ids) for episode in episodes)

    def passes() -> int:
        describe(writer, prompts, kept[-1])
        return sum(len(completion) for completion in kept[-1])

    kept: list[list[torch.Tensor]] = []
    taken: dict[str, list[float]] = {"plain": [], "whole": [], "passes": []}
    works: dict[str, Callable[[], int]] = {"plain": plain, "whole": whole, "passes": passes}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            started = time.process_time()
            count = work()
            if repeat:  # the first round warms up
                taken[name].append((time.process_time() - started) / count)
    writing = [one - other for one, other in zip(taken["whole"], taken["passes"], strict=True)]
    return {
        "plain generate": 1 / statistics.median(taken["plain"]),
        "writing": 1 / statistics.median(writing),
        "writing and both log-probabilities": 1 / statistics.median(taken["whole"]),
        # each round's own ratio, as the machine's speed drifts between rounds
        "ratio": statistics.median(p / w for p, w in zip(taken["plain"], writing, strict=True)),
        "ratio with log-probabilities": statistics.median(
            p / w for p, w in zip(taken["plain"], taken["whole"], strict=True)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = models.load_tokenizer(str(shipped_root() / "data" / "tiny_lm"))
    measured = {}
    for which in options.models:
        measured[which] = measure(writer_on(which, tokenizer), 3 if options.quick else 9)
        print(which, measured[which], flush=True)
    results = {
        "throughput_ratio": measured[options.models[0]]["ratio"],
        "command": "python -m benchmarks.rollout" + (" --quick" if options.quick else ""),
        "machine": machine(),
        "ratio_of": options.models[0],
        "rows": ROWS,
        "prompt_tokens": PROMPT,
        "completion_tokens": COMPLETION,
        "models": measured,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_table("rollout", table(results))


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    facts, names = results["machine"], list(results["models"])
    lines = [
        f"`{results['command']}`: {results['rows']} completions of {results['completion_tokens']} tokens, engine "
        f"`generate`, {facts['threads']} thread, torch {facts['torch']}; tokens a CPU second.",
        "",
        "| | " + " | ".join(names) + " |",
        "|---" * (1 + len(names)) + "|",
    ]
    for row in results["models"][names[0]]:
        digits = 2 if row.startswith("ratio") else 0
        lines.append(f"| {row} | " + " | ".join(f"{results['models'][n][row]:.{digits}f}" for n in names) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
