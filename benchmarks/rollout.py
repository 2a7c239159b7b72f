"""Tokens a second of each engine and of whole rollouts against plain `model.generate` of the same prompts and lengths.

    python -m benchmarks.rollout --quick     # three rounds, under 90 seconds of a quiet core
    python -m benchmarks.rollout             # nine

An engine writes and says what the policy thinks of every token. A rollout also asks the base model, in one pass over
what was written. CPU seconds on one thread, in rounds in which all take turns; ratios are medians over rounds of what a
round says. Beside that, the share of a short quickstart in which the learner waits for completions and their rewards.
vLLM is not measured: it needs a server. Writes `benchmarks/results/rollout.json` and the table in
`benchmarks/README.md`.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.tables import publish
from benchmarks.textbook import machine
from benchmarks.update import model as qwen
from llm_dqn import models
from llm_dqn.adapters import lora_config
from llm_dqn.engines import EngineName, Request, write
from llm_dqn.network import QNetwork
from llm_dqn.policy import BehaviourPolicy, sampled
from llm_dqn.recipe import load_recipe
from llm_dqn.rollout import Writer, rollout
from llm_dqn.shipped import shipped_root
from llm_dqn.trainer import DQNTrainer
from llm_dqn.types import Prompt

MODELS = ("Qwen2.5-0.5B, 2 layers", "quickstart")
ROWS, PROMPT, COMPLETION, TOKENS = 16, 16, 16, 32_000
EPSILON = 0.05  # the default share of completions that the base model writes, from step 4 on
OURS = "engine generate"


def writer_on(which: str, tokenizer: PreTrainedTokenizerBase) -> Writer:
    """The quickstart's model, or two layers of Qwen2.5-0.5B with a vocabulary of 32,000, with a fresh adapter.

    A stop token that no row reaches makes all lengths equal: no kind of generation stops early.
    """
    base = models.load_causal_lm(str(shipped_root() / "data" / "tiny_lm")) if which == "quickstart" else qwen(TOKENS, 2)
    tokens = len(tokenizer) if which == "quickstart" else TOKENS
    network = QNetwork(base, tokens, lora=lora_config(16, 32, 0.0, "all-linear"))
    return Writer(network, tokenizer, frozenset({tokens - 1}), COMPLETION, ROWS)


def works_of(writer: Writer) -> dict[str, Callable[[], int]]:
    """What takes turns, each giving the tokens it wrote."""
    never, generator = writer.network.num_tokens - 1, torch.Generator().manual_seed(0)
    ids = torch.randint(5, never, (ROWS, PROMPT), generator=generator)
    prompts = [Prompt("", "", row.tolist()) for row in ids]

    def plain() -> int:
        torch.manual_seed(0)
        with torch.no_grad(), writer.network.roles.acting_as("online") as model:
            written = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=COMPLETION,
                do_sample=True,
                top_k=0,
                eos_token_id=never,
                pad_token_id=0,
            )
        return written[:, PROMPT:].numel()

    def by_engine(engine: EngineName) -> int:
        torch.manual_seed(0)
        written = write(replace(writer, engine=engine), Request(prompts, sampled(), ["online"] * ROWS, seed=0))
        return sum(len(tokens) for tokens, _ in written)

    def whole(policy: BehaviourPolicy) -> int:
        return sum(len(episode.completion_ids) for episode in rollout(writer, prompts, policy, seed=1))

    return {
        "plain generate": plain,
        OURS: lambda: by_engine("generate"),
        "engine continuous": lambda: by_engine("continuous"),
        "rollout": lambda: whole(sampled()),
        f"rollout, epsilon {EPSILON}": lambda: whole(BehaviourPolicy(epsilon=EPSILON)),
    }


def measure(writer: Writer, rounds: int) -> dict[str, dict[str, float]]:
    """Tokens a CPU second of each, and their ratios to plain generation."""
    works = works_of(writer)
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            started = time.process_time()
            count = work()
            if turn:  # the first round warms up
                taken[name].append((time.process_time() - started) / count)
    against = taken["plain generate"]
    return {
        name: {
            "tokens_per_second": 1 / statistics.median(seconds),
            # each round's own ratio, as the machine's speed drifts between rounds
            "ratio": statistics.median(p / own for p, own in zip(against, seconds, strict=True)),
        }
        for name, seconds in taken.items()
    }


def idle_share(steps: int = 32) -> float:
    """Share of a short quickstart's loop, in CPU seconds, in which nothing is learned because completions are awaited.

    Without the first collection, which fills an empty memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["train.eval_steps=0", "train.save_steps=0", f"train.max_steps={steps}"]
        trainer = DQNTrainer.from_recipe(load_recipe("quickstart", [f"train.output_dir={folder}/run", *quiet]))
        trainer.begin(resume=False)
        trainer.collect()
        waited, collect = 0.0, trainer.collect

        def timed() -> None:
            nonlocal waited
            started = time.process_time()
            collect()
            waited += time.process_time() - started

        trainer.collect = timed  # type: ignore[method-assign]
        started = time.process_time()
        trainer.learn()
        share = waited / (time.process_time() - started)
        trainer.logbook.close()
    return share


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
        print(which, json.dumps(measured[which], indent=1), flush=True)
    results = {
        "throughput_ratio": measured[options.models[0]][OURS]["ratio"],
        "rollout_ratio": measured[options.models[0]]["rollout"]["ratio"],
        "learner_idle_share": idle_share(),
        "command": "python -m benchmarks.rollout" + (" --quick" if options.quick else ""),
        "machine": machine(),
        "ratio_of": options.models[0],
        "rows": ROWS,
        "prompt_tokens": PROMPT,
        "completion_tokens": COMPLETION,
        "models": measured,
    }
    publish("rollout", results, table(results))


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    facts, names = results["machine"], list(results["models"])
    lines = [
        f"`{results['command']}`: {results['rows']} completions of {results['completion_tokens']} tokens, "
        f"{facts['threads']} thread, torch {facts['torch']}; tokens a CPU second, and the ratio to plain generation. "
        "An engine's figure holds the policy's own log-probabilities, a rollout's also those of the base model, which "
        "the learner needs once an episode. In a short quickstart the learner waits for completions and rewards "
        f"{results['learner_idle_share']:.0%} of the time.",
        "",
        "| | " + " | ".join(names) + " |",
        "|---" * (1 + len(names)) + "|",
    ]
    for row in results["models"][names[0]]:
        cells = [results["models"][name][row] for name in names]
        shown = [f"{cell['tokens_per_second']:,.0f} ({cell['ratio']:.2f})" for cell in cells]
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
