"""What travels between a learner and collectors apart from it, as files in folders that both see.

Collectors write replay segments, each a file that appears whole under a name with its checksum and never changes. The
learner writes its policy into its run folder, and how far it has read. Whoever is killed leaves nothing half-written
that anybody reads.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

from llm_dqn.checkpoint import as_arrays, as_tensors, sha256
from llm_dqn.errors import RunError
from llm_dqn.replay import ENDED, PrefixReplay
from llm_dqn.saver import sync
from llm_dqn.types import Episode

POLICY, TAKEN, FINISHED = "policy.safetensors", "taken.json", "finished"
_ORDER = re.compile(r"order\.(\d{6,})\.safetensors", flags=re.ASCII)
_NAME = re.compile(r"([\w-]+)\.(\d{6,})\.(\d+)\.([0-9a-f]{64})\.safetensors", flags=re.ASCII)


# --- segments, from collector to learner ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segment:
    """A file of episodes: the `number`-th of its worker, for which `scored` completions were given to the rewards."""

    path: Path
    worker: str
    number: int
    scored: int
    sha256: str


@dataclass(frozen=True)
class Content:
    """What a segment holds. run: of the learner whose policy wrote it."""

    run: str
    vocabulary: str
    episodes: list[Episode]


def segments(folder: Path) -> list[Segment]:
    """All whole segments in a folder, the oldest first; files under other names are not looked at.

    What is taken by another process while this one looks is not there.
    """
    found = []
    for entry in os.scandir(folder) if folder.is_dir() else ():
        if (parts := _NAME.fullmatch(entry.name)) and entry.is_file(follow_symlinks=False):
            segment = Segment(Path(entry.path), parts[1], int(parts[2]), int(parts[3]), parts[4])
            with suppress(FileNotFoundError):
                found.append((entry.stat().st_mtime_ns, segment.worker, segment.number, segment))
    return [segment for *_, segment in sorted(found, key=lambda row: row[:3])]


def write_segment(
    folder: Path, worker: str, number: int, scored: int, episodes: Sequence[Episode], run: str, vocabulary: bytes
) -> Path:
    """Writes a segment whole or not at all; returns its file."""
    memory = PrefixReplay(max(1, len(episodes)))
    memory.add(episodes)
    about = {
        "run": run,
        "vocabulary": vocabulary.hex(),
        "prompts": [episode.prompt for episode in episodes],
        "completions": [episode.completion for episode in episodes],
        "rewards": [episode.rewards for episode in episodes],
    }
    arrays = memory.state_arrays() | {"about": np.frombuffer(json.dumps(about).encode(), np.uint8).copy()}
    content = save(as_tensors(arrays))
    digest = hashlib.sha256(content).hexdigest()
    file = folder / f"{worker}.{number:06d}.{scored}.{digest}.safetensors"
    temporary = folder / f".{worker}.tmp"
    temporary.write_bytes(content)
    sync(temporary)
    os.replace(temporary, file)
    sync(folder)
    return file


def read_segment(segment: Segment) -> Content:
    """What a segment holds. Raises RunError when it is not what was written."""
    try:
        content = segment.path.read_bytes()
        if hashlib.sha256(content).hexdigest() != segment.sha256:
            raise RunError(f"{segment.path} does not match the checksum in its name")
        arrays = as_arrays({name: torch.clone(tensor) for name, tensor in load(content).items()})
        about = json.loads(arrays.pop("about").tobytes())
        return Content(about["run"], about["vocabulary"], _episodes(arrays, about))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise RunError(f"{segment.path} cannot be read: {error}") from error


def _episodes(arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> list[Episode]:
    token_ends = arrays["lengths"].cumsum()
    action_ends = (arrays["lengths"] - arrays["prompt_lengths"]).cumsum()
    tokens = np.split(arrays["tokens"].astype(np.int64), token_ends[:-1])
    references = np.split(arrays["ref_logprobs"], action_ends[:-1])
    behaviours = np.split(arrays["behaviour_logprobs"], action_ends[:-1])
    found = []
    for row in range(len(arrays["lengths"])):
        split = int(arrays["prompt_lengths"][row])
        found.append(
            Episode(
                prompt=about["prompts"][row],
                completion=about["completions"][row],
                prompt_ids=torch.from_numpy(tokens[row][:split]),
                completion_ids=torch.from_numpy(tokens[row][split:]),
                ref_logprobs=torch.from_numpy(references[row]),
                behaviour_logprobs=torch.from_numpy(behaviours[row]),
                ended=ENDED[int(arrays["ended"][row])],  # type: ignore[arg-type]
                reward=float(arrays["rewards"][row]),
                rewards=about["rewards"][row],
                policy_version=int(arrays["versions"][row]),
            )
        )
    return found


# --- the policy, from learner to collectors ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """Weights of the online network as they were after `step`, and the share of exploration then."""

    run: str
    step: int
    epsilon: float
    tensors: dict[str, Tensor]


def publish_policy(folder: Path, policy: Policy) -> None:
    """Puts a policy in the place of the one before it, in one move."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{POLICY}.tmp"
    about = {"run": policy.run, "step": str(policy.step), "epsilon": repr(policy.epsilon)}
    save_file({name: value.detach().cpu().contiguous() for name, value in policy.tensors.items()}, temporary, about)
    os.replace(temporary, folder / POLICY)


