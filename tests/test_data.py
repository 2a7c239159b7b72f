import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from llm_dqn.data import LoggedRow, PromptStream, hold_out, load_logged, load_prompts
from llm_dqn.errors import UserError
from llm_dqn.types import Prompt
from tests import tiny_models
from tests.test_models import word_tokenizer

ROWS = [
    {"prompt": "the film was", "answer": 1},
    {"prompt": "i hated, the", "answer": 2},
    {"prompt": 'a "dull"', "answer": 3},
]
CHAT = [{"role": "user", "content": "hello!"}]


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(rows).to_csv(path, index=False)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def load(source: Any, tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[Prompt]:
    return load_prompts(source, tokenizer=tokenizer, **options)


def prompts_of(*texts: str) -> list[Prompt]:
    return [Prompt(text, text, [ord(letter) for letter in text]) for text in texts]


# --- sources --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_prompts(
    suffix: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = load(write(tmp_path / f"data{suffix}", ROWS), tokenizer)
    assert [prompt.prompt for prompt in prompts] == [row["prompt"] for row in ROWS]
    assert [int(prompt.columns["answer"]) for prompt in prompts] == [1, 2, 3]
    for prompt in prompts:
        assert prompt.text == prompt.prompt == tokenizer.decode(prompt.ids)


def test_rows_in_memory_and_data_sets(tokenizer: PreTrainedTokenizerFast) -> None:
    expected = load(ROWS, tokenizer)
    assert load(datasets.Dataset.from_list(ROWS), tokenizer) == expected
    assert load((row for row in ROWS), tokenizer) == expected


def test_saved_data_set_and_its_splits(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    whole = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:1]))
    whole.save_to_disk(tmp_path / "saved")
    assert len(load(str(tmp_path / "saved"), tokenizer, split="test")) == 1
    with pytest.raises(UserError, match=r"has no split 'tset'; did you mean test\? \(splits: train, test\)"):
        load(str(tmp_path / "saved"), tokenizer, split="tset")


def test_folder_of_files(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    assert len(load(str(tmp_path), tokenizer)) == 3


def test_other_prompt_column_and_missing_values(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"question": "the film", "answer": 1}, {"question": "a dull"}]
    prompts = load(rows, tokenizer, prompt_column="question")
    assert [prompt.columns for prompt in prompts] == [{"answer": 1}, {"answer": None}]


def test_missing_files(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write(tmp_path / "prompts_train.jsonl", ROWS)
    with pytest.raises(UserError, match=r"prompts_trian\.jsonl' does not exist; did you mean prompts_train\.jsonl\?"):
        load(str(tmp_path / "prompts_trian.jsonl"), tokenizer)
    with pytest.raises(UserError, match=r"'\./nowhere' does not exist"):
        load("./nowhere", tokenizer)
    with pytest.raises(UserError, match="'nobody/nothing' is neither a local file nor reachable on the Hub"):
        load("nobody/nothing", tokenizer)
    (tmp_path / "notes.docx").write_text("x")
    with pytest.raises(UserError, match=r"ends in '\.docx'; known are \.jsonl, \.json, \.csv, \.parquet"):
        load(str(tmp_path / "notes.docx"), tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": \n', r"line 2: not valid JSON"),
        ("a.jsonl", b'{"prompt": "x"}\n"text"\n', r"row 2: expected an object with named fields, got 'text'"),
        ("a.jsonl", b"\n\n", r"has no rows"),
        ("a.jsonl", b'{"prompt": "\xff"}\n', r"is not UTF-8 text"),
        ("a.json", b'{"prompt": "x"}\n{"prompt": "y"}\n', r"line 2: not valid JSON .* name the file \.jsonl"),
        ("a.json", b'{"prompt": "x"}', r"holds dict; expected a list of objects"),
        ("a.csv", b"prompt,answer\nhello, you,3\n", r"line 2: the row does not have 2 fields like the header"),
        ("a.csv", b"prompt,answer\n", r"has no rows"),
        ("a.parquet", b"no parquet", r"is not a readable parquet file"),
    ],
)
def test_damaged_files(
    name: str, content: bytes, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load(str(tmp_path / name), tokenizer)
    assert name in str(caught.value)


def test_wrong_things_in_memory(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="a dict with the keys train, test; give one split"):
        load({"train": ROWS, "test": ROWS}, tokenizer)
    with pytest.raises(UserError, match="the data is the given int"):
        load(3, tokenizer)
    with pytest.raises(UserError, match="the given list has no rows"):
        load([], tokenizer)


# --- prompts --------------------------------------------------------------------------------


def test_missing_column(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"no column 'promt'; did you mean prompt\? \(columns: prompt, answer"):
        load(ROWS, tokenizer, prompt_column="promt")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (None, r"row 2: column 'prompt' is empty \(None\)"),
        ("", r"row 2: column 'prompt' is empty \(''\)"),
        (7, r"row 2: column 'prompt' is int \(7\); expected text or a list of messages"),
        (CHAT, r"row 2: column 'prompt' is a conversation but row 1 is plain text"),
    ],
)
def test_prompts_that_are_none(second: Any, message: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=message):
        load([{"prompt": "the film"}, {"prompt": second}], tokenizer)


