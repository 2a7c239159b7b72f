"""`llm-dqn score`: any file of completions, scored as the trainer scores, whatever is wrong with some of its rows."""

import csv
import json
import re
import signal
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset

import llm_dqn
from llm_dqn import cli, evaluation, row_stream, score_files
from llm_dqn.errors import RunError, UserError
from llm_dqn.policy import BehaviourPolicy
from llm_dqn.recipe import load_recipe
from llm_dqn.replay import PrefixReplay
from llm_dqn.rollout import rollout
from llm_dqn.trainer import DQNTrainer
from llm_dqn.types import Episode
from tests import tiny_models
from tests.networks import network, shake

PER_TOKEN = ("token_ids", "tokens", "q_values", "values", "advantages", "ranks", "base_ranks", "alternatives")
ROWS = [
    {"prompt": "the film was", "completion": " lovely", "wanted": "e"},
    {"prompt": "i hated", "completion": " the plot and the noise", "wanted": "o"},
    {"prompt": "3 of 10", "completion": " 😀 שלום, 日本", "wanted": "3"},
]
REWARDS = """
def letters(prompts, completions, **columns):
    return [text.count("e") / max(len(text), 1) for text in completions]

def wanted_letters(prompts, completions, wanted):
    return [None if letter is None else text.count(letter) for text, letter in zip(completions, wanted)]

def picky(prompts, completions, **columns):
    if any("noise" in text for text in completions):
        raise RuntimeError("no noise")
    return [1.0] * len(completions)

def broken(prompts, completions, **columns):
    raise RuntimeError("not today")

def spoken(prompts, completions, **columns):
    return [float(turns[0]["role"] == "assistant") + len(turns[0]["content"]) for turns in completions]
"""


@pytest.fixture(autouse=True)
def signal_handlers_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> DQNTrainer:
    """A trainer right after its run, which lies in `args.output_dir`."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    settings = ["max_steps=24", "save_steps=0", "eval_steps=0", "final_eval_prompts=8"]
    overrides = [f"train.output_dir={folder}", *(f"train.{setting}" for setting in settings)]
    trainer = DQNTrainer.from_recipe(load_recipe("hello_world", overrides))
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def adapter(tiny_llama_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tuned adapter of the tiny model with its heads."""
    net = network(tiny_llama_path)
    shake(net, 0.2)
    folder = tmp_path_factory.mktemp("adapter")
    net.save_policy(folder)
    return str(folder)


@pytest.fixture
def rewards(tmp_path: Path) -> str:
    file = tmp_path / "my_rewards.py"
    file.write_text(REWARDS)
    return str(file)


def jsonl(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> str:
    """A file with a row a line; text is written as it is."""
    file = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(file)


def saved_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


SAVERS = {
    "jsonl": lambda file, rows: jsonl(file.parent, rows, file.name),
    "csv": saved_csv,
    "parquet": lambda file, rows: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file),
    "json": lambda file, rows: file.write_text(json.dumps(rows)),
}


