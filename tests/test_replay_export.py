"""Exports of a replay buffer: whole, chosen, and good enough to train another run token by token."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast

from llm_dqn import cli, data
from llm_dqn.errors import UserError
from llm_dqn.recipe import load_recipe
from llm_dqn.replay_browser import Choice, Remembered, open_replay, tokenizer_of
from llm_dqn.replay_export import COLUMNS, export
from llm_dqn.trainer import DQNTrainer


@pytest.fixture(scope="module")
def remembered(trained_run: Path) -> Remembered:
    return open_replay(trained_run)


def read(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".parquet":
        return pyarrow.parquet.read_table(file).to_pylist()
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_an_export_holds_every_episode_with_all_its_facts(
    trained_run: Path, remembered: Remembered, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_dqn.replay_export.BATCH", 50)  # several row groups
    file = tmp_path / f"replay{suffix}"
    with pytest.raises(SystemExit) as left:
        cli.main(["replay", "export", str(trained_run), "--output", str(file)])
    assert not left.value.code
    found = read(file)
    assert len(found) == len(remembered) and list(found[0]) == list(COLUMNS)
    row = found[11]
    lists = {name: row[name] for name in row if name.endswith(("_ids", "_logprobs"))}
    if suffix == ".csv":
        lists = {name: json.loads(text) for name, text in lists.items()}
    assert lists["prompt_ids"] == remembered.tokens(11).prompt_ids.tolist()
    assert lists["completion_ids"] == remembered.tokens(11).completion_ids.tolist()
    assert lists["ref_logprobs"] == remembered.tokens(11).ref_logprobs.tolist()
    assert lists["behaviour_logprobs"] == remembered.tokens(11).behaviour_logprobs.tolist()
    assert float(row["reward"]) == remembered.facts["reward"][11] and row["source"] == "online"
    assert (int(row["version"]), int(row["age"])) == (48 - int(remembered.facts["age"][11]), int(row["age"]))
    assert row["td_error"] in (None, "") and row["ended"] == remembered.facts["ended"][11]
    tokenizer = tokenizer_of(trained_run)
    assert row["completion"] == tokenizer.decode(lists["completion_ids"], skip_special_tokens=True)


def test_an_export_can_be_a_choice(trained_run: Path, remembered: Remembered, tmp_path: Path) -> None:
    file = tmp_path / "best.jsonl"
    assert export(trained_run, file, Choice(min_reward=2.0, limit=5)) == 5
    rewards = [row["reward"] for row in read(file)]
    assert rewards == sorted(remembered.facts["reward"], reverse=True)[:5]


def test_what_cannot_be_exported_leaves_the_file_alone(trained_run: Path, tmp_path: Path) -> None:
    (tmp_path / "old.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"--output .*x.xlsx: expected a name that ends in .parquet, .jsonl, .csv"):
        export("not/looked/at", tmp_path / "x.xlsx", Choice())
    with pytest.raises(UserError, match=r"--output .*nowhere/x.csv: the folder .*nowhere does not exist"):
        export("not/looked/at", tmp_path / "nowhere" / "x.csv", Choice())
    with pytest.raises(UserError, match="no episode fits what was asked for, so nothing is written"):
        export(trained_run, tmp_path / "old.jsonl", Choice(min_reward=99.0))
    assert (tmp_path / "old.jsonl").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.fixture(scope="module", params=[".parquet", ".jsonl", ".csv"])
def warm(trained_run: Path, tmp_path_factory: pytest.TempPathFactory, request: Any) -> Iterator[DQNTrainer]:
    """A run that learns from an export alone."""
    folder = tmp_path_factory.mktemp("warm")
    export(trained_run, folder / f"replay{request.param}", Choice(sort="slot"))
    settings = ["train.max_steps=2", "train.eval_steps=0", "train.max_scored_completions=0", "replay.held_out_share=0"]
    overrides = [f"train.output_dir={folder / 'run'}", f"replay.warm_start={folder / f'replay{request.param}'}"]
    trainer = DQNTrainer.from_recipe(load_recipe("hello_world", [*overrides, *settings]))
    trainer.train()
    yield trainer


def test_an_export_warm_starts_another_run_token_by_token(
    warm: DQNTrainer, remembered: Remembered, trained_run: Path
) -> None:
    again = open_replay(warm.args.output_dir)
    assert len(again) == len(remembered) and warm.scored_completions == 0
    assert np.array_equal(again.facts["reward"], remembered.facts["reward"])
    assert np.array_equal(again.facts["ended"], remembered.facts["ended"])
    assert set(again.facts["source"]) == {"logged"}
    for place in range(len(remembered)):
        ours, theirs = again.tokens(place), remembered.tokens(place)
        assert np.array_equal(ours.prompt_ids, theirs.prompt_ids)
        assert np.array_equal(ours.completion_ids, theirs.completion_ids)
        assert np.allclose(ours.ref_logprobs, theirs.ref_logprobs, atol=1e-4)


def test_token_ids_are_taken_where_they_spell_the_texts_and_else_not(tokenizer: PreTrainedTokenizerFast) -> None:
    """A model may write 'film' letter by letter, which no tokenizer would; an edited text is tokenised anew."""
    letters = [tokenizer("x" + letter).input_ids[-1] for letter in "film"]
    usual = tokenizer("film").input_ids
    assert tokenizer.decode(letters) == "film" and letters != usual
    eos = tokenizer.eos_token_id
    row = {
        "prompt": "film",
        "completion": "film",
        "reward": 1.0,
        "prompt_ids": letters,
        "completion_ids": [*letters, eos],
    }

    def loaded(**changes: Any) -> tuple[list[int], list[int]]:
        logged = data.load_logged([row | changes], tokenizer)[0]
        return logged.prompt.ids, logged.completion_ids

    assert loaded() == (letters, [*letters, eos])
    assert loaded(completion="the film") == (letters, [*tokenizer("the film").input_ids, eos])
    assert loaded(prompt="a film") == (tokenizer("a film").input_ids, [*letters, eos])
    for nonsense in ([10**9], ["a"], "[1]", [True], [], None):
        assert loaded(completion_ids=nonsense, prompt_ids=nonsense) == (usual, [*usual, eos])


def test_the_text_of_a_prompt_is_what_tokenises_to_it(
    tokenizer: PreTrainedTokenizerFast, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert data.prompt_text(tokenizer("the film was").input_ids, tokenizer) == "the film was"
    rendered = data.render_chat([{"role": "user", "content": "how?"}], chat_tokenizer)
    ids = data.encode_texts([rendered], chat_tokenizer, chat=True)[0]
    assert data.prompt_text(ids, chat_tokenizer) == rendered
    chat_tokenizer_with_bos = PreTrainedTokenizerFast(
        tokenizer_object=_with_bos(tokenizer), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    begun = chat_tokenizer_with_bos("the film").input_ids
    assert begun[0] == chat_tokenizer_with_bos.bos_token_id
    assert data.prompt_text(begun, chat_tokenizer_with_bos) == "the film"


def _with_bos(tokenizer: PreTrainedTokenizerFast) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    return core
