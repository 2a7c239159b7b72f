"""What a checkpoint gives back."""

import shutil

import pytest

from llm_dqn import checkpoint
from llm_dqn.errors import RunError
from llm_dqn.replay import PrefixReplay


def test_the_replay_can_be_read_alone(trained_run):
    newest, _ = checkpoint.newest(trained_run / "checkpoints")
    (arrays,) = checkpoint.read_replay(newest)
    replay = PrefixReplay(10_000)
    replay.load_arrays(arrays)
    assert len(replay) == replay.added == len(arrays["rewards"]) > 0
    assert arrays["lengths"].sum() == len(arrays["tokens"])


def test_a_damaged_replay_is_not_read(trained_run, tmp_path):
    newest, _ = checkpoint.newest(trained_run / "checkpoints")
    copy = shutil.copytree(newest, tmp_path / newest.name)
    (copy / "network.safetensors").unlink()
    with pytest.raises(RunError, match=r"network.safetensors is missing"):
        checkpoint.read_replay(copy)
