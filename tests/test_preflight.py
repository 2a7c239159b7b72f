"""`llm-dqn check`: all mistakes at once, each at its line, and one step on the real model where nothing is wrong."""

import json
import textwrap
from pathlib import Path

import pytest

from llm_dqn.preflight import preflight
from llm_dqn.recipe import load_recipe, load_recipe_partially, parse_recipe_partially

REWARDS = """
def length(completions, **columns):
    return [float(len(text)) for text in completions]

def right(completions, answer):
    return [float(text == wanted) for text, wanted in zip(completions, answer)]
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_llama_path: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, prompts and rewards, in which nothing else lies; the current folder is another one."""
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    (home / "models").mkdir()
    (home / "models" / "tiny").symlink_to(tiny_llama_path)
    rows = [{"prompt": f"the film {number}", "text": "x"} for number in range(10)]
    (home / "data" / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "data" / "scores.py").write_text(REWARDS)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return home


GOOD = """
model:
  model_name_or_path: models/tiny
data:
  train: data/prompts.jsonl
reward:
  funcs: ["data/scores.py:length"]
rollout: {max_completion_length: 4}
train:
  output_dir: runs/x
"""


def check(folder: Path, text: str = GOOD, *overrides: str) -> tuple[list[str], list[str]]:
    """(problems of the recipe and of what it names, lines that were said)."""
    file = folder / "r.yaml"
    file.write_text(textwrap.dedent(text).strip())
    recipe, problems = parse_recipe_partially(file.read_text(), file, overrides)
    assert recipe is not None
    more, lines = preflight(recipe)
    return [str(problem).removeprefix(f"{file}") for problem in problems + more], lines


def test_a_good_recipe_is_tried_on_the_real_model_and_leaves_nothing_behind(folder: Path) -> None:
    problems, lines = check(folder)
    assert problems == []
    assert any(line.startswith("data.train: 10 prompts") for line in lines)
    assert any(line.startswith("one rollout of 4 completions took") for line in lines)
    assert any(line.startswith("one update of 4 episodes took") for line in lines)
    assert list(Path.cwd().iterdir()) == [] and not (folder / "runs").exists()


REQUIRED = {
    "model.model_name_or_path": "expected text, got 3",
    "data.train": "expected text, got 3",
    "reward.funcs": "expected a list with at least one entry, got 3",
    "train.output_dir": "expected text, got 3",
}


@pytest.mark.parametrize("key", REQUIRED)
def test_a_broken_required_key_is_one_problem_and_the_rest_is_still_checked(folder: Path, key: str) -> None:
    problems, lines = check(folder, GOOD, f"{key}=3", "reward.weights=null")
    assert problems == [f"override {key}=3: {REQUIRED[key]}"]
    assert not any("one update" in line for line in lines)
    others = {"data.train: 10 prompts": "data.train", "model: ": "model.model_name_or_path"}
    for start, needs in others.items():
        if key not in (needs, "model.model_name_or_path"):
            assert any(line.startswith(start) for line in lines)


@pytest.mark.parametrize("section", ["model", "data", "reward", "train"])
def test_a_missing_section_is_told_like_any_other_mistake(folder: Path, section: str) -> None:
    problems, _ = check(folder, GOOD, f"{section}=null")
    assert len(problems) == 1 and "missing, and has no default" in problems[0] and f"{section}." in problems[0]


def test_everything_broken_at_once(folder: Path) -> None:
    problems, _ = check(folder, GOOD, *(f"{key}=3" for key in REQUIRED))
    assert len(problems) == 4


def test_mistyped_paths_are_no_hub_ids(folder: Path) -> None:
    text = """
    model:
      model_name_or_path: models/tny
    data:
      train: data/promts.jsonl
      eval: data/nothing_like_it
    reward:
      funcs: ["data/scors.py:length", "models/tniy#GOOD"]
    train:
      output_dir: runs/x
    """
    problems, lines = check(folder, text)
    assert problems == [
        ":2: model.model_name_or_path: there is no tny in models; did you mean tiny?",
        ":4: data.train: there is no promts.jsonl in data; did you mean prompts.jsonl?",
        ":5: data.eval: there is no nothing_like_it in data",
        ":7: reward.funcs: there is no scors.py in data; did you mean scores.py?",
        ":7: reward.funcs: there is no tniy in models; did you mean tiny?",
    ]
    assert not any("download" in line for line in lines)


def test_shipped_folders_are_known_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, _ = load_recipe_partially("quickstart", ["model.model_name_or_path=data/tinylm"])
    assert recipe is not None
    problems, _ = preflight(recipe)
    assert [problem.message for problem in problems] == ["there is no tinylm in data; did you mean tiny_lm?"]


def test_a_missing_column_is_told_where_it_is_named(folder: Path) -> None:
    said = "data/prompts.jsonl has no column 'promt'; did you mean prompt?"
    problems, _ = check(folder, GOOD.replace("data/prompts.jsonl", "data/prompts.jsonl\n  prompt_column: promt"))
    assert len(problems) == 1 and problems[0].startswith(":5: data.prompt_column: ") and said in problems[0]
    problems, _ = check(folder, GOOD, "data.prompt_column=promt")
    assert len(problems) == 1 and problems[0].startswith("override data.prompt_column=promt: ") and said in problems[0]


def test_a_missing_column_that_nobody_named_is_told_at_the_data(folder: Path) -> None:
    rows = folder / "data" / "prompts.jsonl"
    rows.write_text(rows.read_text().replace('"prompt"', '"question"'))
    problems, _ = check(folder)
    assert len(problems) == 1 and problems[0].startswith(":4: data.train: ")
    assert "no column 'prompt'" in problems[0] and "set data.prompt_column" in problems[0]


def test_rewards_are_asked_for_their_columns_even_without_the_model(folder: Path) -> None:
    text = GOOD.replace("models/tiny", "someone/model").replace("scores.py:length", "scores.py:right")
    problems, lines = check(folder, text)
    assert len(problems) == 1
    assert problems[0].startswith(":6: reward.funcs: the reward 'right' needs 'answer', which is no column of ")
    assert "/data/prompts.jsonl (it gets: " in problems[0]
    assert "  model someone/model" in lines


def test_rows_are_looked_at_even_without_the_model(folder: Path) -> None:
    (folder / "data" / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": null}\n')
    problems, _ = check(folder, GOOD.replace("models/tiny", "models/tinny"))
    assert [problem.partition(": ")[0] for problem in problems] == [":2", ":4"]
    assert "row 2: column 'prompt' is empty (None)" in problems[1]


def test_a_split_that_is_not_there_is_a_problem_of_its_key(folder: Path) -> None:
    (folder / "parts").mkdir()
    (folder / "parts" / "train.jsonl").write_text((folder / "data" / "prompts.jsonl").read_text())
    problems, _ = check(folder, GOOD, "data.train=parts", "data.eval_split=tset")
    assert len(problems) == 1 and "data.eval_split=tset" in problems[0] and "no split 'tset'" in problems[0]


def test_offline_it_says_what_a_run_would_download_and_that_the_rest_is_fine() -> None:
    problems, lines = preflight(load_recipe("gpt2_imdb"))
    assert problems == []
    assert lines == [
        "a run would download these, and they could not be looked into:",
        "  model gpt2",
        "  data stanfordnlp/imdb",
        "  reward lvwerra/distilbert-imdb#POSITIVE",
        "everything else was looked at, but for a rollout and an update, which need them all",
    ]


def test_a_full_disk_is_told_before_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**6}))
    problems, _ = check(folder)
    assert len(problems) == 1 and problems[0].startswith(":9: train.output_dir: ") and "GiB free" in problems[0]
