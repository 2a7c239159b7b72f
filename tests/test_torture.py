"""Ten `kill -9` of the two hundred that `make torture` does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.torture import differences, outcome

ROOT = Path(__file__).parent.parent


def test_ten_kills_leave_no_trace(tmp_path):
    result, runs = tmp_path / "torture.json", tmp_path / "runs"
    ran = subprocess.run(
        [sys.executable, "-m", "tests.torture", "--kills", "10", "--folder", runs, "--output", result],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    found = json.loads(result.read_text())
    assert found["kills"] >= 10 and found["equal"] == len(found["trials"]) > 0
    assert f"{found['equal']} of {found['equal']} ended equal" in ran.stdout
    _every_difference_is_seen(runs / "whole")


@pytest.mark.slow
def test_one_of_two_processes_killed_leaves_no_trace(tmp_path):
    """Two of the hundred: the other process ends, and both go on exactly."""
    result = tmp_path / "torture.json"
    ran = subprocess.run(
        [sys.executable, "-m", "tests.torture_processes", "--kills", "2", "--folder", tmp_path, "--output", result],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    found = json.loads(result.read_text())
    assert found["kills"] >= 2 and found["equal"] == len(found["trials"]) > 0


@pytest.mark.parametrize("faster", [True, False])
def test_a_kill_that_comes_too_late_says_so(faster):
    """A process that ends of itself just before the kill was not killed, and both of two are waited for once."""
    ran = subprocess.run(
        [sys.executable, "-c", LATE, "0" if faster else "60"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == (["0", "0"] if faster else ["-9", "-9"])


LATE = """
import os, sys, time
from pathlib import Path
from tests.torture import Watch, forked
from tests.torture_processes import Two

def watched(seconds):
    return Watch(*forked(lambda told: time.sleep(seconds), Path(os.devnull)))

seconds = float(sys.argv[1])
for watch in (watched(seconds), Two(watched(seconds), watched(0))):
    time.sleep(0.5)
    print(watch.kill())
"""


def _every_difference_is_seen(run: Path) -> None:
    """The comparison would notice: a bit of a weight, a priority, a line of metrics or samples that comes twice."""
    whole = outcome(run)
    (last,) = (run / "checkpoints").glob("step-000012")
    for file in (run / "adapter" / "adapter_model.safetensors", *last.glob("*.safetensors")):
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert len(differences(whole, outcome(run))) == 1, file.name
        file.write_bytes(data)
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = (run / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join([*lines, lines[-1]]))
        assert len(differences(whole, outcome(run))) == 1, name
        (run / name).write_text("".join(lines))
    assert differences(whole, outcome(run)) == []
