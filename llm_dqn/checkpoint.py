"""What lies in a checkpoint: its files, the manifest that vouches for them, and reading them back.

A checkpoint is whole or absent: `saver` writes it aside, the manifest last, and renames it. Safetensors and JSON only;
nothing is ever unpickled.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llm_dqn.episode_store import EpisodeStore
from llm_dqn.errors import RunError, UserError
from llm_dqn.replay import PrefixReplay
from llm_dqn.resume import dealt

FORMAT_VERSION = 5
MANIFEST, STATE = "manifest.json", "state.json"
UNFINISHED, SET_ASIDE = ".tmp", ".set-aside"  # endings of folders that are no checkpoints
# What evaluations are compared by, the first first; the best checkpoint is kept whatever its age.
MEASURES = ("eval/reward_greedy", "eval/reward")

Parts = dict[str, dict[str, Tensor]]
_FOLDER = re.compile(r"step-\d{6,}")
_PLAIN = re.compile(r"\w[\w.-]*", flags=re.ASCII)
_SEGMENT_FILE = re.compile(r"(replay-\d+)-(segment-\d+)\.safetensors")


def checkpoint_folder(root: Path, step: int) -> Path:
    """`root/step-000100`."""
    return root / f"step-{step:06d}"


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(folder.name.removeprefix("step-"))


def folders(root: Path) -> list[Path]:
    """All that have a checkpoint's name, the newest first."""
    return sorted((f for f in root.glob("step-*") if _FOLDER.fullmatch(f.name)), key=step_of, reverse=True)


def file_of(part: str, entry: str) -> tuple[str, str]:
    """(file, name in it) of an entry of a part; `replay-00000`'s `segment-000003/tokens` has a file with its like."""
    group, _, name = entry.rpartition("/")
    return (f"{part}-{group}.safetensors" if group else f"{part}.safetensors"), name


# --- looking ----------------------------------------------------------------------------------------------------------


def newest(root: Path, repair: bool = False) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is complete, and a line for each newer one that is damaged.

    repair: one that only lacks segments of the replay will do.
    """
    damaged: list[str] = []
    for folder in folders(root):
        found = problems(folder)
        if not found or (repair and only_segments(found)):
            return folder, damaged
        damaged.append(f"{folder.name}: {in_words(found)}")
    return None, damaged


def unfinished(root: Path) -> list[Path]:
    """What is left of checkpoints that were being written when their run was ended."""
    return sorted(root.glob(f"*{UNFINISHED}"))


def verify(folder: Path) -> str | None:
    """None when every file is what the manifest says, else what is wrong: all that is missing, all that is damaged."""
    return in_words(problems(folder)) or None


def problems(folder: Path, checksums: bool = True) -> dict[str, str]:
    """What is wrong with which file; empty for a checkpoint that is whole. Without `checksums` it costs nothing."""
    try:
        files = _manifest(folder)["files"]
    except RunError as error:
        return {MANIFEST: str(error)}
    found = {name: _problem(folder / name, facts, checksums) for name, facts in files.items()}
    here = {file.name for file in folder.iterdir() if not file.name.startswith(".")}
    found |= dict.fromkeys(sorted(here - files.keys() - {MANIFEST}), f"is not in {MANIFEST}; remove it")
    return {name: problem for name, problem in found.items() if problem is not None}


def in_words(found: Mapping[str, str]) -> str:
    """Problems as one line, files with the same one together."""
    names: dict[str, list[str]] = {}
    for name, problem in found.items():
        names.setdefault(problem, []).append(name)
    return "; ".join(
        f"{', '.join(several)} {problem.replace('is missing', 'are missing') if several[1:] else problem}"
        for problem, several in names.items()
    )


def only_segments(found: Mapping[str, str]) -> bool:
    """Whether the replay alone is damaged, and only in segments that it can do without."""
    return all(_SEGMENT_FILE.fullmatch(name) for name in found)


def manifest(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises RunError when it cannot be used."""
    try:
        return _manifest(folder)
    except RunError as error:
        raise RunError(f"checkpoint {folder} is damaged: {MANIFEST} {error}") from None


def _manifest(folder: Path) -> dict[str, Any]:
    """Its errors read on from the manifest's name."""
    file = folder / MANIFEST
    if file.is_symlink():
        raise RunError("is a link, which is never followed")
    try:
        facts = json.loads(file.read_bytes())
        version = facts["format_version"]
    except FileNotFoundError:
        raise RunError("is missing") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RunError("is not readable") from None
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        cure = "update llm-dqn to go on from it" if newer else "go on from it with the version that wrote it"
        raise RunError(f"has format version {version!r}, this llm-dqn reads {FORMAT_VERSION}; {cure}")
    files = facts.get("files")
    if not isinstance(files, dict) or STATE not in files:
        raise RunError("lists no files")
    for name, fact in files.items():
        if not _PLAIN.fullmatch(name):
            raise RunError(f"lists {name!r}, which is not the plain name of a file beside it")
        if not isinstance(fact, dict) or not {"bytes", "sha256"} <= fact.keys():
            raise RunError(f"has no size or checksum of {name}")
    return facts


