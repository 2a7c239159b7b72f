"""What more GPUs cost, on paper: bytes moved, memory, replay, and how many write for one that learns.

    python -m benchmarks.scaling_model            # prints the tables of docs/scaling.md and puts them there
    python -m benchmarks.scaling_model --check    # first counts the bytes of a real run of two processes

The formulas stand in docs/scaling.md. Only what `--check` counts is measured; bandwidths and rates are assumptions.
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "scaling_model.json"
PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
GPUS = (8, 64, 512)
NODE = 8  # GPUs of a machine
LINK, NETWORK = 400e9, 50e9  # bytes a second and GPU, within a machine and between machines
FLOPS, READING = 400e12, 2.0e12  # useful operations and bytes a second: 40 % of a peak of 1e15, 60 % of 3.35e12
RANK = 16
PROMPT, COMPLETION = 256, 256  # tokens
BATCH, UPDATES, COLLECT = 16, 16, 64  # episodes a GPU and step, steps a collection, completions a collection and GPU
DECODED = 64  # completions written side by side


@dataclass(frozen=True)
class Shape:
    """A decoder with gated MLP and grouped attention."""

    name: str
    layers: int
    hidden: int
    inner: int
    keys: int  # width of keys, and of values
    vocabulary: int
    tied: bool

    @property
    def in_layers(self) -> int:
        """Weights of all decoder layers, without norms and biases."""
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.keys
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def outside(self) -> int:
        """Weights of embedding and output layer."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    def lora(self, rank: int = RANK) -> int:
        """Weights of an adapter on all linear layers."""
        attention = 2 * (2 * self.hidden) + 2 * (self.hidden + self.keys)
        return self.layers * rank * (attention + 3 * (self.hidden + self.inner))


SHAPES = (
    Shape("0.5 B", 24, 896, 4864, 128, 151_936, tied=True),
    Shape("7 B", 28, 3584, 18_944, 512, 152_064, tied=False),
    Shape("70 B", 80, 8192, 28_672, 1024, 128_256, tied=False),
)


def seconds(bytes_: float, gpus: int) -> float:
    """Time of bytes that each GPU must send; the slowest link rules."""
    return bytes_ / (LINK if gpus <= NODE else NETWORK)


def ddp_bytes(gradients: float, gpus: int) -> float:
    """Sent by each GPU for one update: a ring's all-reduce."""
    return 2 * (gpus - 1) / gpus * gradients


def fsdp_bytes(shape: Shape, shards: int) -> float:
    """Sent by each GPU for one update: the layers gathered for target, online and backward, gradients scattered."""
    share = (shards - 1) / shards
    return 3 * share * 2 * shape.in_layers + share * 4 * shape.lora()


def memory(shape: Shape, shards: int) -> float:
    """Bytes a GPU, activations apart: base in bfloat16; online and target adapter, gradient and two moments float32."""
    return 2 * (shape.in_layers / shards + shape.outside) + 4 * 5 * shape.lora() / shards


def replay_bytes(episodes: int) -> float:
    """Of a replay: int32 tokens, two float32 a completion token, 58 bytes of facts an episode."""
    return episodes * (4 * (PROMPT + COMPLETION) + 8 * COMPLETION + 58)


def writing_seconds(shape: Shape) -> float:
    """For one completion by a GPU that holds the model: each token reads all weights once for `DECODED` of them."""
    weights = shape.in_layers + shape.outside
    described = 2 * 2 * weights * (PROMPT + COMPLETION) / FLOPS  # reference and online log-probabilities
    return 2 * weights * COMPLETION / READING / DECODED + described


def learning_seconds(shape: Shape) -> float:
    """Of one episode in an update: 2 operations a weight and token for each of target, online and backward."""
    return 6 * (shape.in_layers + shape.outside) * (PROMPT + COMPLETION) / FLOPS


def tables() -> str:
    """Markdown."""
    lines = [
        "| model | GPUs | adapter | DDP, bytes sent (time) | FSDP2 over a machine | FSDP2 over all |",
        "|" + "---|" * 6,
    ]
    for shape in SHAPES:
        for gpus in GPUS:
            gradients = 4.0 * shape.lora()
            ddp = ddp_bytes(gradients, gpus)
            node = fsdp_bytes(shape, NODE)
            between = ddp_bytes(gradients / NODE, gpus // NODE) if gpus > NODE else 0.0
            hybrid = seconds(node, NODE) + between / NETWORK
            whole = fsdp_bytes(shape, gpus)
            lines.append(
                f"| {shape.name} | {gpus} | {size(gradients)} | {size(ddp)} ({clock(seconds(ddp, gpus))}) | "
                f"{size(node + between)} ({clock(hybrid)}) | {size(whole)} ({clock(seconds(whole, gpus))}) |"
            )
    lines += [
        "",
        "| model | memory a GPU, DDP | over 8 | over 64 | over 512 | write : learn | writers for one learner |",
    ]
    lines.append("|" + "---|" * 7)
    reuse = UPDATES * BATCH / COLLECT
    for shape in SHAPES:
        write, learn = writing_seconds(shape), reuse * learning_seconds(shape)
        lines.append(
            f"| {shape.name} | {size(memory(shape, 1))} | {' | '.join(size(memory(shape, n)) for n in GPUS)} | "
            f"{clock(write)} : {clock(learn)} a completion | {write / learn:.2f} |"
        )
    lines += ["", "| replay | episodes over all | bytes |", "|---|---|---|"]
    lines += [f"| 4,096 a GPU, {n} GPUs | {4096 * n:,} | {size(replay_bytes(4096 * n))} |" for n in GPUS]
    return "\n".join(lines)


def size(count: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def clock(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.0f} us"


def checked() -> str:
    """The count of a real run beside what the formula says, as Markdown; empty while there is none."""
    if not RESULTS.is_file():
        return ""
    facts = json.loads(RESULTS.read_text())
    return (
        f"`{facts['command']}`: {facts['bytes_a_step']:,.0f} bytes in {facts['sums_a_step']:.0f} messages were summed "
        f"a step; the formula (4 bytes x {facts['trainable']:,} tuned weights) says {4 * facts['trainable']:,}. The "
        "rest is a number for each tensor, whether it has a gradient, and five more: action tokens, positive "
        "advantage, and whether a process has found NaN, has run out of memory, was asked to stop."
    )


def check() -> None:
    """Counts what is summed in a run of two processes on the quickstart's model."""
    from benchmarks.processes import measure

    run = measure(2, steps=16, collect=64)
    names = ("bytes_a_step", "sums_a_step", "gradients")
    facts = {"command": "python -m benchmarks.scaling_model --check", "trainable": run["gradient_bytes"] // 4}
    RESULTS.write_text(json.dumps(facts | {name: run[name] for name in names}, indent=1) + "\n")


def put(name: str, text: str) -> None:
    """Between the markers of docs/scaling.md."""
    page = PAGE.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", flags=re.DOTALL)
    PAGE.write_text(pattern.sub(lambda match: f"{match[1]}{text}\n{match[2]}", page), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="count a real run of two processes first")
    if parser.parse_args(arguments).check:
        check()
    put("model", tables())
    put("checked", checked())
    print(tables(), checked(), sep="\n\n")


if __name__ == "__main__":
    main()
