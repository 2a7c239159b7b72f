"""FSDP2 by torch's own `fully_shard`, on two real CPU processes: what can be proven without GPUs."""

import json

import pytest

from llm_dqn.errors import UserError
from llm_dqn.sharding import decoder_layers
from tests.networks import network
from tests.test_processes import _run
from tests.test_trainer import metrics, trainer


def test_a_sharded_trunk_learns_what_a_whole_one_does(tiny_llama_path, tmp_path):
    """Loss, gradients, targets; the target synced without a message; a checkpoint of shares, there and back; and whole
    runs, which end as those of whole copies do, go on exactly, and save an adapter like any other.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.sharding_worker"]
    ran = _run(*launch, tiny_llama_path, str(tmp_path))
    assert ran.returncode == 0, ran.stderr[-4000:]
    for rank in (0, 1):
        notes = json.loads((tmp_path / f"notes-{rank}.json").read_text())
        assert notes["sharded"] and notes["share"] == pytest.approx(0.5, abs=0.02)
        assert notes["largest_gradient"] > 1e-3
        assert max(notes["loss"], notes["gradients"], notes["targets"], notes["norm"]) < 2e-6, notes
        assert notes["sync_messages"] == 0 and notes["synced"] < 1e-7
        assert notes["restored"] == 0
        runs = notes["runs"]  # of whole trainings
        assert runs["shares"] > 0 and runs["apart"] < 1e-5, runs
        assert runs["kept_steps"] == [3, 3] and runs["kept_apart"] < 1e-5, runs
        assert runs["own"][0] == runs["own"][1] > 0 and runs["own_alike"], runs
        assert runs["resumed"] == runs["saved"] == 0, runs
    lines = [metrics(tmp_path / name) for name in ("none", "fsdp2")]
    assert len(lines[0]) == len(lines[1]) == 4
    for one, other in zip(*lines, strict=True):
        for name in ("train/td_loss", "train/grad_norm", "train/kl"):
            assert one.get(name) == pytest.approx(other.get(name), rel=1e-5, abs=1e-7), name
    names = {path.suffix for path in (tmp_path / "sharded").rglob("*") if path.is_file()}
    assert names <= {".safetensors", ".json"}  # nothing is pickled


def test_shares_need_several_processes(tiny_llama_path, tmp_path):
    with pytest.raises(UserError, match=r"train\.sharding: fsdp2 needs several processes"):
        trainer(tiny_llama_path, tmp_path, sharding="fsdp2")


def test_whole_weights_are_not_sharded(tiny_llama_path):
    with pytest.raises(UserError, match=r"train\.sharding: fsdp2 needs LoRA"):
        decoder_layers(network(tiny_llama_path, lora=None))
