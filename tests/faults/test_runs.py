"""Runs that are stopped, killed, changed, doubled, or started in strange surroundings."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_dqn import checkpoint, cli
from llm_dqn.errors import UserError
from llm_dqn.lock import NAME, RunLock
from llm_dqn.recipe import Recipe
from llm_dqn.recipe_changes import HARMLESS, NOTED, REFUSED, changes
from tests.faults.runs import FILES, QUIET, ROOT, SLOW, WEIGHTS, cut_at, equal_checkpoints, logged, start, wait_for
from tests.test_trainer import metrics, trainer

# --- 2: killed and resumed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"prioritized": True, "success_share": 0.0}, {"lr_scheduler_type": "linear", "warmup_steps": 2}],
    ids=["uniform", "prioritized", "schedule"],
)
def test_case_02_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tiny_llama_path, tmp_path, options):
    """Losses, weights, replay, priorities, metrics and samples are the same, also between log lines and collections."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trainer(tiny_llama_path, whole, max_steps=9, **options).train()
    cut_at(trainer(tiny_llama_path, cut, max_steps=9, **options), 5)
    assert [path.name for path in (cut / "checkpoints").iterdir()] == ["step-000003"]
    trainer(tiny_llama_path, cut, max_steps=9, **options).train(resume=True)
    assert logged(cut) == logged(whole)
    for name in FILES:
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    assert equal_checkpoints(cut / "checkpoints" / "step-000009", whole / "checkpoints" / "step-000009")


def test_case_02_dropout_is_drawn_again_alike(tiny_llama_path, tmp_path):
    """LoRA's dropout comes from the step's own stream, whatever else drew random numbers before."""
    from tests.networks import lora

    results = []
    for noise in (0, 7):
        run = trainer(tiny_llama_path, tmp_path / str(noise), peft_config=lora(lora_dropout=0.3), **QUIET, max_steps=2)
        run.begin(resume=False)
        run.collect()
        torch.rand(noise)
        run.learn_from([run.sample()])
        run.logbook.close()
        results.append([parameter.detach().clone() for parameter in run.parts.trainable])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


# --- 3, 43, 44: one real process, in strange surroundings, asked to stop, with a rival ------------------------------


class Story:
    """What happened to a run that was not the only one, in a place without home, locale and network."""

    rival: list[int]
    rival_said: str
    moved: list[Path]
    exit_code: int
    printed: str
    folder: Path


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    home = tmp_path_factory.mktemp("story")
    (home / "judge.py").write_text(SLOW)
    told, told.folder = Story(), home / "run"
    settings = [f"train.output_dir={told.folder}", f"reward.funcs=[{home}/judge.py:slow]"]
    settings += ["train.max_steps=100000", "train.logging_steps=4", "train.eval_steps=0", "train.save_steps=0"]
    strange = {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "HOME": "/proc/nowhere",
        "TZ": "Asia/Kabul",
    }
    process = start("llm_dqn", "train", "hello_world", *settings, **strange)
    try:
        wait_for((told.folder / "metrics.jsonl").exists, process)
        told.rival, said = [], io.StringIO()
        for more in ([], ["--resume"]):
            with pytest.raises(SystemExit) as left, contextlib.redirect_stderr(said):
                cli.main(["train", "hello_world", *settings, *more])
            told.rival.append(int(left.value.code or 0))
        told.rival_said, told.moved = said.getvalue(), list(home.glob("run.earlier*"))
        process.send_signal(signal.SIGTERM)
        told.printed, _ = process.communicate(timeout=60)
        told.exit_code = process.returncode
    finally:
        process.kill()
    return told


def test_case_03_sigterm_finishes_the_step_saves_and_exits_143(story):
    """In the middle of a slow reward: the step is finished, everything is saved, and the command says how to go on."""
    assert story.exit_code == 143
    saved, damaged = checkpoint.newest(story.folder / "checkpoints")
    assert saved is not None and not damaged
    assert f"stopped and saved after step {checkpoint.step_of(saved)}" in story.printed


SHORT = {"max_steps": 5, "eval_steps": 2, "save_steps": 2, "final_eval_prompts": 2}


@pytest.fixture(scope="module")
def undisturbed(tiny_llama_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `SHORT` leaves when nobody interrupts it."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    trainer(tiny_llama_path, folder, **SHORT).train()
    return folder


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "code", "where"),
    [
        (signal.SIGINT, 130, "rollout"),
        (signal.SIGTERM, 143, "score"),
        (signal.SIGINT, 130, "examiner.judge"),
        (signal.SIGTERM, 143, "save_checkpoint"),
    ],
)
@pytest.mark.usefixtures("handlers")
def test_case_03_wherever_the_signal_comes_the_run_is_saved_whole(
    undisturbed, tiny_llama_path, tmp_path, number, code, where
):
    """During rollout, reward, evaluation and a checkpoint written beside the training; resuming goes on exactly."""
    run = trainer(tiny_llama_path, tmp_path / "run", **SHORT)
    *inside, name = where.split(".")
    holder = getattr(run, inside[0]) if inside else run
    asked, original = [], getattr(holder, name)

    def signalled(*arguments: Any, **named: Any) -> Any:
        if run.step >= 2 and not asked:
            asked.append(os.kill(os.getpid(), number))
        return original(*arguments, **named)

    setattr(holder, name, signalled)
    with pytest.raises(SystemExit) as left:
        run.train()
    assert left.value.code == code
    newest, damaged = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None and checkpoint.step_of(newest) == run.step and not damaged
    trainer(tiny_llama_path, tmp_path / "run", **SHORT).train(resume=True)
    for name in ("samples.jsonl", *WEIGHTS):
        assert (tmp_path / "run" / name).read_bytes() == (undisturbed / name).read_bytes(), name


@pytest.mark.usefixtures("handlers")
def test_case_03_a_second_signal_exits_at_once(tiny_llama_path, tmp_path):
    """Out of a reward that would never end, and although `on_error: skip` guards the run against rewards that exit."""

    def endless(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        return [0.0] * len(completions)

    run = trainer(tiny_llama_path, tmp_path, endless, on_error="skip", **QUIET)
    started = time.monotonic()
    with pytest.raises(SystemExit) as left:
        run.train()
    assert left.value.code == 143 and time.monotonic() - started < 20
    RunLock(tmp_path).acquire()


def test_case_43_a_strange_locale_clock_home_and_no_network_change_nothing(story):
    """LC_ALL=C, a HOME that cannot be written, no Hub: Chinese text is kept in files and spelled in the terminal."""
    samples = [json.loads(line) for line in (story.folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert any("好" in sample["prompt"] + sample["completion"] for sample in samples)
    assert "training data/hello_lm" in story.printed and "Traceback" not in story.printed


def test_case_43_a_clock_that_goes_backwards_is_not_used(tiny_llama_path, tmp_path, monkeypatch):
    """Seconds and speeds stay positive: they come from the monotonic clock."""
    times = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(times)))
    trainer(tiny_llama_path, tmp_path, max_steps=4, **QUIET).train()
    lines = metrics(tmp_path)
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    assert lines[0]["seconds"] > 0 and all(line["tokens_per_second"] > 0 for line in lines)


def test_case_44_a_second_run_in_the_folder_is_refused(story):
    """A new run and `--resume` both leave with 2 and name the owner; the folder of the run that goes on stays there."""
    assert story.rival == [2, 2] and not story.moved
    assert story.rival_said.count("is in use by a run that goes on (process ") == 2
    assert not (story.folder / NAME).exists()  # the run that was stopped took its lock away


def test_case_44_the_lock_dies_with_its_owner(tmp_path):
    """A killed process leaves its file behind, and the next run is not in its way."""
    code = "import sys,time; from pathlib import Path; from llm_dqn.lock import RunLock\n"
    code += "lock = RunLock(Path(sys.argv[1])); lock.acquire(); print('held', flush=True); time.sleep(60)"
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert owner.stdout is not None and owner.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by a run that goes on .process {owner.pid} on .*, started 2"):
        RunLock(tmp_path).acquire()
    owner.kill()
    owner.wait()
    assert (tmp_path / NAME).is_file()
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.move_folder(tmp_path.with_name("aside"))  # and holds a fresh folder afterwards
    assert (tmp_path / NAME).is_file() and not (tmp_path.with_name("aside") / NAME).exists()
    lock.release()
    assert not (tmp_path / NAME).exists()


# --- 8: another recipe ------------------------------------------------------------------------------------------------


def keys_of(section: Any, path: str = "") -> Iterator[str]:
    for name, info in section.model_fields.items():
        inner = [
            part
            for part in (info.annotation, *getattr(info.annotation, "__args__", ()))
            if hasattr(part, "model_fields")
        ]
        yield from keys_of(inner[0], f"{path}{name}.") if inner else [f"{path}{name}"]


def test_case_08_every_setting_says_what_its_change_means():
    """No key of the recipe is unclassified or stands in two sets, and no set names a key that is none."""
    assert sorted([*HARMLESS, *NOTED, *REFUSED]) == sorted(keys_of(Recipe))


def test_case_08_harmless_changes_go_through_and_others_are_refused_by_name(tiny_llama_path, tmp_path, capsys):
    """The difference is printed key by key; unsafe keys need --allow-change; what is refused has changed nothing."""
    trainer(tiny_llama_path, tmp_path, max_steps=2, **QUIET).train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = {"gamma": 0.9, "learning_rate": 1e-3, "logging_steps": 1, "max_steps": 3}
    with pytest.raises(UserError) as refused:
        trainer(tiny_llama_path, tmp_path, **(QUIET | other)).train(resume=True)
    assert "  dqn.gamma: 1.0 -> 0.9\n" in str(refused.value) and "--allow-change dqn.gamma" in str(refused.value)
    assert "learning_rate" not in str(refused.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(UserError, match=r"--allow-change dqn.gama: no setting.*did you mean dqn.gamma"):
        trainer(tiny_llama_path, tmp_path, **(QUIET | other)).train(resume=True, allow_changes=["dqn.gama"])
    capsys.readouterr()
    run = trainer(tiny_llama_path, tmp_path, **(QUIET | other))
    run.train(resume=True, allow_changes=["dqn.gamma"])
    said = capsys.readouterr().out
    assert "changed: train.logging_steps: 2 -> 1\n" in said and "changed: train.max_steps: 2 -> 3\n" in said
    assert "changed: train.learning_rate: 0.01 -> 0.001; from here on" in said
    assert "changed: dqn.gamma: 1.0 -> 0.9; allowed by you" in said
    assert run.parts.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_case_08_an_allowed_change_that_does_not_fit_ends_in_a_sentence(tiny_llama_path, tmp_path):
    """Another rank of the adapter, insisted on: the checkpoint's weights have no place."""
    from tests.networks import lora

    trainer(tiny_llama_path, tmp_path, max_steps=1, **QUIET).train()
    wider = trainer(tiny_llama_path, tmp_path, peft_config=lora(r=8), max_steps=2, **QUIET)
    with pytest.raises(UserError, match="the checkpoint does not fit the model, adapter or Q-head"):
        wider.train(resume=True, allow_changes=["lora"])


def test_case_08_the_course_of_the_learning_rate_ties_max_steps():
    """More steps are harmless under a constant rate; a rate that falls to 0 at the end would have fallen elsewhere."""
    old = {"train.max_steps": 5, "train.lr_scheduler_type": "constant"}
    assert changes(old, old | {"train.max_steps": 9}) == ["train.max_steps: 5 -> 9"]
    old["train.lr_scheduler_type"] = "linear"
    assert "from here on" in changes(old, old | {"train.max_steps": 9})[0]
