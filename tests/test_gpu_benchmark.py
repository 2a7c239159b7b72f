"""The benchmark for GPUs: it refuses without one, and its parts work on whatever device they are given."""

import sys

import pytest
import torch

from benchmarks import gpu


def test_without_a_gpu_it_says_so_before_any_work(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2 and "no CUDA device" in capsys.readouterr().err


def test_every_part_gives_figures_for_both_precisions():
    """A vocabulary of 600 on one layer; on a GPU where there is one."""
    sizes = gpu.Sizes(layers=1, tokens=600, episodes=2, prompt=3, completion=3, rows=2, repeats=1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured = gpu.measure(sizes, device, ["linear", "cross entropy", "naive DQN", "ILQL"])
    assert set(measured) == set(gpu.PRECISIONS)
    for one in measured.values():
        assert all(found["seconds"] > 0 for found in one["updates"].values())
        assert all(rate > 0 for rate in one["tokens_per_second"].values())
    facts = {"command": "python -m benchmarks.gpu", "card": "none", "minutes": 0, "machine": {"torch": "2"}}
    page = gpu.table({**facts, "sizes": vars(sizes), "measured": measured})
    assert page.count("\n| linear |") == 1 and "plain generate" in page