def lines_of(file: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def command(*arguments: Any) -> int:
    """The exit code of `llm-dqn score`."""
    try:
        cli.main(["score", *map(str, arguments)])
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def alike(one: list[dict[str, Any]], other: list[dict[str, Any]], tolerance: float = 1e-5) -> bool:
    """Whether two lists of score lines say the same."""
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for name in ("prompt", "completion", "rewards", "reward", "token_ids", "tokens", "ranks", "base_ranks"):
            assert a[name] == b[name], name
        for name in ("q_values", "values", "advantages"):
            assert a[name] == pytest.approx(b[name], abs=tolerance), name
    return True


# --- the same as the trainer --------------------------------------------------------------------------------------


def written_and_judged(trainer: DQNTrainer) -> list[Episode]:
    """Completions of the trainer's own policy with its own rewards."""
    prompts = trainer.parts.eval_prompts * 3
    episodes = rollout(trainer.parts.writer, prompts, BehaviourPolicy(), seed=5)
    return evaluation.judged(trainer.parts.rewards, episodes)


def test_scores_are_the_trainers_own(finished: DQNTrainer, tmp_path: Path) -> None:
    """Rewards, token ids and Q of text that a run wrote, found again from the text alone."""
    episodes = written_and_judged(finished)
    rows = [{"prompt": e.prompt, "completion": e.completion, "ended": e.ended} for e in episodes]
    found = list(llm_dqn.score(finished.args.output_dir, jsonl(tmp_path, rows)))
    memory = PrefixReplay(len(episodes))
    memory.add(episodes)
    batch = memory.batch(torch.arange(len(episodes)).numpy())
    with torch.no_grad():
        q = finished.network(batch)
    for row, (line, one) in enumerate(zip(found, episodes, strict=True)):
        assert line["token_ids"] == one.completion_ids.tolist()
        assert line["reward"] == pytest.approx(one.reward, abs=1e-5)
        assert line["rewards"] == pytest.approx(one.rewards, abs=1e-5)
        length = len(one.completion_ids)
        assert line["q_values"] == pytest.approx(q.taken[row, :length].tolist(), abs=1e-5)
        assert line["values"] == pytest.approx(q.values[row, :length].tolist(), abs=1e-5)
        assert line["ended"] == one.ended
    assert len({line["reward"] for line in found}) > 1


def test_samples_of_a_run_get_the_rewards_that_it_noted(trained_run: Path) -> None:
    """`samples.jsonl` does not say how completions ended: those as long as the run allows were cut."""
    noted = lines_of(trained_run / "samples.jsonl")
    found = list(llm_dqn.score(trained_run, trained_run / "samples.jsonl"))
    assert [line["completion"] for line in found] == [line["completion"] for line in noted]
    assert [line["reward"] for line in found] == pytest.approx([line["reward"] for line in noted], abs=1e-5)
    lengths = [len(line["token_ids"]) for line in found]
    assert max(lengths) <= 8
    assert {line["ended"] for line in found if len(line["token_ids"]) < 8} == {"eos"}


def test_what_score_wrote_can_be_scored_again(adapter: str, rewards: str, tmp_path: Path) -> None:
    first = list(llm_dqn.score(adapter, ROWS, rewards=[f"{rewards}:letters"]))
    again = list(llm_dqn.score(adapter, jsonl(tmp_path, first), rewards=[f"{rewards}:letters"]))
    assert alike(first, again)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_neither_batch_size_nor_windows_matter(
    adapter: str, rewards: str, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**row, "prompt": row["prompt"] + " x" * i} for i in range(4) for row in ROWS]
    expected = list(llm_dqn.score(adapter, rows, rewards=[f"{rewards}:letters"]))
    monkeypatch.setattr(score_files, "WINDOW_ROWS", 5)
    found = list(llm_dqn.score(adapter, rows, rewards=[f"{rewards}:letters"], batch_size=batch_size))
    assert alike(expected, found)
    assert [line["prompt"] for line in found] == [row["prompt"] for row in rows]


# --- files --------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_line_a_row_in_their_order(
    adapter: str, rewards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scores.jsonl"
    arguments = ["--rewards", f"{rewards}:letters", "--rewards", f"{rewards}:wanted_letters"]
    assert command(adapter, "--input", jsonl(tmp_path, ROWS), "--output", output, *arguments) == 0
    found = lines_of(output)
    assert [line["completion"] for line in found] == [row["completion"] for row in ROWS]
    for line in found:
        assert {len(line[name]) for name in PER_TOKEN} == {len(line["token_ids"])}
        assert "".join(line["tokens"]) == line["completion"] + "<eos>"
        assert line["reward"] == pytest.approx(sum(line["rewards"].values()))
        assert {len(found) for found in line["alternatives"]} == {3}
    assert [line["rewards"]["wanted_letters"] for line in found] == [1.0, 2.0, 0.0]
    assert "3 completions scored, mean reward" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.partial"))


