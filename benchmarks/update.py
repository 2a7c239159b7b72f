"""One optimizer update of ours against a cross-entropy step of the same model on the same tokens, in time and memory.

    python -m benchmarks.update --quick      # one round, and no ILQL at the large vocabulary
    python -m benchmarks.update              # three rounds; 16 GB

Two layers of Qwen2.5-0.5B's shapes with random weights, float32, one thread, the same LoRA and optimizer in every
variant. Each has a process of its own, and they take turns: times are CPU seconds, medians of the rounds. Memory is the
peak of such a process within its first step, above what it held before, its weights and moments included. Writes
`benchmarks/results/update.json` and the table in `benchmarks/README.md` once both heads are measured at 151,936 tokens.
"""

import argparse
import gc
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from benchmarks.tables import publish
from benchmarks.textbook import machine
from benchmarks.update_peers import PEERS
from llm_dqn import assembly
from llm_dqn.adapters import lora_config
from llm_dqn.network import QNetwork
from llm_dqn.recipe import DQNConfig
from llm_dqn.replay import PrefixReplay
from llm_dqn.types import Episode, PrefixBatch, TDTarget

VOCABULARIES = (32_000, 151_936)
BATCH, PROMPT, COMPLETION = 4, 128, 128
OURS: dict[str, dict[str, Any]] = {
    "lm": {},
    "linear": {"q_head": "linear"},
    "linear, TD error alone": {"q_head": "linear", "advantage_weight": 0.0},
}
BASELINE = "cross entropy"
ALONE = "ILQL"  # needs 15 GB at 151,936 tokens, so it shares the machine with the cross-entropy step only
Step = Callable[[PrefixBatch], None]


def model(tokens: int, layers: int) -> Qwen2ForCausalLM:
    """Qwen2.5-0.5B's shapes with fewer layers, another vocabulary and random weights."""
    torch.manual_seed(0)
    shapes = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=tokens, num_hidden_layers=layers, tie_word_embeddings=True, **shapes)
    return Qwen2ForCausalLM(config)


def batch(tokens: int, episodes: int, prompt: int, completion: int) -> PrefixBatch:
    """Random episodes of equal length, every other one a success."""
    rng = np.random.default_rng(0)
    replay = PrefixReplay(episodes)
    for number in range(episodes):
        ids = torch.from_numpy(rng.integers(0, tokens, prompt + completion))
        logprobs = torch.full((completion,), -float(np.log(tokens)))
        written = Episode("", "", ids[:prompt], ids[prompt:], logprobs, logprobs, "eos", reward=float(number % 2))
        replay.add([written])
    return replay.batch(np.arange(episodes))


def ours(tokens: int, layers: int, settings: dict[str, Any]) -> Step:
    """An update as training makes it, by adapters in all layers."""
    return learning(model(tokens, layers), tokens, settings)[1]


def learning(
    base: PreTrainedModel, tokens: int, settings: dict[str, Any], modules: str | list[str] = "all-linear"
) -> tuple[QNetwork, Step]:
    """A network and its update: targets by the target network, the loss with all its terms, clipping, AdamW."""
    args = DQNConfig(**({"output_dir": "unused", "learning_rate": 1e-4} | settings))
    network = QNetwork(
        base,
        tokens,
        assembly.head_settings(args),
        lora=lora_config(16, 32, 0.0, modules),
        target=args.target,
        backup=assembly.backup_rule(args),
        bf16=args.bf16,
    )
    network.start_values_at(0.5)
    optimizer = assembly.optimizer_for(network, args)
    returns, trainable = assembly.returns_rule(args), [p for p in network.parameters() if p.requires_grad]
    objective = assembly.objective_of(args)

    def step(batch: PrefixBatch) -> None:
        q = network.target(batch)
        aim = returns(batch, q)
        advantages = (aim - q.values) * batch.action_mask
        target = TDTarget(aim, advantages, advantages.clamp(min=0), q.taken)
        loss, _ = objective(network, batch, target, batch.action_mask.sum(), target.weights.sum())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return network, step


def variant(name: str, tokens: int, layers: int) -> Step:
    """The step of a variant, its model built."""
    if name in OURS:
        return ours(tokens, layers, OURS[name])
    return PEERS[name](model(tokens, layers), lora_config(16, 32, 0.0, "all-linear"))


class Worker:
    """A variant in a process of its own, which takes a step when it is told to."""

    def __init__(self, name: str, tokens: int, layers: int) -> None:
        self.name = name
        command = [sys.executable, "-m", "benchmarks.update", "--worker", name, str(tokens), "--layers", str(layers)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str) -> float:
        """The worker's answer; RuntimeError when it is gone."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} ended at '{what}' with code {self.process.wait()} (-9: out of memory?)")
        return float(answer)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def answer(name: str, tokens: int, layers: int) -> None:
    """The worker's side: `build`, `peak` in bytes above what it held before, `step` in CPU seconds."""
    given = batch(tokens, BATCH, PROMPT, COMPLETION)
    for line in sys.stdin:
        if line.strip() == "build":
            step = variant(name, tokens, layers)
            step(batch(tokens, 2, 2, 2))
            found = 0.0
        elif line.strip() == "peak":
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
            before = resident("VmRSS")
            step(given)
            found = resident("VmHWM") - before
        else:
            started = time.process_time()
            step(given)
            found = time.process_time() - started
        print(found, flush=True)


