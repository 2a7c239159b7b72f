"""Small runs' checkpoints without a model: what the trainer would hand over, and what it would find."""

import shutil
from pathlib import Path

import torch

from llm_dqn import checkpoint
from llm_dqn.replay import PrefixReplay
from llm_dqn.saver import Saver
from tests.networks import episode

SEGMENT = 4  # episodes


class SmallRun:
    """A replay and some weights that change from step to step, saved by a `Saver`."""

    def __init__(self, root: Path, capacity: int = 100, **options) -> None:
        self.root = root
        self.saver = Saver(root, **options)
        self.replay = PrefixReplay(capacity, segment_size=SEGMENT, vocabulary=b"v" * 32)
        self.weights = torch.zeros(8)

    def collect(self, episodes: int) -> None:
        for _ in range(episodes):
            number = self.replay.added
            self.replay.add([episode([1, 2], [number % 50, 3, 4], reward=float(number))])

    def parts(self) -> checkpoint.Parts:
        return {
            "network": {"weights": self.weights.clone()},
            "optimizer": {"0.step": torch.tensor(1.0)},
            "replay-00000": checkpoint.as_tensors(self.replay.snapshot()),
        }

    def save(self, step: int, beside: bool = False, **evaluation: float) -> Path:
        self.weights += 1
        about = {"evaluation": {f"eval/{name}": value for name, value in evaluation.items()}}
        self.saver.save(step, {"step": step}, self.parts(), about, beside)
        return checkpoint.checkpoint_folder(self.root, step)

    def goes_on_from(self, folder: Path, repair: bool = False) -> dict:
        """What a new process does that resumes; returns the state."""
        state, parts = checkpoint.read(folder, repair)
        self.saver = Saver(self.root, self.saver.keep)
        self.saver.resumed(folder, parts)
        self.replay = PrefixReplay(self.replay.capacity, segment_size=SEGMENT, vocabulary=b"v" * 32)
        checkpoint.restore_replay(self.replay, parts, rank=0, world=1)
        self.weights = parts["network"]["weights"]
        return state


def names(root: Path) -> list[str]:
    """The checkpoints there are, oldest first."""
    return [folder.name for folder in reversed(checkpoint.folders(root))]


def files(folder: Path) -> dict[str, bytes]:
    """All bytes of a checkpoint."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def flip_a_bit(file: Path, at: int = -1) -> None:
    """Damages a file without touching its size; a hard link to it elsewhere stays as it is."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    copy = file.with_name(file.name + ".copy")
    copy.write_bytes(bytes(data))
    shutil.move(copy, file)
