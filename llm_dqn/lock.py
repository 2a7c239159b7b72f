"""One run at a time in a folder, by a lock of the operating system that dies with its owner.

The lock is `flock` on a file in the folder, not the file's being there: what a killed process leaves behind never
blocks anyone. Linux passes such locks on to an NFS server, so they hold between machines where the mount does
(`local_lock=none`, the default); on file systems without locks a warning says so. Windows locks a byte instead.
"""

import errno
import json
import logging
import os
import socket
import sys
import time
from datetime import datetime
from pathlib import Path

from llm_dqn.errors import RunError, UserError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

logger = logging.getLogger(__name__)

NAME = "run.lock"
LOOKS, PAUSE = 5, 0.1  # how often, and how many seconds apart, a held lock is tried again
_BUSY = {errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK}
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class RunLock:
    """Held by the main process of a run for as long as it writes into `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Makes the folder and takes its lock. Raises UserError naming the owner when another run holds it."""
        if self._descriptor is not None:
            return
        file = self.folder / NAME
        for patience in range(LOOKS, -1, -1):
            descriptor = _open(file)
            free = _lock(descriptor)
            if free and _is_still(file, descriptor):
                break
            os.close(descriptor)  # held, or its last owner moved or removed the file in the meantime
            if not patience:
                raise UserError(_in_use(self.folder))
            if not free:  # perhaps only by `refuse_if_running`
                time.sleep(PAUSE)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": _now()}
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(owner).encode())
        self._descriptor = descriptor

    def move_folder(self, aside: Path) -> None:
        """Renames the folder while nobody else can be in it, and takes the lock of a fresh one."""
        if sys.platform == "win32":  # which renames no folder with an open file
            self.release()
        os.replace(self.folder, aside)
        (aside / NAME).unlink(missing_ok=True)
        self.release()
        self.acquire()

    def release(self) -> None:
        """Gives the lock back; does nothing when it is not held."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        file = self.folder / NAME
        if sys.platform != "win32" and _is_still(file, descriptor):
            file.unlink()
        os.close(descriptor)


def refuse_if_running(folder: Path) -> None:
    """Raises UserError when a run holds the folder now: worth knowing before a large model is loaded."""
    file = folder / NAME
    if not file.is_file():
        return
    descriptor = _open(file)
    try:
        if not _lock(descriptor, shared=True):
            raise UserError(_in_use(folder))
    finally:
        os.close(descriptor)


def _open(file: Path) -> int:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunError(f"train.output_dir: cannot write into {file.parent}: {error.strerror}") from error


def _lock(descriptor: int, shared: bool = False) -> bool:
    """Takes the lock unless another one stands against it; returns whether that was possible."""
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # beyond the text, which others must be able to read
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        if error.errno not in _UNSUPPORTED:
            raise
        logger.warning("this file system knows no locks: nothing keeps a second run out of the folder")
    return True


def _is_still(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _in_use(folder: Path) -> str:
    cure = "wait for it, stop it, or choose another train.output_dir"
    try:
        owner = json.loads((folder / NAME).read_text(encoding="utf-8"))
        who = f"process {owner['pid']} on {owner['host']}, started {owner['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"  # which has not written its name yet
    return f"train.output_dir: {folder} is in use by a run that goes on ({who}); {cure}"


def _now() -> str:
    return datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