def test_prompt_beyond_the_vocabulary() -> None:
    tokenizer = word_tokenizer(eos_token="</s>", unk_token="<unk>")
    assert load([{"prompt": "a b zzz"}], tokenizer)[0].ids == [1, 2, 0]
    with pytest.raises(UserError, match=r"row 1: .* consists of tokens unknown to this tokenizer"):
        load([{"prompt": "zzz yyy"}], tokenizer)
    with pytest.raises(UserError, match=r"row 1: .* has no tokens for this tokenizer"):
        load([{"prompt": "   "}], tokenizer)


def test_appended_eos_is_taken_off_and_bos_kept() -> None:
    tokenizer = tiny_models.tokenizer()
    plain = load([{"prompt": "the film<eos>"}], tokenizer)[0].ids
    assert plain[-1] == tokenizer.eos_token_id  # written by the user, so it stays
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
    )
    ids = load([{"prompt": "the film<eos>"}], tokenizer)[0].ids
    assert ids == [tokenizer.bos_token_id, *plain]


def test_conversations_are_rendered(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = load([{"prompt": CHAT}], chat_tokenizer)[0]
    assert prompt.prompt == CHAT
    assert prompt.text == "<|user|>hello!<eos><|assistant|>"
    assert prompt.ids == chat_tokenizer(prompt.text, add_special_tokens=False).input_ids


def test_conversation_that_ends_with_the_assistant_goes_on(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    begun = [*CHAT, {"role": "assistant", "content": "The answer is"}]
    assert load([{"prompt": begun}], chat_tokenizer)[0].text.endswith("<|assistant|>The answer is")


def test_conversation_without_template(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="the tokenizer has no chat template; use a chat model"):
        load([{"prompt": CHAT}], tokenizer)


@pytest.mark.parametrize("message", ["hello", {"role": "user"}, {"role": 3, "content": "x"}])
def test_malformed_messages(message: Any, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="row 2: column 'prompt', message 2: expected"):
        load([{"prompt": CHAT}, {"prompt": [*CHAT, message]}], chat_tokenizer)


def test_template_that_refuses(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    strict = tiny_models.tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"row 1: the tokenizer's chat template refuses .*roles must alternate"):
        load([{"prompt": CHAT}], strict)


# --- length --------------------------------------------------------------------------------


def test_too_long_prompts(tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "the"}, {"prompt": "the plot and the noise and the film"}]
    length = len(tokenizer(rows[1]["prompt"]).input_ids)
    with pytest.raises(
        UserError, match=rf"row 2: the prompt has {length} tokens, more than max_prompt_length=4; 1 of 2"
    ):
        load(rows, tokenizer, max_prompt_length=4)
    assert [prompt.text for prompt in load(rows, tokenizer, max_prompt_length=4, too_long="drop")] == ["the"]
    assert "1 of 2 prompts over max_prompt_length=4 dropped" in caplog.text
    short = load(rows, tokenizer, max_prompt_length=4, too_long="truncate")[1]
    assert short.ids == tokenizer(rows[1]["prompt"]).input_ids[-4:]
    assert rows[1]["prompt"].endswith(short.text)
    assert short.prompt == short.text  # rewards see what the model continued
    assert "shortened at their start" in caplog.text
    with pytest.raises(UserError, match=r"no prompt has at most 1 tokens \(max_prompt_length=1\)"):
        load(rows[1:], tokenizer, max_prompt_length=1, too_long="drop")
    with pytest.raises(UserError, match="too_long: 'cut' is not one of"):
        load(rows, tokenizer, too_long="cut")


def test_the_start_of_long_prompts_can_be_kept(
    tokenizer: PreTrainedTokenizerFast, chat_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "the"}, {"prompt": "the plot and the noise and the film"}]
    whole, short = load(rows, tokenizer, max_prompt_length=4, too_long="keep_start")
    assert whole.text == "the"
    assert short.ids == tokenizer(rows[1]["prompt"]).input_ids[:4]
    assert rows[1]["prompt"].startswith(short.text) and short.prompt == short.text
    assert "1 of 2 prompts over max_prompt_length=4 shortened at their end" in caplog.text
    with pytest.raises(UserError, match="row 1: too_long: keep_start would cut a conversation off"):
        load([{"prompt": CHAT}], chat_tokenizer, max_prompt_length=4, too_long="keep_start")


@pytest.mark.parametrize("rule", ["truncate", "keep_start"])
def test_shortened_prompt_keeps_its_bos(rule: str) -> None:
    tokenizer = tiny_models.tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    prompt = load([{"prompt": "the plot and the noise"}], tokenizer, max_prompt_length=3, too_long=rule)[0]
    assert prompt.ids[0] == tokenizer.bos_token_id
    assert len(prompt.ids) == 3
    assert "<bos>" not in prompt.text


# --- stream --------------------------------------------------------------------------------


def test_stream_visits_each_prompt_once_an_epoch_in_a_new_order() -> None:
    stream = PromptStream(prompts_of(*"abcdefgh"), seed=0)
    epochs = ["".join(prompt.text for prompt in stream.next_batch(8)) for _ in range(4)]
    assert all(sorted(epoch) == sorted("abcdefgh") for epoch in epochs)
    assert len(set(epochs)) == 4


def test_stream_repeats_generations_in_a_row() -> None:
    texts = [prompt.text for prompt in PromptStream(prompts_of(*"abc"), seed=0, num_generations=2).next_batch(3)]
    assert texts[::2] == texts[1::2]
    assert len(set(texts)) == 3


def test_ranks_share_an_epoch_across_its_border() -> None:
    ranks = [PromptStream(prompts_of(*"abcdefg"), seed=3, rank=rank, world_size=2) for rank in range(2)]
    seen = Counter(prompt.text for _ in range(7) for rank in ranks for prompt in rank.next_batch(2))
    assert seen == Counter(dict.fromkeys("abcdefg", 4))
    alone = PromptStream(prompts_of(*"abcdefg"), seed=3)
    ranks = [PromptStream(prompts_of(*"abcdefg"), seed=3, rank=rank, world_size=2) for rank in range(2)]
    together = [prompt.text for rank in ranks for prompt in rank.next_batch(5)]
    assert together == [prompt.text for prompt in alone.next_batch(10)]


def test_stream_ignores_global_random_state_and_resumes_exactly() -> None:
    stream = PromptStream(prompts_of(*"abcdefg"), seed=1)
    stream.next_batch(10)
    state = json.loads(json.dumps(stream.state_dict()))
    rest = [prompt.text for prompt in stream.next_batch(20)]
    fresh = PromptStream(prompts_of(*"abcdefg"), seed=1)
    fresh.load_state_dict(state)
    assert [prompt.text for prompt in fresh.next_batch(20)] == rest
    assert PromptStream(prompts_of(*"abcdefg"), seed=2).next_batch(7) != PromptStream(
        prompts_of(*"abcdefg"), seed=1
    ).next_batch(7)


