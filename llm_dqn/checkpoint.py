"""Checkpoints that are whole or absent: written aside, a manifest with checksums last, then renamed.

Safetensors and JSON only; nothing is ever unpickled.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm_dqn.errors import RunError, UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


def checkpoint_folder(root: Path, step: int) -> Path:
    """`root/step-000100`."""
    return root / f"step-{step:06d}"


def write_part(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Adds `name`.safetensors to a checkpoint that is being written; every process may add its own parts."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    save_file(plain, folder / f"{name}.safetensors")


def finish(temporary: Path, final: Path, state: dict[str, Any]) -> None:
    """Writes `state.json` and the manifest, syncs everything to disk and gives the folder its name."""
    (temporary / "state.json").write_text(json.dumps(state))
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(temporary.iterdir())
        if file.name != MANIFEST
    }
    for name in files:
        _sync(temporary / name)
    (temporary / MANIFEST).write_text(json.dumps({"format_version": FORMAT_VERSION, "files": files}, indent=2))
    _sync(temporary / MANIFEST)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    _sync(final.parent)


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is complete, and a line for each newer one that is damaged."""
    damaged: list[str] = []
    for folder in sorted(root.glob("step-??????"), reverse=True):
        problem = verify(folder)
        if problem is None:
            return folder, damaged
        damaged.append(f"{folder.name}: {problem}")
    return None, damaged


def verify(folder: Path) -> str | None:
    """None when every file is what the manifest says, else what is wrong with the first one that is not."""
    manifest_file = folder / MANIFEST
    if not manifest_file.is_file():
        return f"{MANIFEST} is missing"
    try:
        manifest = json.loads(manifest_file.read_text())
    except ValueError:
        return f"{MANIFEST} is not JSON"
    if manifest.get("format_version") != FORMAT_VERSION:
        return f"format version {manifest.get('format_version')}, this version reads {FORMAT_VERSION}"
    for name, facts in manifest["files"].items():
        if Path(name).name != name:
            return f"{name} is not a plain file name"
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != facts["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {facts['bytes']}"
        if _sha256(file) != facts["sha256"]:
            return f"{name} does not match its checksum"
    return None


def read(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """`state.json` and every part of a checkpoint; RunError names the file that is damaged."""
    problem = verify(folder)
    if problem is not None:
        raise RunError(f"checkpoint {folder} is damaged: {problem}")
    parts = {file.stem: load_file(file) for file in folder.glob("*.safetensors")}
    return json.loads((folder / "state.json").read_text()), parts


def read_replay(folder: Path) -> list[dict[str, np.ndarray]]:
    """The replay buffers of a checkpoint, one dict of arrays a process, in the form of `PrefixReplay.load_arrays`."""
    _, parts = read(folder)
    return [as_arrays(parts[name]) for name in sorted(parts) if name.startswith("replay-")]


def prune(root: Path, keep: int) -> None:
    """Deletes all but the `keep` newest checkpoints, and what unfinished writing left behind."""
    if keep < 1:
        raise UserError(f"train.save_total_limit must be at least 1, got {keep}")
    for folder in sorted(root.glob("step-??????"))[:-keep]:
        shutil.rmtree(folder)
    for leftover in root.glob("*.tmp"):
        shutil.rmtree(leftover)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's moments as `index.name` -> tensor; its settings are the recipe's and are not stored."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": torch.as_tensor(v) for index, part in state.items() for name, v in part.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The reverse of `optimizer_tensors`."""
    whole = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    whole["state"] = state
    optimizer.load_state_dict(whole)


def as_tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Numpy arrays as tensors over the same memory."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def as_arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The reverse of `as_tensors`."""
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
