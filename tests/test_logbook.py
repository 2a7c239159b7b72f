"""The run folder's numbers are means over tokens, and trackers are closed however a run ends."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from llm_dqn.logbook import Logbook
from llm_dqn.types import QOutput, TDTarget


@pytest.fixture
def logbook(tmp_path: Path) -> Logbook:
    return Logbook(tmp_path, Accelerator(cpu=True), "base", "train: {}")


def outputs(taken: list[list[float]], returns: list[list[float]]) -> tuple[QOutput, TDTarget]:
    q, target = torch.tensor(taken), torch.tensor(returns)
    zeros = torch.zeros_like(q)
    return QOutput(q, zeros, zeros, zeros), TDTarget(target, -target, zeros, zeros)


def test_every_token_counts_the_same_in_whichever_batch_it_sits(logbook: Logbook) -> None:
    """Two batches of a learner step with one and three tokens; masked places hold what must not be counted."""
    logbook.updated(*outputs([[1.0, 99.0]], [[3.0, 55.0]]), torch.tensor([[True, False]]))
    logbook.updated(
        *outputs([[2.0, 2.0], [5.0, 77.0]], [[2.0, 3.0], [2.0, 1.0]]), torch.tensor([[1, 1], [1, 0]]).bool()
    )
    logbook.write(1, 8, {})
    line = json.loads((logbook.folder / "metrics.jsonl").read_text())
    assert line["train/td_loss"] == pytest.approx((4 + 0 + 1 + 9) / 4)
    assert line["train/q_taken"] == pytest.approx((1 + 2 + 2 + 5) / 4)
    assert line["train/td_target"] == pytest.approx((3 + 2 + 3 + 2) / 4)
    assert line["train/advantage"] == pytest.approx((3 + 2 + 3 + 2) / 4)


class FakeTracker:
    finished = 0

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize("ending", [None, SystemExit(143), ZeroDivisionError()])
def test_trackers_are_closed_however_a_run_ends(logbook: Logbook, ending: BaseException | None) -> None:
    tracker = FakeTracker()
    logbook.accelerator.trackers = [tracker]
    try:
        with logbook.panel(10):
            assert tracker.finished == 0
            if ending is not None:
                raise ending
    except (SystemExit, ZeroDivisionError) as error:
        assert error is ending
    assert tracker.finished == 1 and logbook.accelerator.trackers == []