def published_step(folder: Path) -> tuple[str, int] | None:
    """(run, step) of the policy that is there; None where there is none yet."""
    try:
        with safe_open(folder / POLICY, "pt") as file:
            return file.metadata()["run"], int(file.metadata()["step"])
    except FileNotFoundError:
        return None


def read_policy(folder: Path) -> Policy:
    """The policy that is there now."""
    with safe_open(folder / POLICY, "pt") as file:
        about = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Policy(about["run"], int(about["step"]), float(about["epsilon"]), tensors)


# --- orders, from a learner to the collectors that it started itself --------------------------------------------------


@dataclass(frozen=True)
class Order:
    """One segment that is to be written, by a policy that lies beside it. A collector needs to know nothing else.

    number: of the segment. step: of the policy. prompts: where the stream of prompts stands, of which `draw` are to be
    continued, in at most `completions` completions. scored: completions that were scored before, which key the seed.
    temperature: of acting, but 1 at those of the prompts that are among `failed`, as `Attempts` names them.
    """

    number: int
    step: int
    epsilon: float
    prompts: dict[str, int]
    draw: int
    completions: int
    scored: int
    temperature: float = 1.0  # in checkpoints from before orders told it
    failed: Sequence[str] = ()


def place_order(folder: Path, order: Order, tensors: Mapping[str, Tensor]) -> str:
    """Writes an order with its policy, whole or not at all; returns its digest, by which segments answer it."""
    file = order_file(folder, order.number)
    temporary = file.with_name(f".{file.name}.tmp")
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(whole, temporary, {"order": json.dumps(asdict(order))})
    digest = sha256(temporary)
    os.replace(temporary, file)
    return digest


def read_order(file: Path) -> tuple[Order, dict[str, Tensor], str]:
    """The order, the weights of its policy, and its digest."""
    with safe_open(file, "pt") as opened:
        order = Order(**json.loads(opened.metadata()["order"]))
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return order, tensors, sha256(file)


def order_file(folder: Path, number: int) -> Path:
    """Where an order lies."""
    return folder / f"order.{number:06d}.safetensors"


def orders(folder: Path) -> list[tuple[int, Path]]:
    """(number, file) of all orders in a folder, the oldest first."""
    found = [(int(parts[1]), file) for file in folder.iterdir() if (parts := _ORDER.fullmatch(file.name))]
    return sorted(found)


def write_json(file: Path, content: Any) -> None:
    """Whole or not at all."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    os.replace(temporary, file)


def read_taken(folder: Path) -> dict[str, int]:
    """Worker -> number of the segment that the learner wants from it next."""
    file = folder / TAKEN
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
