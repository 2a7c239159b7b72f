"""Kills a small run again and again with `kill -9`, resumes it, and asks that nothing can be told from the result.

    python -m tests.torture --kills 200          # a few seconds of one core for each kill

Each trial trains in a child process that is killed at a random moment: half of them at any time, half within a phase
that is drawn first, so that short ones (the reward, a save) are hit as often as long ones. One trial in four is killed
a second time while it resumes. Then it is resumed to its end, and must have left bit for bit what the run that was
never killed has left: adapter and head, metrics but for clocks, samples, evaluation, and the last checkpoint with
weights, optimizer, replay and priorities.

The parent imports everything once and forks, before a thread is started in it. Trials depend on the seed and their
number alone; with `--output` the same command goes on where it was ended, and begins anew once all is done.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

SETTINGS = {
    "replay.capacity": 72,  # the ring goes round
    "replay.storage": "disk",
    "replay.learning_starts": 16,
    "replay.updates_per_collect": 3,
    "replay.prioritized": "true",
    "replay.success_share": 0,
    "rollout.prompts_per_collect": 16,
    "train.max_steps": 12,
    "train.per_device_train_batch_size": 8,
    "train.logging_steps": 2,
    "train.eval_steps": 6,
    "train.eval_prompts": 2,
    "train.final_eval_prompts": 2,
    "train.save_steps": 2,
    "train.save_total_limit": 2,
}
SEGMENT = 16  # episodes: several are full within the run
PHASES = ("start", "rollout", "reward", "update", "save", "evaluation")
KILLED = -signal.SIGKILL  # the exit code
CLOCKS = {"seconds", "tokens_per_second", "train/idle_share", "reward/cached"}  # of the process, not of the run


# --- the child --------------------------------------------------------------------------------------------------------


def train(folder: Path, resume: bool, told: int) -> None:
    """The run itself; `+PHASE` and `-PHASE` are written to `told` when a phase begins and ends."""
    import torch

    from llm_dqn.recipe import load_recipe
    from llm_dqn.trainer import DQNTrainer

    torch.set_num_threads(1)

    def marked(holder: Any, name: str, phase: str) -> None:
        work = getattr(holder, name)

        def marking(*given: Any, **options: Any) -> Any:
            os.write(told, f"+{phase}\n".encode())
            try:
                return work(*given, **options)
            finally:
                os.write(told, f"-{phase}\n".encode())

        setattr(holder, name, marking)

    os.write(told, b"+start\n")
    overrides = [f"{key}={value}" for key, value in {**SETTINGS, "train.output_dir": folder}.items()]
    trainer = DQNTrainer.from_recipe(load_recipe("hello_world", overrides))
    trainer.replay.store.segment_size = SEGMENT
    places = ((trainer, "rollout", "rollout"), (trainer, "score", "reward"), (trainer, "update", "update"))
    for holder, name, phase in (
        *places,
        (trainer.logbook.saver, "_write", "save"),
        (trainer, "evaluate", "evaluation"),
    ):
        marked(holder, name, phase)
    begin = trainer.begin

    def begun(*given: Any) -> None:
        begin(*given)
        os.write(told, b"-start\n")

    trainer.begin = begun  # type: ignore[method-assign]
    trainer.train(resume=resume)


def forked(work: Callable[[int], None], log: Path) -> tuple[int, int]:
    """(process, reading end of what it tells) of a child in a process group of its own; its output goes to `log`."""
    tasks = len(os.listdir("/proc/self/task"))
    if tasks != 1:
        raise RuntimeError(f"{tasks} threads run in this process: a child would inherit their locks and not them")
    reading, telling = os.pipe()
    child = os.fork()
    if child:
        os.setpgid(child, child)  # here too: a kill may come before the child has done it
        os.close(telling)
        return child, reading
    code = 1
    try:
        os.setpgid(0, 0)
        os.close(reading)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        with open(1, "w", closefd=False) as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                work(telling)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
    finally:
        os._exit(code)


# --- the parent -------------------------------------------------------------------------------------------------------


class Watch:
    """Follows a child by what it tells."""

    def __init__(self, child: int, reading: int) -> None:
        self.child, self.reading = child, reading
        self.begun = time.monotonic()
        self.active: list[str] = []
        self.entered: Counter[str] = Counter()
        self.spent: Counter[str] = Counter()  # seconds
        self._since: dict[str, float] = {}
        self._rest = b""

    def follow(self, until: float, phase: str | None = None, occurrence: int = 0) -> bool:
        """Reads on until that moment, or until the phase is entered for that time; false when the child has ended."""
        while phase is None or self.entered[phase] < occurrence:
            left = until - time.monotonic()
            if left <= 0:
                break
            if select.select([self.reading], [], [], left)[0]:
                heard = os.read(self.reading, 4096)
                if not heard:
                    return False
                self._hear(heard)
        return True

    def _hear(self, heard: bytes) -> None:
        *lines, self._rest = (self._rest + heard).split(b"\n")
        for line in lines:
            sign, phase = chr(line[0]), line[1:].decode()
            if sign == "+":
                self.active.append(phase)
                self.entered[phase] += 1
                self._since[phase] = time.monotonic()
            else:
                self.active.remove(phase)
                self.spent[phase] += time.monotonic() - self._since[phase]

    def where(self) -> str:
        """The phase that the child is in; a save that goes on beside another phase counts as a save."""
        if "save" in self.active:
            return "save"
        return self.active[-1] if self.active else "between"

    def kill(self) -> int:
        """Ends the child at once; its exit code, which is another than that of a kill when it was faster."""
        os.killpg(self.child, signal.SIGKILL)
        while heard := os.read(self.reading, 4096):
            self._hear(heard)
        return self.ended()

    def ended(self) -> int:
        """Waits for the child; its exit code."""
        os.close(self.reading)
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])


class Torture:
    """Trials in `folder`, each compared with the run that was never killed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        folder.mkdir(parents=True, exist_ok=True)
        watch = self.start(folder / "whole", resume=False)
        watch.follow(until=time.monotonic() + 600)
        if watch.ended() != 0:
            raise RuntimeError((folder / "whole.log").read_text())
        self.seconds, self.entered, self.spent = time.monotonic() - watch.begun, watch.entered, watch.spent
        self.expected = outcome(folder / "whole")

    def start(self, run: Path, resume: bool) -> Watch:
        child, reading = forked(lambda told: train(run, resume, told), run.with_suffix(".log"))
        return Watch(child, reading)

    def trial(self, number: int) -> dict[str, Any]:
        """Kills once or twice, resumes to the end and compares; what is unequal stays in the folder."""
        rng, run = random.Random(f"{self.seed} {number}"), self.folder / f"trial-{number:04d}"
        shutil.rmtree(run, ignore_errors=True)
        fell: list[str] = []
        planned = 2 if rng.random() < 0.25 else 1
        while len(fell) < planned:
            place = self.kill_somewhere(run, rng, resume=bool(fell))
            if place is None:  # it was faster than the kill: again from nothing
                shutil.rmtree(run)
                fell = []
            else:
                fell.append(place)
        watch = self.start(run, resume=True)
        watch.follow(until=time.monotonic() + 600)
        code = watch.ended()
        different = [f"exit code {code}"] if code else differences(self.expected, outcome(run))
        if not different:
            for path in (run, *self.folder.glob(f"{run.name}.earlier-*")):
                shutil.rmtree(path)
            run.with_suffix(".log").unlink()
        return {"trial": number, "fell": fell, "different": different}

    def kill_somewhere(self, run: Path, rng: random.Random, resume: bool) -> str | None:
        """Where the kill fell; None when the run had ended before."""
        watch = self.start(run, resume)
        if rng.random() < 0.5:
            alive = watch.follow(until=watch.begun + rng.uniform(0, self.seconds))
        else:
            phase = rng.choice(PHASES)
            occurrence = rng.randint(1, self.entered[phase])
            alive = watch.follow(watch.begun + 600, phase, occurrence)
            delay = rng.uniform(0, self.spent[phase] / self.entered[phase])
            alive = alive and watch.follow(until=time.monotonic() + delay)
        code = watch.kill() if alive else watch.ended()
        if code == KILLED:
            return watch.where()
        if code:
            raise RuntimeError(f"trial failed with exit code {code}:\n{run.with_suffix('.log').read_text()}")
        return None


