"""What a run leaves behind: its folder, its lines of metrics, its samples, its adapter, and what people see of it."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm_dqn import __version__, card, checkpoint, pages
from llm_dqn.console import Console
from llm_dqn.errors import RunError, UserError
from llm_dqn.evaluation import side_by_side
from llm_dqn.lock import RunLock
from llm_dqn.metrics import MetricsLog, close_trackers, open_trackers
from llm_dqn.network import QNetwork
from llm_dqn.report import write_report
from llm_dqn.rollout import Writer
from llm_dqn.run_files import EVALUATION_SAMPLES
from llm_dqn.saver import Saver
from llm_dqn.scoring import describe_tokens
from llm_dqn.types import Episode, QOutput, TDTarget

SAMPLES_A_COLLECT = 4
Found = tuple[dict[str, Any], dict[str, dict[str, Tensor]]]


class Logbook:
    """The run folder. Only the main process writes; the others pass through.

    base_name: the pretrained model's path or Hub id. recipe_text: what `recipe.yaml` will hold.
    trackers: names of Accelerate trackers beside `metrics.jsonl`.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        base_name: str,
        recipe_text: str,
        trackers: Sequence[str] = (),
        run_name: str | None = None,
        keep_checkpoints: int | None = 3,
    ) -> None:
        self.folder, self.accelerator = folder, accelerator
        self.base_name, self.recipe_text = base_name, recipe_text
        self.trackers, self.run_name, self.keep_checkpoints = list(trackers), run_name, keep_checkpoints
        self.main = accelerator.is_main_process
        self.console = Console(enabled=self.main)
        self.metrics = MetricsLog(folder / "metrics.jsonl", accelerator)
        self.lock = RunLock(folder)
        gather = gather_object if accelerator.num_processes > 1 else list
        self.saver = Saver(
            folder / "checkpoints", keep_checkpoints, accelerator.process_index, lambda value: gather([value])
        )
        self.sampled = 0  # lines in samples.jsonl
        self._waited, self._since = 0.0, time.perf_counter()  # seconds, and when the step began
        self.evaluated: dict[str, float] = {}  # what the last evaluation said, by name in `checkpoint.MEASURES`

    # --- opening ----------------------------------------------------------------------------------------------------

    def claim(self) -> None:
        """Keeps other runs out of the folder; UserError naming the run that is in it."""
        if self.main:
            self.lock.acquire()

    def open(self, resume: bool | str, accept: Callable[[dict[str, Any]], None], repair: bool = False) -> Found | None:
        """Prepares the folder; with `resume`, what a checkpoint holds: the newest complete one, or the one it names.

        None when there is none. accept: sees the state in the checkpoint before anything is written, and raises when
        the run cannot go on from it. repair: goes on without damaged segments of the replay. Raises RunError when
        checkpoints are damaged and none is complete.
        """
        folder = self._checkpoint(resume, repair) if resume else None
        found = None if folder is None else self._read(folder, repair)
        if found is not None:
            accept(found[0])
        self.accelerator.wait_for_everyone()
        if self.main:
            if folder is None:
                self._move_earlier_run_aside()
            else:
                for moved in checkpoint.set_aside(folder.parent, checkpoint.step_of(folder)):
                    self.console.say(f"a later checkpoint, which this run will write anew, is now {moved}")
            (self.folder / "recipe.yaml").write_text(_versions() + self.recipe_text, encoding="utf-8")
        self.accelerator.wait_for_everyone()
        open_trackers(self.accelerator, self.trackers, self.run_name or self.folder.name, self.folder)
        return found

    def _checkpoint(self, resume: bool | str, repair: bool) -> Path | None:
        """The folder to go on from."""
        root = self.folder / "checkpoints"
        for leftover in checkpoint.unfinished(root):
            self.console.say(f"{leftover.name} was not finished when its run ended: ignored")
        if isinstance(resume, str):
            named = root / Path(resume).name
            if named not in checkpoint.folders(root) or Path(resume).parent.resolve() not in (
                Path.cwd(),
                root.resolve(),
            ):
                there = ", ".join(folder.name for folder in checkpoint.folders(root)) or "none"
                raise UserError(f"--checkpoint {resume}: not among the checkpoints in {root}: {there}")
            return named
        newest, damaged = checkpoint.newest(root, repair)
        for line in damaged:
            self.console.say(f"skipping a damaged checkpoint: {line}")
        if newest is None and damaged:
            raise RunError(
                f"no checkpoint in {root} is whole: {'; '.join(damaged)}; without --resume the run begins anew, and "
                "what is here is moved aside"
            )
        if newest is None:
            self.console.say(f"no complete checkpoint in {root}: starting from the beginning")
        return newest

    def _read(self, folder: Path, repair: bool) -> Found:
        damaged = checkpoint.problems(folder) if repair else {}
        found = checkpoint.read(folder, repair)
        self.saver.resumed(folder, found[1])
        if damaged:
            self.console.say(f"--replay-repair: {checkpoint.in_words(damaged)}; its episodes are dropped")
        self.console.say(f"continuing from {folder}")
        return found

    def _move_earlier_run_aside(self) -> None:
        """A new run never overwrites an earlier one."""
        if not any((self.folder / name).exists() for name in ("recipe.yaml", "metrics.jsonl", "checkpoints")):
            return
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}.earlier-{number}")).exists():
            number += 1
        self.lock.move_folder(aside)
        self.console.say(f"{self.folder} held an earlier run: moved to {aside}")

    def close(self) -> None:
        """Lets other runs into the folder."""
        self.lock.release()

    @contextmanager
    def panel(self, total_steps: int) -> Iterator[None]:
        """The live view while training. However that ends, trackers get what they have not written yet, and unless it
        was to end at once a checkpoint that is being written is finished.
        """
        self.say(f"training {self.base_name} for {total_steps} steps; everything is written to {self.folder}")
        self._since = time.perf_counter()
        try:
            with self.console.live(total_steps):
                yield
        except Exception:
            self.saver.wait()
            raise
        finally:
            close_trackers(self.accelerator)

    def say(self, message: str) -> None:
        """One line for people."""
        self.console.say(message)

    # --- while learning ---------------------------------------------------------------------------------------------

    def collected(
        self, episodes: Sequence[Episode], epsilon: float, seconds: float, step: int, here: bool = True
    ) -> None:
        """Notes what the behaviour policy wrote. seconds: that learning waited. here: written by this process."""
        self._waited += seconds
        if here:
            self.metrics.add_rate("tokens_per_second", sum(len(e.completion_ids) for e in episodes), seconds)
        for episode in episodes:
            self.metrics.add("rollout/reward", episode.reward)
            self.metrics.add("rollout/length", len(episode.completion_ids))
            for name, value in episode.rewards.items():
                if value is not None and len(episode.rewards) > 1:
                    self.metrics.add(f"rollout/reward/{name}", value)
        if self.main:
            with (self.folder / "samples.jsonl").open("a", encoding="utf-8") as stream:
                for episode in episodes[:SAMPLES_A_COLLECT]:
                    line = {
                        "step": step,
                        "prompt": episode.prompt,
                        "completion": episode.completion,
                        "reward": episode.reward,
                        "epsilon": epsilon,
                    }
                    stream.write(json.dumps(line, ensure_ascii=False) + "\n")
                    self.sampled += 1
        if episodes:
            self.console.sample(episodes[0].prompt, episodes[0].completion, episodes[0].reward)

    @torch.no_grad()
    def updated(self, q: QOutput, target: TDTarget, mask: Tensor) -> None:
        """Notes what an update saw, token by token. Stays on the device: nothing waits for these numbers."""
        facts = {
            "train/td_loss": (q.taken - target.returns).square(),
            "train/q_taken": q.taken,
            "train/td_target": target.returns,
            "train/advantage": target.advantages.abs(),
        }
        tokens = mask.sum()
        for name, values in facts.items():
            self.metrics.add(name, (values * mask).sum() / tokens.clamp(min=1), weight=tokens)
        self.metrics.add_peak("train/q_max", (q.taken * mask).abs().max())

    def add(self, name: str, value: Tensor | float) -> None:
        """One more value of a metric, averaged until the next line."""
        self.metrics.add(name, value)
        if name in checkpoint.MEASURES and math.isfinite(value):
            self.evaluated[name] = float(value)

    def progressed(self, step: int) -> None:
        """Moves the bar, and raises what went wrong with a checkpoint written beside; costs nothing."""
        now = time.perf_counter()
        spent, waited = max(now - self._since, 1e-9), self._waited
        self.metrics.add("train/idle_share", waited / spent, weight=spent)
        self._since, self._waited = now, 0.0
        self.saver.look()
        self.console.progress(step)

    def write(self, step: int, scored_completions: int, facts: dict[str, Any]) -> dict[str, Any]:
        """One line of metrics, to the file, the trackers and the screen; returns it."""
        line = self.metrics.log(step, {"scored_completions": scored_completions, **facts})
        self.console.update(line)
        return line

    # --- keeping ----------------------------------------------------------------------------------------------------

    def checkpoint(
        self, step: int, state: dict[str, Any], parts: dict[str, dict[str, Tensor]], beside: bool = False
    ) -> None:
        """Writes a whole checkpoint or none. Each process adds its replay; the main one the rest.

        beside: where one process runs alone, training goes on while a thread writes. A replay never changes what it
        gave; of everything else a copy is made here.
        """
        alone = self.accelerator.num_processes == 1
        settled = {
            name: entries if name.startswith("replay-") else {k: _copied(value) for k, value in entries.items()}
            for name, entries in parts.items()
        }
        recipe = hashlib.sha256(self.recipe_text.encode()).hexdigest()
        about = {"step": step, "recipe_sha256": recipe, "evaluation": dict(self.evaluated)}
        self.saver.save(step, state, settled, about, beside=beside and alone)

    def last_checkpoint(self) -> str:
        """Which checkpoint a run would go on from, in words."""
        newest, _ = checkpoint.newest(self.folder / "checkpoints")
        return "no checkpoint was written yet" if newest is None else f"the last good checkpoint is {newest}"

    def state(self) -> dict[str, Any]:
        """Where the files stand."""
        return {"sampled": self.sampled, "metrics": self.metrics.state(), "evaluated": self.evaluated}

    def load_state(self, state: dict[str, Any], step: int) -> None:
        """Cuts off what was written after the checkpoint, so that no line comes twice."""
        self.sampled = state["sampled"]
        self.evaluated = dict(state["evaluated"])
        self.metrics.load_state(state["metrics"])
        if self.main:
            self.metrics.truncate_to(step)
            _keep_lines(self.folder / "samples.jsonl", self.sampled)

    def save_policy(self, network: QNetwork, tokenizer: PreTrainedTokenizerBase, folder: Path | None = None) -> Path:
        """Writes the adapter (or the whole model when all weights were tuned) with tokenizer and card."""
        folder = folder or self.folder / ("adapter" if network.has_adapter else "model")
        if self.main:
            network.save_policy(folder)
            tokenizer.save_pretrained(str(folder))
            self._write_card(folder)
        self.accelerator.wait_for_everyone()
        return folder

    def _write_card(self, folder: Path) -> None:
        kind: card.Kind = "adapter" if (folder / "adapter_config.json").is_file() else "model"
        recipe = _versions() + self.recipe_text
        card.read_card(folder, self.folder, str(folder), self.base_name, kind, recipe).write(folder)

    def finished(self, report: dict[str, Any], pairs: Sequence[tuple[Episode, Episode]], writer: Writer) -> None:
        """Writes `evaluation.json`, its samples token by token and `report.html`, and shows before and after.

        writer: of the tuned policy, which says what each token of the (base, tuned) pairs was worth.
        """
        if not self.main:
            return
        (self.folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        for folder in (self.folder / "adapter", self.folder / "model"):
            if folder.is_dir():
                self._write_card(folder)
        pages.write(self.folder / EVALUATION_SAMPLES, _evaluation_samples(pairs, writer))
        write_report(self.folder)
        self.console.evaluation(report, side_by_side(pairs))
        self.console.where(self.folder)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _evaluation_samples(pairs: Sequence[tuple[Episode, Episode]], writer: Writer) -> str:
    """JSON Lines: each pair's completions as score lines with their `side`, base first."""
    sides = (("base", [base for base, _ in pairs]), ("tuned", [tuned for _, tuned in pairs]))
    described = [[{"side": side} | line for line in describe_tokens(writer, episodes)] for side, episodes in sides]
    in_pairs = (line for pair in zip(*described, strict=True) for line in pair)
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in in_pairs)


def _keep_lines(file: Path, count: int) -> None:
    if file.exists():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)[:count]
        file.write_text("".join(lines), encoding="utf-8")


def _versions() -> str:
    names = ("torch", "transformers", "peft", "accelerate", "datasets")
    return f"# llm-dqn {__version__}\n" + "".join(f"# {name} {version(name)}\n" for name in names)


def trackers(report_to: str | Sequence[str]) -> list[str]:
    """Names of the trackers asked for."""
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    return [name for name in names if name != "none"]
