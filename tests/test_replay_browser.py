"""Looking into the replay buffer of real runs: what is there, sorted and filtered, in figures and as a list."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.cells import cell_len

from llm_dqn import checkpoint, cli
from llm_dqn.console import Console, Screen
from llm_dqn.episode_store import EpisodeStore
from llm_dqn.errors import RunError, UserError
from llm_dqn.recipe import load_recipe
from llm_dqn.replay import PrefixReplay
from llm_dqn.replay_browser import Choice, Remembered, chosen, open_replay, tokenizer_of
from llm_dqn.replay_export import rows
from llm_dqn.replay_statistics import described, histogram, statistics
from llm_dqn.trainer import DQNTrainer
from tests.networks import episode


def run(*arguments: str) -> int:
    """The exit code of a command, run in this process."""
    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    return int(left.value.code or 0)


@pytest.fixture(scope="module")
def remembered(trained_run: Path) -> Remembered:
    return open_replay(trained_run)


def shard(*episodes: Any, td_errors: list[float]) -> EpisodeStore:
    """What one process's buffer keeps of these episodes."""
    replay = PrefixReplay(64)
    replay.add(list(episodes))
    replay.update_priorities(torch.arange(len(episodes)), torch.tensor(td_errors, dtype=torch.float64))
    return replay.store


@pytest.fixture
def two_processes(trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run with prioritised replay and a checkpoint of two processes: four episodes and two, one of them a copy."""
    folder = tmp_path / "run"
    shutil.copytree(trained_run, folder, ignore=shutil.ignore_patterns("checkpoints"))
    recipe = (folder / "recipe.yaml").read_text()
    assert "prioritized: false" in recipe
    recipe = recipe.replace("prioritized: false", "prioritized: true")
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "checkpoints" / "step-000040").mkdir(parents=True)
    first = [episode([5, 6], [7, 8], reward) for reward in (0.5, 0.25)]
    first.append(replace(episode([5, 6], [7, 8, 9], 1.0, "length"), policy_version=16))
    first.append(replace(episode([5], [7], -1.0), policy_version=32))
    second = [replace(episode([5, 6], [7, 8], 2.0), source="logged"), replace(episode([4], [3], 0.0), policy_version=8)]
    shards = [shard(*first, td_errors=[0.1, 0.4, 0.3, 0.2]), shard(*second, td_errors=[0.5, 0.05])]
    monkeypatch.setattr(checkpoint, "newest", lambda root: (root / "step-000040", []))
    monkeypatch.setattr(checkpoint, "read_stores", lambda folder: shards)
    return folder


# --- reading ------------------------------------------------------------------------------------------------------


def test_the_newest_checkpoint_holds_what_the_run_remembered(trained_run: Path, remembered: Remembered) -> None:
    trainer = DQNTrainer.from_recipe(load_recipe(trained_run / "recipe.yaml"))
    step = checkpoint.newest(trained_run / "checkpoints")[0]
    assert step is not None and remembered.folder == step and remembered.step == 48
    trainer.replay.load_arrays(checkpoint.read_replay(step)[0])
    assert len(remembered) == len(trainer.replay) > 100
    assert np.array_equal(remembered.facts["reward"], trainer.replay.rewards)
    assert np.array_equal(remembered.facts["age"], 48 - trainer.replay.versions)
    batch = trainer.replay.batch(np.array([17]))
    length = int(batch.tokens.prompt_lengths[0])
    ids = batch.tokens.input_ids[0].tolist()
    tokens = remembered.tokens(17)
    assert [*tokens.prompt_ids, *tokens.completion_ids] == ids
    assert len(tokens.prompt_ids) == length
    assert tokens.ref_logprobs.tolist() == batch.ref_logprobs[0].tolist()
    assert set(remembered.facts["source"]) == {"online"} and set(remembered.facts["ended"]) <= {"eos", "length"}


def test_an_earlier_checkpoint_can_be_named(trained_run: Path) -> None:
    earlier = open_replay(trained_run, "step-000032")
    assert earlier.step == 32 and earlier.added < open_replay(trained_run).added
    with pytest.raises(
        UserError, match=r"--checkpoint step-000031: .* has step-000032, step-000048; did you mean step"
    ):
        open_replay(trained_run, "step-000031")
    with pytest.raises(UserError, match=r"--checkpoint \.\./.: "):
        open_replay(trained_run, "../x")


def test_a_damaged_newest_checkpoint_is_passed_over_and_told(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained_run, tmp_path / "run")
    root = tmp_path / "run" / "checkpoints"
    victim = next(file for file in (root / "step-000048").iterdir() if file.suffix == ".safetensors")
    victim.write_bytes(victim.read_bytes()[:-1])
    assert run("replay", "stats", str(tmp_path / "run")) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("step-000048: ") and "step-000032" in shown
    with pytest.raises(RunError, match="damaged"):
        open_replay(tmp_path / "run", "step-000048")
    for file in root.glob("*/manifest.json"):
        file.unlink()
    with pytest.raises(RunError, match=r"no checkpoint in .* is whole: step-000048: "):
        open_replay(tmp_path / "run")


def test_what_is_no_run_or_has_no_checkpoint_says_so(trained_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is no folder; name the folder of a run"):
        open_replay(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is no run folder: it holds no recipe\.yaml"):
        open_replay(tmp_path)
    shutil.copy(trained_run / "recipe.yaml", tmp_path)
    with pytest.raises(UserError, match=r"has no checkpoint yet; one is written every train\.save_steps steps"):
        open_replay(tmp_path)
    (tmp_path / "checkpoints" / "step-000100.tmp").mkdir(parents=True)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        open_replay(tmp_path)


def test_the_tokenizer_is_the_adapters_or_the_bases(trained_run: Path, tmp_path: Path) -> None:
    shutil.copytree(trained_run, tmp_path / "run")
    config = tmp_path / "run" / "adapter" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": "mine"}))
    assert tokenizer_of(tmp_path / "run").chat_template == "mine"
    shutil.rmtree(tmp_path / "run" / "adapter")  # as in a run that has not finished
    assert tokenizer_of(tmp_path / "run").chat_template != "mine"


def test_no_model_is_loaded(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run whose base model is gone can still be looked into."""
    folder = tmp_path / "run"
    shutil.copytree(trained_run, folder)
    recipe = load_recipe(folder / "recipe.yaml")
    text = (folder / "recipe.yaml").read_text().replace(recipe.model.model_name_or_path, str(tmp_path / "gone"))
    (folder / "recipe.yaml").write_text(text)
    assert run("replay", "stats", str(folder)) == 0 and "768, room for" in capsys.readouterr().out
    assert run("replay", "show", str(folder), "--limit", "2") == 0
    assert "2 of 768 episodes" in capsys.readouterr().out
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    assert run("replay", "export", str(folder), "--output", str(tmp_path / "all.jsonl")) == 0


# --- choosing -----------------------------------------------------------------------------------------------------


def picked(remembered: Remembered, **options: Any) -> list[float]:
    return remembered.facts["reward"][chosen(remembered, Choice(**options))].tolist()


def test_episodes_of_all_processes_are_sorted_and_filtered(two_processes: Path) -> None:
    found = open_replay(two_processes)
    assert found.facts["process"].tolist() == [0, 0, 0, 0, 1, 1] and found.facts["slot"].tolist() == [0, 1, 2, 3, 0, 1]
    assert picked(found) == [2.0, 1.0, 0.5, 0.25, 0.0, -1.0]
    assert picked(found, lowest=True) == [-1.0, 0.0, 0.25, 0.5, 1.0, 2.0]
    assert picked(found, sort="age") == [0.5, 0.25, 2.0, 0.0, 1.0, -1.0]  # 40, 40, 40, 32, 24, 8
    assert picked(found, sort="age", lowest=True)[:2] == [-1.0, 1.0]
    assert picked(found, sort="td-error") == [2.0, 0.25, 1.0, -1.0, 0.5, 0.0]
    assert picked(found, sort="slot") == [0.5, 0.25, 1.0, -1.0, 2.0, 0.0]
    assert picked(found, sort="slot", lowest=True)[:2] == [0.0, 2.0]
    assert picked(found, source="logged") == [2.0]
    assert picked(found, min_reward=0.25, max_reward=1.0) == [1.0, 0.5, 0.25]
    assert picked(found, source="online", limit=2) == [1.0, 0.5]


def test_what_cannot_be_chosen_by_says_so(remembered: Remembered) -> None:
    with pytest.raises(UserError, match="--sort rewards: expected reward, age, td-error, slot; did you mean reward"):
        chosen(remembered, Choice(sort="rewards"))
    with pytest.raises(UserError, match="--source onlin: expected online, logged, imagined; did you mean online"):
        chosen(remembered, Choice(source="onlin"))
    with pytest.raises(UserError, match="--sort td-error: TD errors were never measured"):
        chosen(remembered, Choice(sort="td-error"))


# --- figures ------------------------------------------------------------------------------------------------------


def test_figures_by_hand(two_processes: Path) -> None:
    found = open_replay(two_processes)
    figures = statistics(found)
    assert (figures["episodes"], figures["by_process"], figures["added"]) == (6, [4, 2], 6)
    assert (figures["distinct_prompts"], figures["distinct_completions"]) == (3, 4)
    assert figures["duplicates"] == 2  # [5, 6] [7, 8] three times
    assert figures["source"] == {"online": 5, "logged": 1, "imagined": 0} and figures["ended"] == {
        "eos": 5,
        "length": 1,
    }
    assert figures["reward"]["mean"] == pytest.approx(2.75 / 6)
    assert (figures["reward"]["min"], figures["reward"]["max"]) == (-1.0, 2.0)
    assert figures["reward_histogram"] == [(r, r, 1) for r in (-1.0, 0.0, 0.25, 0.5, 1.0, 2.0)]
    assert (figures["age"]["max"], figures["age"]["median"]) == (40.0, 36.0)
    assert figures["td_error"]["max"] == 0.5
    assert figures["prompt_tokens"]["sum"] == 10 and figures["completion_tokens"]["max"] == 3
    lines = "\n".join(described(figures))
    assert "6 (4, 2 by process), room for" in lines and "online 5 (83%), logged 1 (17%)" in lines


def test_a_buffer_that_is_not_prioritised_shows_no_td_error(remembered: Remembered, trained_run: Path) -> None:
    assert statistics(remembered)["td_error"] is None
    assert any("never measured" in line for line in described(statistics(remembered)))
    first = next(rows(remembered, np.array([0]), tokenizer_of(trained_run)))
    assert first["td_error"] is None


def test_histograms() -> None:
    values = np.array([0.0] * 3 + [1.0])
    assert histogram(values) == [(0.0, 0.0, 3), (1.0, 1.0, 1)]
    bins = histogram(np.arange(100) / 99)
    assert [count for _, _, count in bins] == [10] * 10
    assert bins[0][0] == 0.0 and bins[-1][1] == 1.0


def test_the_longest_bar_is_that_of_the_commonest_reward(
    trained_run: Path, remembered: Remembered, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("replay", "stats", str(trained_run)) == 0
    shown = capsys.readouterr().out
    bars = {line.split("█")[0].strip(): line.count("█") for line in shown.splitlines() if "█" in line}
    values, counts = np.unique(remembered.facts["reward"], return_counts=True)
    assert bars[f"{values[counts.argmax()]:.3g}"] == 40 == max(bars.values())
    assert f"{len(remembered)}, room for 4,096" in shown


# --- a list for people --------------------------------------------------------------------------------------------


ROW = {"slot": 1, "reward": 0.5, "age": 3, "td_error": None, "process": 0, "source": "online", "ended": "eos"}


def shown(width: int, *texts: tuple[str, str], **facts: Any) -> list[str]:
    """The lines in which these (prompt, completion) are listed."""
    stream = io.StringIO()
    console = Console(True, Screen(file=stream, width=width, color_system=None))
    console.episodes([ROW | {"prompt": p, "completion": c, "completion_ids": [1, 2]} | facts for p, c in texts])
    return [line for line in stream.getvalue().splitlines() if line.strip()]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_each_episode_is_one_line_of_the_terminals_width(width: int) -> None:
    """Wide characters take two columns; escape codes and line ends are spelled out."""
    texts = [("问候：" * 40, "你好世界" * 40), ("short", "也短"), ("\x1b[2J\x1b]0;x\x07", "a\nb\u202e")]
    lines = shown(width, *texts)
    assert len(lines) == 2 + len(texts)
    assert all(cell_len(line) <= width for line in lines)
    assert not {"\x1b", "\x07", "\u202e"} & set("".join(lines))
    assert "short" in lines[3] and "也短" in lines[3]
    if width == 200:
        assert r"\x1b[2J" in lines[4] and "a ⏎ b" in lines[4]


def test_of_a_prompt_the_end_is_seen_and_of_a_completion_the_start() -> None:
    line = shown(80, ("first " * 20 + "last", "first " + "last " * 20))[2]
    prompt, completion = line[line.index("…") :].split("last", 1)
    assert "first" in prompt and completion.strip().startswith("first") and line.rstrip().endswith("…")


def test_facts_that_are_alike_take_no_room() -> None:
    assert "ended" not in shown(80, ("p", "c"))[0] and "td error" not in shown(80, ("p", "c"))[0]
    assert "td error" in shown(80, ("p", "c"), td_error=0.25)[0] and "0.25" in shown(80, ("p", "c"), td_error=0.25)[2]
    stream = io.StringIO()
    both = [ROW | {"prompt": "p", "completion": "c", "completion_ids": [1], "process": rank} for rank in (0, 1)]
    Console(True, Screen(file=stream, width=80, color_system=None)).episodes(both)
    assert "process" in stream.getvalue()


def test_the_command_lists_the_best_first(
    trained_run: Path, remembered: Remembered, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("replay", "show", str(trained_run), "--limit", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    best = chosen(remembered, Choice(limit=3))
    listed = [line.split()[:2] for line in lines if line.split()[:1] and line.split()[0].isdigit()][:3]
    assert listed == [[str(slot), f"{remembered.facts['reward'][slot]:.3f}"] for slot in best]
    assert lines[-1].startswith(f"3 of {len(remembered)} episodes that fit")
    assert run("replay", "show", str(trained_run), "--min-reward", "99") == 0
    assert capsys.readouterr().out.startswith("0 of 0 episodes that fit")
    assert run("replay", "show", str(trained_run), "--sort", "td-error") == 2
    assert capsys.readouterr().err.startswith("--sort td-error: TD errors were never measured")
