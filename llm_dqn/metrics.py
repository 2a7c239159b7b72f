"""Numbers of a run: averaged between log steps, one JSON object a line in `metrics.jsonl`, and on to any tracker.

Names say where a number comes from: `rollout/` what the behaviour policy wrote, `train/` what learning saw, `replay/`
what is remembered, `eval/` held-out prompts.
"""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import gather_object
from torch import Tensor

from llm_dqn.errors import UserError

EXTRAS = ("tensorboard", "wandb", "trackio")  # trackers with an extra of this package


class MetricsLog:
    """Averages values until `log`, which writes them as one line. All processes add and log; the main one writes.

    path: the JSON Lines file, appended to. accelerator: sums over processes and feeds trackers; None for one process
    without trackers.
    """

    def __init__(self, path: str | os.PathLike[str], accelerator: Accelerator | None = None) -> None:
        self.path = Path(path)
        self.accelerator = accelerator
        self.main = accelerator is None or accelerator.is_main_process
        self._means: dict[str, tuple[Tensor | float, Tensor | float]] = {}  # name -> (sum, how many)
        self._rates: dict[str, tuple[float, float]] = {}  # name -> (units, seconds)
        self._peaks: dict[str, Tensor | float] = {}  # name -> largest so far
        self._earlier_seconds = 0.0  # spent before the run was resumed
        self._started = time.monotonic()
        self._nonfinite = 0

    def add(self, name: str, value: Tensor | float, weight: Tensor | float = 1) -> None:
        """One more value of a mean, counting as much as `weight` values do.

        0-d tensors stay on their device, so that nothing waits for them before `log`.
        """
        if isinstance(value, Tensor):
            value = value.detach().float()
        total, count = self._means.get(name, (0.0, 0))
        self._means[name] = (total + value * weight, count + weight)

    def add_rate(self, name: str, units: float, seconds: float) -> None:
        """So many units in so many seconds; the line holds units a second, all processes together."""
        total, spent = self._rates.get(name, (0.0, 0.0))
        self._rates[name] = (total + units, spent + seconds)

    def add_peak(self, name: str, value: Tensor | float) -> None:
        """The line holds the largest of these values."""
        if isinstance(value, Tensor):
            value = value.detach().float()
        self._peaks[name] = torch.maximum(torch.as_tensor(value), torch.as_tensor(self._peaks.get(name, value)))

    @property
    def seconds(self) -> float:
        """Wall-clock time since the start, over all resumptions."""
        return self._earlier_seconds + time.monotonic() - self._started

    def log(self, step: int, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Writes a line with everything added since the last one, plus `facts` as they are; returns the line.

        NaN and infinity are no JSON: they become null, and `nonfinite_values` counts them from the start of the run.
        """
        values = self._merged() | {name: _number(value) for name, value in (facts or {}).items()}
        self._means, self._rates, self._peaks = {}, {}, {}
        bad = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
        self._nonfinite += len(bad)
        values |= dict.fromkeys(bad)
        if self._nonfinite:
            values["nonfinite_values"] = self._nonfinite
        first = {"step": step, "scored_completions": values.pop("scored_completions", None)}
        line = first | {"seconds": round(self.seconds, 3)} | values
        if self.main:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line, allow_nan=False) + "\n")
        if self.accelerator is not None:
            self.accelerator.log({k: v for k, v in line.items() if v is not None and k != "step"}, step=step)
        return line

    def _open(self) -> dict[str, dict[str, Any]]:
        """What this process added since the last line, as plain numbers."""
        return {
            "means": {name: (float(total), float(count)) for name, (total, count) in self._means.items()},
            "rates": dict(self._rates),
            "peaks": {name: float(value) for name, value in self._peaks.items()},
        }

    def _everyone(self) -> list[dict[str, dict[str, Any]]]:
        """The same of all processes, by rank."""
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            return gather_object([self._open()])
        return [self._open()]

    def _merged(self) -> dict[str, float]:
        """Means, rates and peaks over all processes."""
        everyone = self._everyone()
        joined = _joined(everyone)
        # processes work side by side: their seconds overlap
        return {
            **{name: total / count for name, (total, count) in joined["means"].items()},
            **{name: units / max(secs / len(everyone), 1e-9) for name, (units, secs) in joined["rates"].items()},
            **joined["peaks"],
        }

    def truncate_to(self, step: int) -> None:
        """Drops lines after `step`, so that a resumed run writes none twice.

        A torn last line, which a killed process leaves, is dropped as well.
        """
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def state(self) -> dict[str, Any]:
        """What the next line depends on, as plain JSON; all processes must ask together."""
        return {"open": self._everyone(), "seconds": self.seconds, "nonfinite": self._nonfinite}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The reverse of `state`. Where the number of processes is another, the main one has what all had."""
        parts = state["open"]
        rank, world = (
            (0, 1) if self.accelerator is None else (self.accelerator.process_index, self.accelerator.num_processes)
        )
        mine = parts[rank] if len(parts) == world else _joined(parts if self.main else [])
        self._means, self._rates = dict(mine["means"]), dict(mine["rates"])
        self._peaks = dict(mine["peaks"])
        self._earlier_seconds, self._started = state["seconds"], time.monotonic()
        self._nonfinite = state["nonfinite"]


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What several processes added, as if one had; a name need not occur on every process."""
    joined: dict[str, dict[str, Any]] = {"means": {}, "rates": {}, "peaks": {}}
    for part in parts:
        for kind in ("means", "rates"):
            for name, (first, second) in part[kind].items():
                so_far = joined[kind].get(name, (0.0, 0.0))
                joined[kind][name] = (so_far[0] + first, so_far[1] + second)
        for name, value in part["peaks"].items():
            joined["peaks"][name] = max(value, joined["peaks"].get(name, value))
    return joined


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


def open_trackers(
    accelerator: Accelerator, names: Sequence[str], run_name: str, folder: str | os.PathLike[str]
) -> None:
    """Starts Accelerate's trackers, which `MetricsLog.log` then feeds; local ones write below `folder`.

    Raises UserError for a tracker that nobody knows or that is not installed.
    """
    known = sorted(LOGGER_TYPE_TO_CLASS)
    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in known:
            raise UserError(f"train.report_to: no tracker is called {name!r}; known are none, {', '.join(known)}")
        if name not in available:
            what = f"llm-dqn[{name}]" if name in EXTRAS else name
            raise UserError(f"train.report_to: {name} is not installed; pip install '{what}', or set report_to: none")
    if names:
        accelerator.project_configuration.set_directories(str(folder))
        accelerator.log_with = list(names)
        accelerator.init_trackers(run_name)


def close_trackers(accelerator: Accelerator) -> None:
    """Lets every open tracker write what it still holds; nothing is logged to them afterwards."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers = []
