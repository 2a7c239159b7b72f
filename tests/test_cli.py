import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from llm_dqn import cli
from llm_dqn.errors import RunError, UserError
from llm_dqn.recipe import Recipe, load_recipe
from tests.networks import episode

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def signal_handlers_as_before() -> object:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(*arguments: str) -> int:
    """The exit code of a command, run in this process."""
    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    return int(left.value.code or 0)


def python(code: str, *arguments: str, folder: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


HEAVY = "{'torch', 'transformers', 'peft', 'accelerate', 'datasets'} & set(sys.modules)"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["recipes", "ls"], ["schema"]])
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    code = f"import sys, atexit; from llm_dqn.cli import main; atexit.register(lambda: print('HEAVY', {HEAVY})); main()"
    done = python(code, *arguments)
    assert done.returncode == 0 and done.stdout.endswith("HEAVY set()\n")


def test_help_answers_at_once() -> None:
    started = time.perf_counter()
    done = python("from llm_dqn.cli import main; main()", "--help")
    assert time.perf_counter() - started < 2  # half a second is the aim; machines that run tests are busy
    assert all(
        name in done.stdout for name in ("train", "check", "generate", "evaluate", "recipes", "doctor", "schema")
    )


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert python(f"import sys, llm_dqn; print({HEAVY})").stdout == "set()\n"


def test_module_and_script_are_the_same() -> None:
    command = [sys.executable, "-m", "llm_dqn", "recipes", "ls"]
    assert "quickstart" in subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout


def test_wrong_input_is_a_message_without_traceback_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "quickstart", "train.learning_rat=1", "dqn.beta=0") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert sorted(shown.err.splitlines()) == [
        "override dqn.beta=0: expected a number above 0 or null, got 0",
        "override train.learning_rat=1: unknown key (got 1); did you mean learning_rate?",
    ]


@pytest.mark.parametrize("arguments", [["trian"], ["train"], ["train", "quickstart", "--num-processes", "0"]])
def test_a_wrong_command_line_exits_with_2(arguments: list[str]) -> None:
    assert run(*arguments) == 2


class FakeTrainer:
    """Stands where the trainer would, to see what it is told."""

    told: tuple[Recipe, bool | str, Sequence[str], bool] | None = None
    ending: BaseException | None = None

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> "FakeTrainer":
        trainer = cls()
        trainer.recipe = recipe  # type: ignore[attr-defined]
        return trainer

    def train(self, resume: bool | str, allow_changes: Sequence[str], replay_repair: bool) -> None:
        type(self).told = (self.recipe, resume, allow_changes, replay_repair)  # type: ignore[attr-defined]
        if self.ending is not None:
            raise self.ending


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> type[FakeTrainer]:
    monkeypatch.setattr("llm_dqn.trainer.DQNTrainer", FakeTrainer)
    monkeypatch.setattr(FakeTrainer, "told", None)
    return FakeTrainer


def test_train_hands_over_recipe_overrides_and_resume(trainer: type[FakeTrainer]) -> None:
    assert run("train", "quickstart", "--resume", "train.max_steps=3", "lora=null") == 0
    recipe = load_recipe("quickstart", ["train.max_steps=3", "lora=null"])
    assert trainer.told == (recipe, True, (), False)
    more = ("--checkpoint", "step-000100", "--replay-repair", "--allow-change", "dqn.gamma", "--allow-change", "lora")
    assert run("train", "quickstart", "--resume", "train.max_steps=3", "lora=null", *more) == 0
    assert trainer.told == (recipe, "step-000100", ["dqn.gamma", "lora"], True)


def test_a_failed_run_exits_with_1(
    trainer: type[FakeTrainer], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "ending", RunError("the disk is full"))
    assert run("train", "quickstart") == 1
    assert capsys.readouterr().err == "the run failed: the disk is full\n"
    monkeypatch.setattr(trainer, "ending", UserError("reward: wrong"))
    assert run("train", "quickstart") == 2