def _problem(file: Path, facts: Mapping[str, Any], checksums: bool) -> str | None:
    if file.is_symlink():
        return "is a link, which is never followed"
    if not file.is_file():
        return "is missing"
    if file.stat().st_size != facts["bytes"]:
        return f"has {file.stat().st_size} bytes instead of {facts['bytes']}"
    if checksums and sha256(file) != facts["sha256"]:
        return "does not match its checksum"
    return None


def sha256(file: Path) -> str:
    """Of the content of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- reading ----------------------------------------------------------------------------------------------------------


def read(folder: Path, repair: bool = False) -> tuple[dict[str, Any], Parts]:
    """The state and every part of a checkpoint. Raises RunError naming the files that are missing or damaged.

    repair: damaged segments of the replay are left out.
    """
    found = problems(folder)
    if found and not (repair and only_segments(found)):
        cure = "; --replay-repair goes on without these episodes" if only_segments(found) else ""
        raise RunError(f"checkpoint {folder} is damaged: {in_words(found)}{cure}")
    parts: Parts = {}
    for name in _manifest(folder)["files"]:
        if name in found or not name.endswith(".safetensors"):
            continue
        try:
            tensors = load_file(folder / name)
        except SafetensorError as error:
            raise RunError(f"checkpoint {folder} is damaged: {name} cannot be opened ({error})") from error
        segment = _SEGMENT_FILE.fullmatch(name)
        if segment:
            parts.setdefault(segment[1], {}).update({f"{segment[2]}/{key}": value for key, value in tensors.items()})
        else:
            parts.setdefault(name.removesuffix(".safetensors"), {}).update(tensors)
    return json.loads((folder / STATE).read_bytes()), parts


def read_stores(folder: Path) -> list[EpisodeStore]:
    """The replay buffers of a checkpoint, one a process. Their segments are mapped from its files, not read at once."""
    _, parts = read(folder)
    return [_store(parts[name]) for name in sorted(parts) if name.startswith("replay-")]


def read_replay(folder: Path) -> list[dict[str, np.ndarray]]:
    """The same with all in memory, one dict of arrays a process, in the form of `PrefixReplay.load_arrays`."""
    return [store.flat_arrays() for store in read_stores(folder)]


def _store(part: Mapping[str, Tensor], vocabulary: bytes = b"") -> EpisodeStore:
    store = EpisodeStore(max(1, len(part["lengths"])), int(part["segment_size"][0]), vocabulary)
    store.restore(as_arrays(part))
    return store


def restore_replay(replay: PrefixReplay, parts: Parts, rank: int, world: int) -> int:
    """Fills one process's replay from a checkpoint; returns of how many processes that was.

    With as many as now each gets what it had, otherwise all episodes are dealt out anew.
    """
    shards = [parts[name] for name in sorted(parts) if name.startswith("replay-")]
    if len(shards) == world:
        replay.restore(as_arrays(shards[rank]))
    else:
        replay.load_arrays(dealt([_store(part, replay.store.vocabulary).flat_arrays() for part in shards], rank, world))
    return len(shards)


# --- keeping ----------------------------------------------------------------------------------------------------------


def best(candidates: list[Path]) -> Path | None:
    """The checkpoint whose last evaluation was best, the newest of equals; None where none was evaluated."""
    scores: dict[Path, tuple[float, ...]] = {}
    for folder in candidates:
        measured = _manifest(folder).get("evaluation") or {}
        if all(name in measured for name in MEASURES):
            scores[folder] = (*(measured[name] for name in MEASURES), step_of(folder))
    return max(scores, key=lambda folder: scores[folder]) if scores else None


def prune(root: Path, keep: int) -> None:
    """Deletes all but `keep` checkpoints: the newest ones, the best one among them; never the only complete one.

    With `keep` 1 the newest stays, and the best beside it.
    """
    if keep < 1:
        raise UserError(f"train.save_total_limit must be at least 1, got {keep}")
    complete = [folder for folder in folders(root) if not problems(folder, checksums=False)]
    if not complete:
        return
    kept, good = complete[:keep], best(complete)
    if good is not None and good not in kept:
        kept = [*complete[: max(1, keep - 1)], good]
    for folder in folders(root):
        if folder not in kept and step_of(folder) < step_of(complete[0]):
            shutil.rmtree(folder)


def set_aside(root: Path, after: int) -> list[Path]:
    """Renames checkpoints of later steps than `after`, so that a run that goes on from there is the newest again."""
    moved = []
    for folder in folders(root):
        if step_of(folder) > after:
            number = 1
            while (aside := folder.with_name(f"{folder.name}{SET_ASIDE}-{number}")).exists():
                number += 1
            moved.append(folder.rename(aside))
    return moved


# --- parts ------------------------------------------------------------------------------------------------------------


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's moments as `index.name` -> tensor; its settings are the recipe's and are not stored."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": torch.as_tensor(v) for index, part in state.items() for name, v in part.items()}


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    share_of: Callable[[Tensor, Tensor], Tensor] = lambda value, like: value,
) -> None:
    """The reverse of `optimizer_tensors`. share_of: (tensor, its parameter) -> what this process keeps."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    whole = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = share_of(value, parameters[int(index)])
    whole["state"] = state
    optimizer.load_state_dict(whole)


def as_tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Numpy arrays as tensors over the same memory."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def as_arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The reverse of `as_tensors`."""
    return {name: tensor.numpy() for name, tensor in tensors.items()}