def test_stream_of_other_data_does_not_resume() -> None:
    state = PromptStream(prompts_of(*"abc"), seed=1).state_dict()
    with pytest.raises(UserError, match="has 2 prompts but had 3"):
        PromptStream(prompts_of(*"ab"), seed=1).load_state_dict(state)
    with pytest.raises(UserError, match="no prompts"):
        PromptStream([], seed=0)


def test_hold_out_never_shares_a_text() -> None:
    prompts = prompts_of(*"aabbccddee")
    train, held = hold_out(prompts, 2, seed=0)
    assert len(held) == 2
    assert len(train) == 6
    assert not {prompt.text for prompt in train} & {prompt.text for prompt in held}
    assert hold_out(prompts, 2, seed=0) == (train, held)
    assert any(hold_out(prompts, 2, seed=seed)[1] != held for seed in range(1, 6))
    with pytest.raises(UserError, match="cannot hold out 5 of 5 different prompts"):
        hold_out(prompts, 5, seed=0)


# --- logged completions --------------------------------------------------------------------------------

LOGGED = {"prompt": "the film", "completion": " was a joy", "reward": 1}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_logged_rows(suffix: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / f"log{suffix}", [LOGGED | {"ended": "eos"}, LOGGED | {"reward": -0.5, "ended": "length"}])
    ended, cut = load_logged(path, tokenizer)
    ids = tokenizer(" was a joy").input_ids
    assert isinstance(ended, LoggedRow)
    assert (ended.completion, ended.completion_ids, ended.reward) == (" was a joy", [*ids, tokenizer.eos_token_id], 1.0)
    assert (cut.completion_ids, cut.reward, cut.ended) == (ids, -0.5, "length")
    assert ended.prompt.columns == {}


def test_logged_rows_end_by_themselves_unless_said(tokenizer: PreTrainedTokenizerFast) -> None:
    row = load_logged([LOGGED | {"source": "x"}], tokenizer)[0]
    assert row.ended == "eos"
    assert row.prompt.columns == {"source": "x"}
    empty = load_logged([LOGGED | {"completion": ""}], tokenizer)[0]
    assert empty.completion_ids == [tokenizer.eos_token_id]


def test_logged_conversation(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    said = [{"role": "assistant", "content": "yes"}]
    assert load_logged([{"prompt": CHAT, "completion": said, "reward": 1}], chat_tokenizer)[0].completion == "yes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": None}, r"row 2: column 'reward' is None; expected a finite number"),
        ({"reward": float("nan")}, r"row 2: column 'reward' is nan"),
        ({"reward": float("inf")}, r"row 2: column 'reward' is inf"),
        ({"reward": True}, r"row 2: column 'reward' is True"),
        ({"reward": "good"}, r"row 2: column 'reward' is 'good'"),
        ({"completion": None}, r"row 2: column 'completion' is NoneType; expected text"),
        ({"ended": "stop"}, r"row 2: column 'ended' is 'stop'; expected 'eos' or 'length'"),
        ({"completion": "", "ended": "length"}, r"row 2: the completion is empty and did not end"),
        ({"prompt": ""}, r"row 2: column 'prompt' is empty"),
    ],
)
def test_wrong_logged_rows(change: dict, message: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=message):
        load_logged([LOGGED, LOGGED | change], tokenizer)


def test_logged_columns_are_required(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"no column 'reward'; did you mean rewards\?"):
        load_logged([{"prompt": "a", "completion": "b", "rewards": 1}], tokenizer)


def test_long_logged_completions(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [LOGGED, LOGGED | {"completion": "a" * 100}]
    with pytest.raises(UserError, match=r"row 2: the completion has 101 tokens, more than max_completion_length=9"):
        load_logged(rows, tokenizer, max_completion_length=9)
    assert len(load_logged(rows, tokenizer, max_completion_length=9, too_long="drop")) == 1
