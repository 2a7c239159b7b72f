"""Everything that needs a GPU, in one go of under ten minutes on one card.

    python -m benchmarks.gpu

All 24 layers of Qwen2.5-0.5B's shapes with random weights and its vocabulary, in float32 and with the trunk in bfloat16
autocast: an update beside what others do with the same tokens, and rollouts beside plain `model.generate`. Medians of
wall-clock seconds; memory is what PyTorch had allocated at most above what it held before the step. Writes
`benchmarks/results/gpu.json` with the card's name, and the table in `benchmarks/README.md`.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.tables import publish
from benchmarks.textbook import machine
from benchmarks.update import BASELINE, OURS, PEERS, batch, model, ours, variant
from llm_dqn.adapters import lora_config
from llm_dqn.models import load_tokenizer
from llm_dqn.network import QNetwork
from llm_dqn.policy import BehaviourPolicy
from llm_dqn.rollout import Writer, rollout
from llm_dqn.shipped import shipped_root
from llm_dqn.types import Prompt

PRECISIONS = {"float32": False, "bf16 trunk": True}


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    layers: int = 24
    tokens: int = 151_936
    episodes: int = 8
    prompt: int = 256
    completion: int = 256
    rows: int = 64  # written together
    repeats: int = 5


def seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median wall-clock seconds; the first call warms up."""
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def update(name: str, sizes: Sizes, bf16: bool, device: torch.device) -> dict[str, float]:
    """Seconds of a step and, on a GPU, bytes that it takes at most above the model with its moments."""
    with torch.device(device):
        if name in OURS:
            step = ours(sizes.tokens, sizes.layers, {**OURS[name], "bf16": bf16})
        else:
            step = variant(name, sizes.tokens, sizes.layers)
    given = batch(sizes.tokens, sizes.episodes, sizes.prompt, sizes.completion).to(device)

    def work() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16 and name not in OURS):  # ours has its own
            step(given)

    found = {"seconds": seconds(work, device, sizes.repeats)}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        found["bytes"] = torch.cuda.max_memory_allocated(device) - before
    return found


def writing(sizes: Sizes, bf16: bool, device: torch.device) -> dict[str, float]:
    """Tokens a second of plain generation and of rollouts, which also ask for the log-probabilities of every token."""
    with torch.device(device):
        base = model(sizes.tokens, sizes.layers)
    network = QNetwork(base, sizes.tokens, lora=lora_config(16, 32, 0.0, "all-linear"), bf16=bf16)
    tokenizer, never = load_tokenizer(str(shipped_root() / "data" / "tiny_lm")), sizes.tokens - 1
    writer = Writer(network, tokenizer, frozenset({never}), sizes.completion, sizes.rows)  # all lengths equal
    ids = torch.randint(5, never, (sizes.rows, sizes.prompt), generator=torch.Generator().manual_seed(0))
    prompts, placed = [Prompt("", "", row.tolist()) for row in ids], ids.to(device)

    def plain() -> None:
        with network.writer("online") as online:
            online.generate(
                input_ids=placed,
                attention_mask=torch.ones_like(placed),
                max_new_tokens=sizes.completion,
                do_sample=True,
                top_k=0,
                eos_token_id=never,
                pad_token_id=0,
            )

    written = sizes.rows * sizes.completion
    return {
        "plain generate": written / seconds(plain, device, 2),
        "rollout": written / seconds(lambda: rollout(writer, prompts, BehaviourPolicy(), seed=0), device, 2),
    }


def measure(sizes: Sizes, device: torch.device, names: Sequence[str] = (*OURS, *PEERS)) -> dict[str, Any]:
    """All of it: precision -> figures."""
    found: dict[str, Any] = {}
    for precision, bf16 in PRECISIONS.items():
        updates = {}
        for name in names:
            updates[name] = update(name, sizes, bf16, device)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            print(precision, name, updates[name], flush=True)
        found[precision] = {"updates": updates, "tokens_per_second": writing(sizes, bf16, device)}
        print(precision, found[precision]["tokens_per_second"], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no CUDA device; benchmarks.update and .rollout measure on CPU")
    device, sizes, started = torch.device("cuda", 0), Sizes(), time.perf_counter()
    results: dict[str, Any] = {"card": torch.cuda.get_device_name(device), "measured": measure(sizes, device)}
    results |= {"command": "python -m benchmarks.gpu", "machine": machine(), "sizes": asdict(sizes)}
    results["minutes"] = round((time.perf_counter() - started) / 60, 1)
    publish("gpu", results, table(results))


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    sizes, measured = results["sizes"], results["measured"]
    lines = [
        f"`{results['command']}` on {results['card']}, torch {results['machine']['torch']}: {sizes['layers']} layers, "
        f"V = {sizes['tokens']:,}, {sizes['episodes']} episodes of {sizes['prompt']} prompt and {sizes['completion']} "
        f"completion tokens, {results['minutes']} minutes. Over the cross-entropy step in brackets.",
        "",
        "| update | " + " | ".join(f"{precision}: ms | GB above the model" for precision in measured) + " |",
        "|---" * (1 + 2 * len(measured)) + "|",
    ]
    for name in next(iter(measured.values()))["updates"]:
        cells = []
        for one in measured.values():
            own, base = one["updates"][name], one["updates"][BASELINE]
            cells.append(f"{1e3 * own['seconds']:.0f} ({own['seconds'] / base['seconds']:.2f})")
            cells.append(f"{own['bytes'] / 1e9:.2f} ({own['bytes'] / base['bytes']:.2f})" if "bytes" in own else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| tokens a second | " + " | ".join(measured) + " |", "|---" * (1 + len(measured)) + "|"]
    for name in next(iter(measured.values()))["tokens_per_second"]:
        lines.append(
            f"| {name} | " + " | ".join(f"{m['tokens_per_second'][name]:,.0f}" for m in measured.values()) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