def test_a_bug_shows_its_traceback(trainer: type[FakeTrainer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "ending", ZeroDivisionError("bug"))
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "quickstart"])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_told_to_the_shell(number: int, code: int) -> None:
    waiting = """
import sys, time, types
from llm_dqn import cli
def forever(*_): print("ready", flush=True); time.sleep(60)
sys.modules["llm_dqn.doctor"] = types.SimpleNamespace(examine=forever)
cli.main(["doctor"])
"""
    process = subprocess.Popen([sys.executable, "-c", waiting], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.wait(timeout=30) == code


def test_check_tells_problems_of_the_recipe_and_of_what_it_names_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Recipe] = []

    def preflight(recipe: Recipe, run_code: bool) -> tuple[list, list[str]]:
        seen.append(recipe)
        return [recipe.problem("data.prompt_column", "no such column")], ["model: 1 M parameters"]

    monkeypatch.setattr("llm_dqn.preflight.preflight", preflight)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "model: {model_name_or_path: gpt2}\ntrain: {output_dir: x, sed: 1}\nreward: {funcs: [f]}\n"
        "data:\n  train: x.jsonl\n  prompt_column: text\n"
    )
    assert run("check", str(recipe)) == 2
    shown = capsys.readouterr()
    assert [line.removeprefix(str(recipe)) for line in shown.err.splitlines()] == [
        ":2: train.sed: unknown key (got 1); did you mean seed?",
        ":6: data.prompt_column: no such column",
    ]
    assert seen[0].data.prompt_column == "text"


def test_check_says_ok(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("llm_dqn.preflight.preflight", lambda recipe, run_code: ([], ["model: 1 M parameters"]))
    assert run("check", "quickstart") == 0
    assert capsys.readouterr().out == "model: 1 M parameters\nok\n"


def test_generate_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told: dict = {}
    monkeypatch.setattr(
        "llm_dqn.inference.generate_file", lambda *given, **options: told.update(options, given=given) or 7
    )
    assert (
        run("generate", "runs/x", "--prompts", "p.jsonl", "--output", "o.jsonl", "--greedy", "--beta-scale", "2") == 0
    )
    assert told["given"] == ("runs/x", "p.jsonl", "o.jsonl")
    assert (told["greedy"], told["beta_scale"], told["max_completion_length"]) == (True, 2.0, None)
    assert capsys.readouterr().out == "7 completions written to o.jsonl\n"


def test_evaluate_shows_figures_and_samples(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: dict = {}
    side = {"reward": 0.25, "reward_ci": [0.2, 0.3]}
    pairs = [(replace(episode([1], [2], 0.25), completion="bad"), replace(episode([1], [2], 0.75), completion="good"))]
    report = {"base": side, "tuned": side | {"reward": 0.75}, "win_rate": 0.9, "seeds": [3], "split": "validation"}
    monkeypatch.setattr(
        "llm_dqn.inference.evaluate_run", lambda run, **options: told.update(options, run=run) or (report, pairs)
    )
    assert run("evaluate", "runs/x", "--rewards", "a.py:f", "--rewards", "b.py:g") == 0
    assert (told["run"], told["reward_specs"], told["seeds"]) == ("runs/x", ["a.py:f", "b.py:g"], None)
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("0.250", "0.750", "90%", "bad", "good"))


def test_recipes_can_be_listed_shown_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes") == 0
    listed = capsys.readouterr().out
    assert run("recipes", "ls") == 0
    assert capsys.readouterr().out == listed and "textbook" in listed
    assert run("recipes", "show", "quickstart") == 0
    shown = capsys.readouterr().out
    assert run("recipes", "cp", "quickstart", str(tmp_path)) == 0
    copied = tmp_path / "quickstart.yaml"
    assert copied.read_text() == shown
    assert load_recipe(copied) == load_recipe("quickstart")
    assert f"llm-dqn train {copied}" in capsys.readouterr().out
    copied.write_text("mine")
    assert run("recipes", "cp", "quickstart", str(tmp_path)) == 2
    assert copied.read_text() == "mine"
    assert run("recipes", "show", "quikstart") == 2


def test_schema_knows_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == {"model", "lora", "data", "rollout", "reward", "dqn", "replay", "train"}
    assert schema["$defs"]["DQNSection"]["additionalProperties"] is False


def test_doctor_never_shows_the_token(
    tiny_llama_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    assert run("doctor", tiny_llama_path) == 0
    shown = capsys.readouterr().out
    assert "token present: yes" in shown and "secret" not in shown
    assert "python 3" in shown and "torch " in shown and "vocabulary: " in shown
    monkeypatch.delenv("HF_TOKEN")
    assert run("doctor", "no/such/folder") == 2


def test_doctor_says_what_is_wrong_with_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "data/tinylm") == 2
    assert capsys.readouterr().err == "there is no tinylm in data; did you mean tiny_lm?\n"
    assert run("doctor", "data/tiny_reward_model") == 2
    assert "does not predict the next token" in capsys.readouterr().err
