"""`llm-dqn score` against the forward passes that it cannot do without, and its memory against the file's length.

    python -m benchmarks.score                 # 10,000 completions, the embedded model
    python -m benchmarks.score --quick         # 2,000

The bare pass is `model(input_ids, attention_mask).logits` over padded batches in the file's order, tokenised before
the clock starts, nothing kept. An adapter's Q is defined by two policies, so there it is two passes: tuned and base.
`score` reads JSON lines, tokenises, passes, looks, and writes JSON lines. Both run in turn, part by part, on one
thread; ratios are of processor seconds, which other programs on the machine disturb least. Rewards are measured apart.

Writes `benchmarks/results/score.json` and the table in `benchmarks/README.md`.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.tables import publish
from benchmarks.textbook import machine
from llm_dqn import models
from llm_dqn.adapters import Role, lora_config
from llm_dqn.inference import open_run
from llm_dqn.network import QNetwork
from llm_dqn.rewards import Rewards, load_reward
from llm_dqn.row_stream import RowStream
from llm_dqn.score_files import Scorer, score_file

MODEL, LOGGED, REWARD_MODEL = "data/tiny_lm", "data/logged.jsonl", "data/tiny_reward_model"
PART, BATCH = 2000, 64  # completions a part, and in one pass of the model

Row = dict[str, str]


def rows_of(count: int) -> list[Row]:
    """Prompts of the logged data, each time round with the completion of another row."""
    logged = [json.loads(line) for line in Path(LOGGED).read_text(encoding="utf-8").splitlines()]
    size = len(logged)
    return [
        {"prompt": logged[i % size]["prompt"], "completion": logged[(i + 37 * (i // size)) % size]["completion"]}
        for i in range(count)
    ]


def save(rows: list[Row], file: Path) -> Path:
    """The rows as JSON lines."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def adapter(folder: Path) -> str:
    """An adapter with value head on the embedded model, of the default size; its weights do not matter here."""
    torch.manual_seed(0)
    model, tokenizer = models.load_causal_lm(MODEL), models.load_tokenizer(MODEL)
    lora = lora_config(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    network = QNetwork(model, models.num_valid_tokens(model, tokenizer), lora=lora)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    network.save_policy(folder)
    return str(folder)


class Clock:
    """Processor and wall seconds of a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        function(*arguments)
        self.cpu, self.wall = time.process_time() - cpu, time.perf_counter() - wall


def forward_passes(network: QNetwork, rows: list[list[int]]) -> None:
    """The bare passes: one for a plain model, two for an adapter."""
    roles: tuple[Role, ...] = ("online",) if network.is_base else ("online", "reference")
    for role in roles:
        with torch.inference_mode(), network.roles.acting_as(role) as model:
            model.eval()
            for start in range(0, len(rows), BATCH):
                part = rows[start : start + BATCH]
                longest = max(map(len, part))
                input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in part])
                mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in part])
                _ = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits


def ids_of(tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> list[list[int]]:
    """Prompt, completion and end-of-sequence token of each row."""
    asked = tokenizer([row["prompt"] for row in rows])["input_ids"]
    said = tokenizer([row["completion"] for row in rows], add_special_tokens=False)["input_ids"]
    return [one + other + [tokenizer.eos_token_id] for one, other in zip(asked, said, strict=True)]


def scored(run: str, file: Path, rewards: list[str] | None = None) -> Clock:
    """Seconds that scoring a file takes once the model is loaded."""
    scorer = Scorer(run, RowStream(file), rewards or [], BATCH, 3, False, lambda said: None)
    return Clock(score_file, scorer, str(file.with_suffix(".scores")))


def against_forward(run: str, rows: list[Row], folder: Path) -> dict[str, Any]:
    """Bare passes and `score` in turn, part by part."""
    network, tokenizer = (opened := open_run(run).writer).network, opened.tokenizer
    parts = []
    forward_passes(network, [[5, 6, 7]] * BATCH)  # what only the first call pays for
    for number, start in enumerate(range(0, len(rows), PART)):
        part = rows[start : start + PART]
        file = save(part, folder / "part.jsonl")
        ids = ids_of(tokenizer, part)
        works = {
            "bare": lambda: Clock(forward_passes, network, ids),  # noqa: B023 -- called before the loop goes on
            "score": lambda: scored(run, file),  # noqa: B023
            "bare_sorted": lambda: Clock(forward_passes, network, sorted(ids, key=len)),  # noqa: B023
        }
        order = list(works) if number % 2 == 0 else list(reversed(works))
        times = {name: works[name]() for name in order}
        measured: dict[str, Any] = {name: vars(times[name]) for name in works}
        parts.append(measured | {"completions": len(part)})
        print(run, number, {name: round(clock.cpu, 2) for name, clock in times.items()}, flush=True)
    ratios = {
        f"{other}_over_score_{kind}": [part[other][kind] / part["score"][kind] for part in parts]
        for other in ("bare", "bare_sorted")
        for kind in ("cpu", "wall")
    }
    per_second = {
        name: len(rows) / sum(part[name]["cpu"] for part in parts) for name in ("bare", "score", "bare_sorted")
    }
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    return {"completions": len(rows), "parts": parts, "ratios": ratios, "medians": medians, "per_second": per_second}


def with_rewards(run: str, rows: list[Row], folder: Path) -> dict[str, float]:
    """What the quickstart's reward model adds, beside calling it alone on the same completions."""
    file = save(rows, folder / "rewarded.jsonl")
    rewards = Rewards([load_reward(REWARD_MODEL)])

    def alone() -> None:
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            rewards.score([row["prompt"] for row in part], [row["completion"] for row in part])

    scored(run, file, [REWARD_MODEL])
    judged, without, both = Clock(alone), scored(run, file), scored(run, file, [REWARD_MODEL])
    return {"completions": len(rows), "reward_alone": judged.cpu, "score": without.cpu, "score_with_reward": both.cpu}


def most_held() -> int:
    """Bytes that this process has held at most. `getrusage` would also count the one that started it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024


def peak(count: int, bare: bool = False) -> int:
    """Bytes that a process of its own holds at most while it scores so many completions, or passes them through."""
    command = [sys.executable, "-m", "benchmarks.score", "--peak", str(count), *(["--bare"] if bare else [])]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.peak:
            if options.bare:
                writer = open_run(MODEL).writer
                forward_passes(writer.network, ids_of(writer.tokenizer, rows_of(options.peak)))
            else:
                scored(MODEL, save(rows_of(options.peak), folder / "rows.jsonl"))
            print(most_held())
            return
        count = PART if options.quick else 5 * PART
        rows = rows_of(count)
        runs = {"plain model, one pass": MODEL, "adapter, two passes": adapter(folder / "adapter")}
        results: dict[str, Any] = {
            "machine": machine(),
            "command": "python -m benchmarks.score" + (" --quick" if options.quick else ""),
            "speed": {name: against_forward(run, rows, folder) for name, run in runs.items()},
            "rewards": with_rewards(MODEL, rows[:PART], folder),
            "peak_bytes": {str(size): [peak(size, bare) for bare in (True, False)] for size in (PART, count)},
        }
    publish("score", results, table(results))


def table(results: dict[str, Any]) -> str:
    """Markdown: speed beside the bare passes, then memory."""
    facts = results["machine"]
    lines = [
        f"`{results['command']}`, {facts['cores']} cores, one thread, torch {facts['torch']}; processor seconds.",
        "",
        "| | completions a second, bare | `score` | speed of bare, median (range) | of bare sorted by length |",
        "|---|---|---|---|---|",
    ]
    for name, found in results["speed"].items():
        speed, ratios, medians = found["per_second"], found["ratios"], found["medians"]
        spread = ratios["bare_over_score_cpu"]
        lines.append(
            f"| {name}, {found['completions']:,} completions | {speed['bare']:.0f} | {speed['score']:.0f} | "
            f"{medians['bare_over_score_cpu']:.0%} ({min(spread):.0%} to {max(spread):.0%}) | "
            f"{medians['bare_sorted_over_score_cpu']:.0%} |"
        )
    paid = results["rewards"]
    lines += [
        "",
        f"{paid['completions']:,} completions by the quickstart's reward model alone: {paid['reward_alone']:.1f} s; "
        f"`score` without it: {paid['score']:.1f} s, with it: {paid['score_with_reward']:.1f} s.",
        "",
        "| completions in the file | most memory held, bare | `score` |",
        "|---|---|---|",
        *(
            f"| {int(size):,} | {bare / 2**20:.0f} MiB | {held / 2**20:.0f} MiB |"
            for size, (bare, held) in results["peak_bytes"].items()
        ),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