def test_every_kind_of_source_says_the_same(adapter: str, tmp_path: Path) -> None:
    expected = list(llm_dqn.score(adapter, ROWS, rewards=[]))
    for suffix, save in SAVERS.items():
        save(tmp_path / f"rows.{suffix}", ROWS)
    sources: list[Any] = [tmp_path / f"rows.{suffix}" for suffix in SAVERS]
    for source in [*sources, Dataset.from_list(ROWS), iter(ROWS)]:
        assert alike(expected, list(llm_dqn.score(adapter, source, rewards=[]))), source


def test_the_heat_map_is_drawn_of_the_first_completions(adapter: str, tmp_path: Path) -> None:
    html = tmp_path / "map.html"
    files = ["--input", jsonl(tmp_path, ROWS), "--output", tmp_path / "scores.jsonl"]
    assert command(adapter, *files, "--html", html, "--max-html", 2) == 0
    text = re.sub(r"<[^>]*>", "", html.read_text(encoding="utf-8"))
    assert "the film was" in text and "i hated" in text
    assert "3 of 10" not in text


def test_without_rewards_there_are_none_and_it_says_so(
    tiny_llama_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scores.jsonl"
    assert command(tiny_llama_path, "--input", jsonl(tmp_path, ROWS), "--output", output) == 0
    assert {(line["reward"], str(line["rewards"])) for line in lines_of(output)} == {(None, "{}")}
    said = capsys.readouterr().err
    assert "--rewards" in said and "plain model" in said


def test_an_adapter_without_heads_says_what_its_numbers_are(
    tiny_llama_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = network(tiny_llama_path)
    net.save_policy(tmp_path / "adapter")
    (tmp_path / "adapter" / "q_head.safetensors").unlink()
    files = ["--input", jsonl(tmp_path, ROWS), "--output", tmp_path / "scores.jsonl"]
    assert command(tmp_path / "adapter", *files) == 0
    assert "V is 0" in capsys.readouterr().err


# --- memory -------------------------------------------------------------------------------------------------------


def test_reading_runs_no_more_than_a_window_ahead(adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_files, "WINDOW_ROWS", 16)
    monkeypatch.setattr(score_files, "_READ_TOGETHER", 8)
    asked = 0

    def endless() -> Iterator[dict[str, Any]]:
        nonlocal asked
        while True:
            asked += 1
            yield ROWS[asked % 3]

    lines = llm_dqn.score(adapter, endless(), rewards=[], batch_size=16)
    ahead = []
    for number in range(1, 300):
        assert next(lines)["completion"] == ROWS[number % 3]["completion"]
        ahead.append(asked - number)
    assert max(ahead[100:]) <= 16 + 8


def test_a_window_also_ends_where_it_holds_many_tokens(adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    kept = score_files.score_given

    def counting(writer: Any, judge: Any, given: list[Any], *others: Any) -> Any:
        sizes.append(sum(len(one.prompt_ids) + len(one.completion_ids) for one in given))
        return kept(writer, judge, given, *others)

    monkeypatch.setattr(score_files, "score_given", counting)
    monkeypatch.setattr(score_files, "WINDOW_TOKENS", 100)
    assert len(list(llm_dqn.score(adapter, ROWS * 20, rewards=[]))) == 60
    assert len(sizes) == 10 and max(sizes) < 200


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_memory_does_not_grow_with_the_file(
    adapter: str, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that Python holds at most, for a file and for one five times as long."""
    monkeypatch.setattr(score_files, "WINDOW_ROWS", 16)
    monkeypatch.setattr(score_files, "_READ_TOGETHER", 16)
    monkeypatch.setattr(row_stream, "_PARQUET_ROWS", 16)

    def peak(count: int) -> int:
        """Every second row is broken; what rewards might want of a row is far larger than its texts."""
        rows = [{**ROWS[0], "other": "x" * 20_000, "ended": ("", "never")[number % 2]} for number in range(count)]
        file = tmp_path / f"rows{count}.{suffix}"
        SAVERS[suffix](file, rows)
        del rows
        stream = score_files.RowStream(file)
        scorer = score_files.Scorer(adapter, stream, [], 16, 3, False, lambda said: None)
        tracemalloc.start()
        try:
            score_files.score_file(scorer, str(tmp_path / "scores.jsonl"))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(64)  # what is made once and kept
    assert peak(350) - peak(200) < 0.1 * 150 * 20_000  # the first hundred are read before it counts


# --- rows ---------------------------------------------------------------------------------------------------------

BAD = {
    "no prompt": ({"completion": "x"}, "has no 'prompt'"),
    "no completion": ({"prompt": "the film"}, "has no completion"),
    "not JSON": ('{"prompt": "the film", ', "not valid JSON"),
    "no object": ("[1, 2]", "expected an object"),
    "prompt of a wrong type": ({"prompt": 3, "completion": "x"}, "is int (3)"),
    "completion of a wrong type": ({"prompt": "the film", "completion": 3.5}, "is float (3.5)"),
    "empty prompt": ({"prompt": "", "completion": "x"}, "is empty"),
    "empty completion": ({"prompt": "the film", "completion": ""}, "the completion is empty"),
    "too long": ({"prompt": "the film", "completion": "x" * 300}, "the model was made to read 256"),
    "half a pair": ('{"prompt": "the film", "completion": "\\ud83d"}', "half of a character pair"),
    "half a pair in the prompt": ('{"prompt": "\\ud83d", "completion": "x"}', "half of a character pair"),
    "strange end": ({"prompt": "the film", "completion": "x", "ended": "tired"}, "expected 'eos' or 'length'"),
    "conversation without template": (
        {"prompt": [{"role": "user", "content": "hi"}], "completion": "x"},
        "no chat template",
    ),
    "several messages": (
        {"prompt": "the film", "completion": [{"role": "assistant", "content": "x"}] * 2},
        "one message of the assistant",
    ),
    "message of the user": (
        {"prompt": "the film", "completion": [{"role": "user", "content": "x"}]},
        "not the assistant",
    ),
    "unknown id": ({"prompt": "the film", "token_ids": [5, 300]}, "has 300"),
    "negative id": ({"prompt": "the film", "token_ids": [-1]}, "has -1"),
    "ids of a wrong type": ({"prompt": "the film", "token_ids": [True]}, "expected a list of token ids"),
    "no ids": ({"prompt": "the film", "token_ids": []}, "expected a list of token ids"),
    "ids of another text": ({"prompt": "the film", "completion": "x", "token_ids": [5, 6]}, "the token ids spell"),
}


def test_a_bad_row_is_named_and_the_others_go_on(
    adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Any] = []
    for row, _ in BAD.values():
        rows += [row, ROWS[len(rows) % 3]]
    output = tmp_path / "scores.jsonl"
    file = jsonl(tmp_path, [*rows, ""])
    assert command(adapter, "--input", file, "--output", output) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out: ")]
    assert len(told) == len(BAD)
    for number, (line, (name, (_, reason))) in enumerate(zip(told, BAD.items(), strict=True)):
        assert f"rows.jsonl, line {2 * number + 1}:" in line and reason in line, (name, line)
    found = lines_of(output)
    assert [line["completion"] for line in found] == [rows[2 * i + 1]["completion"] for i in range(len(BAD))]
    expected = list(llm_dqn.score(adapter, ROWS, rewards=[]))
    assert all(alike([line], [one for one in expected if one["prompt"] == line["prompt"]]) for line in found)


def test_lines_that_are_no_text_and_strange_csv_are_passed_over(
    adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = json.dumps(ROWS[0]).encode()
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + good + b"\n\xff\xfe\n\n" + good + b"\n")
    (tmp_path / "rows.csv").write_bytes(
        b'prompt,completion\nthe film, a\ntoo,many,fields\nthe \xff, b\nthe film,"two\nlines"\nthe film, c\n'
    )
    for name, kept, bad in (
        ("rows.jsonl", [" lovely"] * 2, "line 2"),
        ("rows.csv", [" a", "two\nlines", " c"], "line 3"),
    ):
        assert command(adapter, "--input", tmp_path / name, "--output", tmp_path / "scores.jsonl") == 0
        assert [line["completion"] for line in lines_of(tmp_path / "scores.jsonl")] == kept
        assert f"{name}, {bad}" in capsys.readouterr().err


def test_strict_stops_at_the_first_bad_row(adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "scores.jsonl"
    file = jsonl(tmp_path, [ROWS[0], {"prompt": "the film", "completion": 3}, "not json"])
    assert command(adapter, "--input", file, "--output", output, "--strict") == 2
    said = capsys.readouterr().err
    assert "line 2" in said and "line 3" not in said
    assert not output.exists()


def test_nothing_but_bad_rows_is_wrong_input(adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "the film", "completion": ""}] * 2
    output = tmp_path / "scores.jsonl"
    assert command(adapter, "--input", jsonl(tmp_path, rows), "--output", output) == 2
    assert "none of its 2 rows" in capsys.readouterr().err
    assert not list(tmp_path.glob("scores*"))


@pytest.mark.parametrize(
    ("row", "ids"),
    [
        ({"completion": "the film"}, "text and end"),
        ({"completion": "the film", "ended": "eos"}, "text and end"),
        ({"completion": "the film", "ended": "length"}, "text"),
        ({"completion": "", "ended": "eos"}, "end"),
        ({"token_ids": [9, 10, 1]}, [9, 10, 1]),
        ({"completion_ids": [9, 10]}, [9, 10]),
        ({"token_ids": "[9, 10]"}, [9, 10]),
        ({"completion": [{"role": "assistant", "content": "the film"}]}, "text and end"),
    ],
)
def test_how_a_completion_ended_and_which_tokens_it_has(adapter: str, row: dict[str, Any], ids: Any) -> None:
    tokenizer = tiny_models.tokenizer()
    text = tokenizer("the film")["input_ids"]
    expected = {"text and end": [*text, tokenizer.eos_token_id], "text": text, "end": [tokenizer.eos_token_id]}
    (line,) = llm_dqn.score(adapter, [{"prompt": "i hated", **row}], rewards=[])
    assert line["token_ids"] == (expected[ids] if isinstance(ids, str) else ids)
    assert line["ended"] == ("eos" if line["token_ids"][-1] == tokenizer.eos_token_id else "length")


def test_conversations(tiny_chat_path: str, rewards: str) -> None:
    """The prompt is rendered by the chat template; rewards see messages, as TRL's do."""
    asked = [{"role": "user", "content": "hello"}]
    rows: list[dict[str, Any]] = [
        {"prompt": asked, "completion": [{"role": "assistant", "content": " the film"}]},
        {"prompt": asked, "completion": " the film"},
    ]
    found = list(llm_dqn.score(tiny_chat_path, rows, rewards=[f"{rewards}:spoken"]))
    plain = [{"prompt": "<|user|>hello<eos><|assistant|>", "completion": " the film"}]
    (same,) = llm_dqn.score(tiny_chat_path, plain, rewards=[])
    for line in found:
        assert line["prompt"] == asked and line["completion"] == " the film"
        assert line["reward"] == 1 + len(" the film")
        assert line["base_ranks"] == same["base_ranks"] and line["token_ids"] == same["token_ids"]


# --- rewards ------------------------------------------------------------------------------------------------------


def test_a_reward_that_fails_costs_the_row_it_fails_on(
    adapter: str, rewards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scores.jsonl"
    files = ["--input", jsonl(tmp_path, ROWS), "--output", output]
    assert command(adapter, *files, "--rewards", f"{rewards}:picky") == 0
    said = capsys.readouterr()
    assert "line 2" in said.err and "no noise" in said.err and "1 rows left out" in said.out
    assert [line["prompt"] for line in lines_of(output)] == ["the film was", "3 of 10"]


def test_a_reward_that_always_fails_ends_the_run(
    adapter: str, rewards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--input", jsonl(tmp_path, ROWS), "--output", tmp_path / "scores.jsonl"]
    assert command(adapter, *files, "--rewards", f"{rewards}:broken") == 1
    assert "not today" in capsys.readouterr().err
    with pytest.raises(RunError, match="not today"):
        list(llm_dqn.score(adapter, ROWS[:1], rewards=[f"{rewards}:broken"]))


def test_columns_reach_the_rewards_also_where_rows_lack_them(adapter: str, rewards: str) -> None:
    rows = [ROWS[0], {"prompt": "i hated", "completion": " it"}]
    found = list(llm_dqn.score(adapter, rows, rewards=[f"{rewards}:wanted_letters"], batch_size=1))
    assert [line["reward"] for line in found] == [1.0, None]
    with pytest.raises(UserError, match="'wanted'"):
        llm_dqn.score(adapter, rows[1:], rewards=[f"{rewards}:wanted_letters"])


def test_functions_of_a_script_are_rewards(adapter: str) -> None:
    def length(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    found = list(llm_dqn.score(adapter, ROWS, rewards=[length]))
    assert [line["rewards"] for line in found] == [{"length": float(len(row["completion"]))} for row in ROWS]


# --- what is wrong at once ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.jsonl", None, "does not exist"),
        ("rows.txt", "x", "known are .jsonl"),
        ("rows.jsonl", "", "has no rows"),
        ("rows.jsonl", "no json\n", "no row that can be read"),
        ("rows.jsonl", '{"promt": "a", "completion": "b"}\n', "no column 'prompt'; did you mean promt"),
        ("rows.jsonl", '{"prompt": "a", "answer": "b"}\n', "no column 'completion'"),
        ("rows.parquet", "PAR1 no", "not a readable parquet file"),
        ("rows.csv", "prompt,completion\n", "has no rows"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_before_the_model_is_loaded(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str | None,
    reason: str,
    tiny_llama_path: str,
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    assert command(tiny_llama_path, "--input", tmp_path / name, "--output", tmp_path / "scores.jsonl") == 2
    said = capsys.readouterr().err
    assert reason in said and "Loading" not in said
    assert not list(tmp_path.glob("scores*"))


def test_an_output_that_cannot_be_written_is_told_first(
    adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = jsonl(tmp_path, ROWS)
    for output, reason in ((file, "the input itself"), (tmp_path, "is a folder"), (tmp_path / "a" / "b", "not exist")):
        assert command(adapter, "--input", file, "--output", output) == 2
        assert reason in capsys.readouterr().err
        assert command(adapter, "--input", file, "--output", tmp_path / "s.jsonl", "--html", output) == 2
        assert reason in capsys.readouterr().err
    assert lines_of(file) == ROWS


def test_what_was_finished_is_kept_when_scoring_ends_early(
    adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_files, "WINDOW_ROWS", 2)
    monkeypatch.setattr(score_files, "_READ_TOGETHER", 1)
    output = tmp_path / "scores.jsonl"
    output.write_text("an earlier file\n")
    file = jsonl(tmp_path, [*ROWS, "no json"])
    assert command(adapter, "--input", file, "--output", output, "--strict") == 2
    assert output.read_text() == "an earlier file\n"
    assert [line["prompt"] for line in lines_of(tmp_path / "scores.jsonl.partial")] == ["the film was", "i hated"]
    assert "scores.jsonl.partial keeps the lines that were finished" in capsys.readouterr().err


def test_settings_that_make_no_sense_are_refused(adapter: str) -> None:
    with pytest.raises(UserError, match="batch_size"):
        llm_dqn.score(adapter, ROWS, batch_size=0)
    with pytest.raises(UserError, match="holds no rows"):
        llm_dqn.score(adapter, {"prompt": "a"})
