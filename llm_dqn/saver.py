"""Writing checkpoints that are whole or absent, beside the training where that is safe."""

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llm_dqn import checkpoint
from llm_dqn.errors import RunError

T = TypeVar("T")
Facts = dict[str, Any]  # bytes and sha256 of a file


class Saver:
    """Writes the checkpoints of one run below `root`; every process of the run has one and calls it alike.

    Each checkpoint goes to `step-000100.tmp` first: every file and the folder are synced to disk, the manifest with
    all sizes and checksums is written last, and then the folder gets its name, so that a process that is killed, or
    a disk that is full, leaves the checkpoints before as they were. A segment of the replay that lies in the previous
    checkpoint already is linked, neither written nor summed again.

    keep: checkpoints that stay, see `checkpoint.prune`; None keeps all.
    gather: every process's value, by rank; must be called by all of them.
    """

    def __init__(
        self,
        root: Path,
        keep: int | None = None,
        rank: int = 0,
        gather: Callable[[Any], list[Any]] = lambda value: [value],
    ) -> None:
        self.root, self.keep, self.rank, self.gather = root, keep, rank, gather
        self._source: Path | None = None  # the complete checkpoint that `_written` lies in
        self._written: dict[str, tuple[dict[str, Tensor], Facts]] = {}  # segments that need not be written again
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved: int | None = None  # step of the last checkpoint, finished or under way

    def resumed(self, folder: Path, parts: checkpoint.Parts) -> None:
        """Tells from which checkpoint a run goes on; what was read from there need not be written again."""
        files = checkpoint.manifest(folder)["files"]
        self._written = {
            name: (tensors, files[name])
            for part, entries in parts.items()
            for name, tensors in _by_file(part, entries).items()
            if _is_segment(part, name)
        }
        self._source, self._saved = folder, checkpoint.step_of(folder)

    def save(
        self, step: int, state: Mapping[str, Any], parts: checkpoint.Parts, about: Mapping[str, Any], beside: bool
    ) -> None:
        """Writes a checkpoint; does nothing when the last one is of this step.

        about: more entries of the manifest. beside: returns at once and writes in a thread of its own, so nobody may
        change the tensors any more; what goes wrong is raised by `look`, `finish` or the next `save`. Raises RunError.
        """
        self.finish()
        if step == self._saved:
            self._tidy()  # the run may have been killed between its last checkpoint and the end of what was too old
            return
        self._saved = step
        job = _Job(checkpoint.checkpoint_folder(self.root, step), json.dumps(state), parts, dict(about))
        if not beside:
            self._write(job)
            return
        self._thread = threading.Thread(target=self._write_beside, args=(job,), daemon=True, name="writes-checkpoint")
        self._thread.start()

    def look(self) -> None:
        """Raises what went wrong beside the training; costs nothing and never waits."""
        if self._thread is not None and not self._thread.is_alive():
            self.finish()

    def wait(self) -> None:
        """Waits until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Waits until nothing is being written, and raises what went wrong."""
        self.wait()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write_beside(self, job: "_Job") -> None:
        try:
            self._write(job)
        except BaseException as error:  # raised again by `finish`, in the thread that trains
            self._error = error

    def _write(self, job: "_Job") -> None:
        try:
            self._everywhere(job, lambda: self._begin(job))
            facts = self._everywhere(job, lambda: self._write_parts(job))
            self._everywhere(job, lambda: self._complete(job, {k: v for part in facts for k, v in part.items()}))
        except RunError:
            self._saved = None
            raise
        self._source, self._written = job.folder, job.segments

    def _everywhere(self, job: "_Job", work: Callable[[], T]) -> list[T]:
        """What `work` returns on every process. Where it fails on one, nothing stays and all raise the same error."""
        result: Any = None
        failure = None
        try:
            result = work()
        except (OSError, SafetensorError) as error:
            failure = str(error)
        outcomes = self.gather((result, failure))
        first = next((failure for _, failure in outcomes if failure is not None), None)
        if first is None:
            return [result for result, _ in outcomes]
        if self.rank == 0:
            shutil.rmtree(job.temporary, ignore_errors=True)
        before = f"{self._source.name}, the one before it, is whole" if self._source else "there is none before it"
        raise RunError(f"checkpoint {job.folder} could not be written ({first}); {before}")

    def _begin(self, job: "_Job") -> None:
        if self.rank == 0:
            for leftover in checkpoint.unfinished(self.root):
                shutil.rmtree(leftover)
            job.temporary.mkdir(parents=True)

    def _write_parts(self, job: "_Job") -> dict[str, Facts]:
        """Writes this process's files; their facts by name."""
        written: dict[str, Facts] = {}
        for part, entries in job.parts.items():
            if self.rank != 0 and not part.startswith("replay-"):
                continue
            for name, tensors in _by_file(part, entries).items():
                known = self._written.get(name)
                file = job.temporary / name
                if known and _same_memory(known[0], tensors) and self._link(name, file):
                    written[name] = known[1]
                else:
                    save_file(tensors, file)
                    sync(file)
                    written[name] = {"bytes": file.stat().st_size, "sha256": checkpoint.sha256(file)}
                if _is_segment(part, name):
                    job.segments[name] = (tensors, written[name])
        return written

    def _link(self, name: str, file: Path) -> bool:
        """Puts a file of the previous checkpoint into this one; false when somebody has taken it away."""
        assert self._source is not None
        try:
            os.link(self._source / name, file)
        except FileNotFoundError:
            return False
        except OSError:  # a file system without hard links, or with too many to this file
            shutil.copyfile(self._source / name, file)
            sync(file)
        return True

    def _complete(self, job: "_Job", files: dict[str, Facts]) -> None:
        """State and manifest, the sync of the folder, its name, and then the end of what is too old."""
        if self.rank != 0:
            return
        state = job.temporary / checkpoint.STATE
        _write_synced(state, job.state)
        files[state.name] = {"bytes": state.stat().st_size, "sha256": checkpoint.sha256(state)}
        facts = {"format_version": checkpoint.FORMAT_VERSION, **job.about, "files": dict(sorted(files.items()))}
        sync(job.temporary)
        _write_synced(job.temporary / checkpoint.MANIFEST, json.dumps(facts, indent=2) + "\n")
        sync(job.temporary)
        if job.folder.exists():  # of another run, or damaged: this run knows of none for this step
            checkpoint.set_aside(self.root, checkpoint.step_of(job.folder) - 1)
        os.replace(job.temporary, job.folder)
        sync(self.root)
        self._tidy()

    def _tidy(self) -> None:
        if self.rank == 0 and self.keep is not None:
            checkpoint.prune(self.root, self.keep)


class _Job:
    """One checkpoint that is being written."""

    def __init__(self, folder: Path, state: str, parts: checkpoint.Parts, about: dict[str, Any]) -> None:
        self.folder, self.state, self.parts, self.about = folder, state, parts, about
        self.temporary = folder.with_name(folder.name + checkpoint.UNFINISHED)
        self.segments: dict[str, tuple[dict[str, Tensor], Facts]] = {}


def _by_file(part: str, entries: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    files: dict[str, dict[str, Tensor]] = {}
    for entry, tensor in entries.items():
        file, name = checkpoint.file_of(part, entry)
        files.setdefault(file, {})[name] = tensor
    return files


def _is_segment(part: str, file: str) -> bool:
    return file != f"{part}.safetensors"


def _same_memory(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> bool:
    """Whether these are the same arrays; segments only grow at their end, so equal length means equal content.

    `before` is still held, so its memory cannot have become something else.
    """
    return before.keys() == now.keys() and all(
        before[name].data_ptr() == now[name].data_ptr() and before[name].shape == now[name].shape for name in now
    )


def _write_synced(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    sync(file)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders, and keeps their names by itself
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