def resident(line: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM at most."""
    found = re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(chosen: list[str], tokens: int, layers: int, rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """CPU seconds of these variants, round after round, and bytes of each at its peak."""
    with ExitStack() as running:
        workers = [running.enter_context(Worker(name, tokens, layers)) for name in chosen]
        for worker in workers:
            worker.ask("build")
        peaks = {worker.name: int(worker.ask("peak")) for worker in workers}
        taken: dict[str, list[float]] = {worker.name: [] for worker in workers}
        for _ in range(rounds):
            for worker in workers:
                taken[worker.name].append(worker.ask("step"))
    return taken, peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--vocabularies", type=int, nargs="*", default=VOCABULARIES)
    parser.add_argument("--variants", nargs="*", help="beside the cross-entropy step")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, about itself
    if options.worker:
        answer(options.worker[0], int(options.worker[1]), options.layers)
        return
    rounds, started = options.rounds or (1 if options.quick else 3), time.perf_counter()
    measured: dict[str, Any] = {}
    for tokens in options.vocabularies:
        one: dict[str, Any] = {"runs": [], "peak_bytes": {}}
        measured[str(tokens)] = one
        for chosen in groups(tokens, options.variants or [*OURS, *PEERS], options.quick):
            taken, peaks = measure(chosen, tokens, options.layers, rounds)
            one["runs"].append(taken)
            one["peak_bytes"] |= peaks
            print(tokens, taken, peaks, flush=True)
    summed_up = measured.get(str(max(VOCABULARIES)), {"peak_bytes": {}})["peak_bytes"]
    if not {"lm", "linear"} <= set(summed_up):
        return
    results = summary(measured, " ".join(["python -m benchmarks.update", *sys.argv[1:]]), options.layers)
    results["minutes"] = round((time.perf_counter() - started) / 60, 1)
    publish("update", results, table(results))


def groups(tokens: int, wanted: list[str], quick: bool) -> list[list[str]]:
    """Variants that are in memory together, the baseline in each group."""
    chosen = [name for name in (*OURS, *PEERS) if name in (BASELINE, *wanted)]
    if tokens < 100_000 or ALONE not in chosen:
        return [chosen]
    together = [name for name in chosen if name != ALONE]
    return [together] if quick else [together, [BASELINE, ALONE]]


def summary(measured: dict[str, Any], command: str, layers: int) -> dict[str, Any]:
    """What `update.json` has: the ratios first, then all that was measured."""
    for one in measured.values():
        found = {name for run in one["runs"] for name in run}
        one["seconds"] = {
            name: statistics.median(value for run in one["runs"] for value in run.get(name, ())) for name in found
        }
        # Within a round, as the machine's speed drifts.
        one["time_ratios"] = {name: statistics.median(_ratios(one["runs"], name)) for name in found}
        baseline = one["peak_bytes"][BASELINE]
        one["memory_ratios"] = {name: peak / baseline for name, peak in one["peak_bytes"].items()}
    largest = measured[str(max(VOCABULARIES))]
    ratios = {
        f"{kind}_ratio": {head: largest[f"{kind}_ratios"][head] for head in ("lm", "linear")}
        for kind in ("time", "memory")
    }
    return {
        **ratios,
        "command": command,
        "machine": machine(),
        "layers": layers,
        "episodes": BATCH,
        "prompt_tokens": PROMPT,
        "completion_tokens": COMPLETION,
        "vocabularies": dict(sorted(measured.items(), key=lambda item: int(item[0]))),
    }


def _ratios(runs: list[dict[str, list[float]]], name: str) -> list[float]:
    """Of a variant to the baseline, round by round of the runs that have both."""
    pairs = [pair for run in runs if name in run for pair in zip(run[name], run[BASELINE], strict=True)]
    return [one / baseline for one, baseline in pairs]


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    facts = results["machine"]
    lines = [
        f"`{results['command']}`: {results['layers']} layers, {results['episodes']} episodes of "
        f"{results['prompt_tokens']} prompt and {results['completion_tokens']} completion tokens, float32, "
        f"{facts['threads']} thread, torch {facts['torch']}; CPU seconds, GB above "
        "the model, and both over the cross-entropy step.",
        "",
        "| | " + " | ".join(f"V = {int(tokens):,}: time | memory" for tokens in results["vocabularies"]) + " |",
        "|---" * (1 + 2 * len(results["vocabularies"])) + "|",
    ]
    for name in (*OURS, *PEERS):
        cells = []
        for one in results["vocabularies"].values():
            seconds, peak = one["seconds"].get(name), one["peak_bytes"].get(name)
            cells.append("not run" if seconds is None else f"{seconds:.2f} s, {one['time_ratios'][name]:.2f}")
            cells.append("not run" if peak is None else f"{peak / 1e9:.2f} GB, {one['memory_ratios'][name]:.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