def outcome(run: Path) -> dict[str, Any]:
    """All that a run leaves behind but clocks: file (and line) -> content."""
    left: dict[str, Any] = {}
    for name in (
        "adapter/adapter_model.safetensors",
        "adapter/q_head.safetensors",
        "samples.jsonl",
        "evaluation.json",
        "evaluation_samples.jsonl",
    ):
        left[name] = (run / name).read_bytes()
    for number, line in enumerate((run / "metrics.jsonl").read_text().splitlines()):
        left[f"metrics.jsonl:{number + 1}"] = {k: v for k, v in json.loads(line).items() if k not in CLOCKS}
    (last,) = (run / "checkpoints").glob(f"step-{SETTINGS['train.max_steps']:06d}")
    left["checkpoints"] = sorted(path.name for path in (run / "checkpoints").iterdir())
    for file in last.iterdir():
        if file.suffix == ".safetensors":
            left[file.name] = file.read_bytes()
    state = json.loads((last / "state.json").read_text())
    state["logbook"]["metrics"] = None  # it stands in the lines above; the rest of it are clocks
    state["recipe"].pop("train.output_dir")
    return {**left, "state.json": state}


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of what is not the same."""
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def import_what_a_run_needs(folder: Path) -> None:
    """Has a child say which modules it imported, and imports them here, so that later children find them."""

    def work(told: int) -> None:
        train(folder / "first", False, os.open(os.devnull, os.O_WRONLY))
        os.write(told, "\n".join(sys.modules).encode())

    child, reading = forked(work, folder / "first.log")
    with open(reading, "rb") as heard:
        names = heard.read().decode().split("\n")
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        raise RuntimeError((folder / "first.log").read_text())
    for name in names:
        if name.partition(".")[0] in (
            "torch",
            "transformers",
            "peft",
            "accelerate",
            "datasets",
            "llm_dqn",
            "safetensors",
        ):
            with contextlib.suppress(ImportError):  # made at run time, not a file
                importlib.import_module(name)
    shutil.rmtree(folder / "first")


def table(trials: list[dict[str, Any]]) -> str:
    """Where the kills fell."""
    fell = Counter(place for trial in trials for place in trial["fell"])
    equal = sum(not trial["different"] for trial in trials)
    rows = "".join(f"{place:<12}{fell[place]:>5}\n" for place in (*PHASES, "between"))
    return f"{sum(fell.values())} kills in {len(trials)} trials fell into\n{rows}{equal} of {len(trials)} ended equal"


def main(kind: type[Torture] = Torture, command: str = "python -m tests.torture") -> None:
    """Exits with 1 when a single trial did not end equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where runs are made, and stay when they are unequal")
    parser.add_argument("--output", type=Path, help="JSON of all trials; goes on from there while it is unfinished")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="torture-"))
    folder.mkdir(parents=True, exist_ok=True)
    trials: list[dict[str, Any]] = []
    if args.output and args.output.exists():
        before = json.loads(args.output.read_text())
        unfinished = before["seed"] == args.seed and before["kills"] < args.kills
        trials = before["trials"] if unfinished else []
    import_what_a_run_needs(folder)
    torture, started = kind(folder, args.seed), time.monotonic()
    while sum(len(trial["fell"]) for trial in trials) < args.kills:
        trials.append(torture.trial(len(trials)))
        if trials[-1]["different"] or len(trials) % 20 == 0:
            print(f"{time.monotonic() - started:.0f} s: {trials[-1]}", flush=True)
        if args.output:
            args.output.write_text(json.dumps(summary(command, args.seed, trials), indent=1) + "\n")
    print(table(trials))
    if any(trial["different"] for trial in trials):
        sys.exit(f"what is unequal lies in {folder}")
    if args.folder is None:
        shutil.rmtree(folder)


def summary(command: str, seed: int, trials: list[dict[str, Any]]) -> dict[str, Any]:
    """What the result file holds."""
    fell = Counter(place for trial in trials for place in trial["fell"])
    return {
        "command": command,
        "seed": seed,
        "kills": sum(fell.values()),
        "trials": trials,
        "equal": sum(not trial["different"] for trial in trials),
        "fell": dict(sorted(fell.items())),
        "settings": SETTINGS,
    }


if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    assert threading.active_count() == 1
    main()
