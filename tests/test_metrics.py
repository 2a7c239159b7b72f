import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from llm_dqn.errors import UserError
from llm_dqn.metrics import MetricsLog, open_trackers


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_holds_means_since_the_last_line_and_facts_as_they_are(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for value in (1.0, torch.tensor(3.0, dtype=torch.bfloat16)):
        log.add("rollout/reward", value)
    log.add_rate("tokens_per_second", 100, 2.0)
    log.add_rate("tokens_per_second", 200, 1.0)
    first = log.log(10, {"scored_completions": 64, "rollout/epsilon": torch.tensor(0.5)})
    log.add("rollout/reward", 7.0)
    log.log(20)
    assert lines(tmp_path / "metrics.jsonl")[0] == first
    assert (first["rollout/reward"], first["tokens_per_second"], first["rollout/epsilon"]) == (2.0, 100.0, 0.5)
    assert list(first)[:3] == ["step", "scored_completions", "seconds"]
    assert lines(tmp_path / "metrics.jsonl")[1]["rollout/reward"] == 7.0


def test_a_tensor_is_not_read_before_the_line_is_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.add("train/td_loss", torch.ones((), device="meta"))  # reading a meta tensor raises
    with pytest.raises(RuntimeError):
        log.log(1)


def test_not_a_number_is_written_as_null_and_counted(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.add("train/td_loss", math.nan)
    log.log(1, {"train/kl": math.inf})
    log.log(2, {"train/kl": 0.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    first, second = lines(tmp_path / "metrics.jsonl")
    assert first["train/td_loss"] is None and first["train/kl"] is None
    assert first["nonfinite_values"] == second["nonfinite_values"] == 2


def test_resuming_drops_later_lines_and_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (10, 20, 30):
        log.log(step)
    with path.open("a") as stream:
        stream.write('{"step": 4')  # the process was killed here
    MetricsLog(path).truncate_to(20)
    assert [line["step"] for line in lines(path)] == [10, 20]


def test_open_means_survive_a_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "a.jsonl")
    log.add("train/td_loss", torch.tensor(1.0))
    log.add_rate("tokens_per_second", 10, 1.0)
    state = json.loads(json.dumps(log.state()))
    resumed = MetricsLog(tmp_path / "b.jsonl")
    resumed.load_state(state)
    for each in (log, resumed):
        each.add("train/td_loss", torch.tensor(4.0))
    one, other = log.log(7), resumed.log(7)
    assert one["train/td_loss"] == other["train/td_loss"] == 2.5
    assert one["tokens_per_second"] == other["tokens_per_second"]
    assert other["seconds"] >= state["seconds"] - 1e-3


@pytest.mark.parametrize(("name", "cure"), [("tensorbord", "known are none"), ("comet_ml", "pip install 'comet_ml'")])
def test_a_tracker_that_is_not_there_says_what_to_install(name: str, cure: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=cure):
        open_trackers(Accelerator(cpu=True), [name], "run", tmp_path)


def test_a_missing_tracker_with_an_extra_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_dqn.metrics.get_available_trackers", lambda: [])
    with pytest.raises(UserError, match=r"pip install 'llm-dqn\[wandb\]'"):
        open_trackers(Accelerator(cpu=True), ["wandb"], "run", tmp_path)
