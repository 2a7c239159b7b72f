"""Figures of an evaluation: on hand-made numbers, and of real runs through the command's own function."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from llm_dqn import DQNConfig, DQNTrainer, cli
from llm_dqn.errors import UserError
from llm_dqn.evaluation import (
    base_and_tuned,
    mean_and_interval,
    measure,
    perplexity,
    prompt_numbers,
    side_by_side,
    win,
)
from llm_dqn.inference import evaluate_run
from llm_dqn.references import against_references, bleu, references_of, what_is_missing, word_error_rate
from llm_dqn.statistics import bootstrap_interval, distinct_n
from llm_dqn.types import Episode, Prompt
from tests.networks import episode, lora, network, prompts, shake, writer

Judged = list[Episode | None]


# --- intervals ----------------------------------------------------------------------------------------------------


def test_a_win_counts_one_and_a_tie_half():
    pairs = [(episode([1], [2], b), episode([1], [2], t)) for b, t in ((0, 1), (0, 1), (1, 0), (1, 1))]
    assert [win(b, t) for b, t in pairs] == [1.0, 1.0, 0.0, 0.5]


def test_bootstrap_interval_covers_the_mean_and_shrinks_with_the_sample():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * 2.0 / 20, rel=0.15)
    assert bootstrap_interval(np.array([1.0, 1.0])) == [1.0, 1.0]
    assert bootstrap_interval(np.array([])) is None


def test_completions_of_one_prompt_are_drawn_together():
    """Two prompts, all of the one good and all of the other bad: their mean is 0, 1/2 or 1, however many each has."""
    values, clusters = np.repeat([0.0, 1.0], 100), np.repeat([7, 3], 100)
    assert bootstrap_interval(values, clusters) == [0.0, 1.0]
    low, high = bootstrap_interval(values)
    assert 0.4 < low < high < 0.6
    # three completions at 0 and one at 1: the mean of a resample is 0 / 6, 1 / 4 or 2 / 2
    assert bootstrap_interval(np.array([0.0, 0.0, 0.0, 1.0]), [0, 0, 0, 1]) == [0.0, 1.0]
    alone = np.random.default_rng(1).normal(size=50)
    assert bootstrap_interval(alone, list(range(50))) == bootstrap_interval(alone)


def test_the_interval_over_prompts_covers_the_truth_and_the_one_over_completions_does_not():
    """60 prompts whose means differ as much as the five completions of each: 95 % of intervals should hold the 0."""
    rng = np.random.default_rng(2)
    clusters = np.repeat(np.arange(60), 5)
    covered = {"prompts": 0, "completions": 0}
    for _ in range(150):
        values = rng.normal(size=60).repeat(5) + rng.normal(size=300)
        for name, groups in (("prompts", clusters), ("completions", None)):
            low, high = bootstrap_interval(values, groups, resamples=300)
            covered[name] += low < 0 < high
    assert covered["prompts"] >= 0.88 * 150
    assert covered["completions"] <= 0.80 * 150


def test_many_prompts_are_drawn_in_blocks(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(3).normal(size=40)
    whole = bootstrap_interval(values, resamples=1000)
    monkeypatch.setattr("llm_dqn.statistics.BLOCK", 40 * 7)
    low, high = bootstrap_interval(values, resamples=1000)
    assert (low, high) == pytest.approx(tuple(whole), abs=0.03)


def test_equal_prompts_have_one_number_and_what_is_missing_is_left_out():
    asked = [Prompt(text, text, [1]) for text in ("a", "b", "a")]
    assert prompt_numbers(asked, 2) == [0, 1, 0, 0, 1, 0]
    assert mean_and_interval([0.0, None, 1.0], [0, 1, 2]) == (0.5, [0.0, 1.0])
    assert mean_and_interval([None, None], [0, 1]) == (None, None)


def test_distinct_n_and_perplexity():
    assert distinct_n([[1, 2, 1, 2], [1, 2]], 2) == pytest.approx(2 / 4)
    assert distinct_n([[1, 2, 1, 2], [1, 2]], 1) == pytest.approx(2 / 6)
    assert distinct_n([[1]], 2) == 0.0
    assert perplexity([torch.tensor([0.25, 0.5]).log(), torch.tensor([0.125]).log()]) == pytest.approx(4.0)


# --- base and tuned -----------------------------------------------------------------------------------------------


def first_token(episodes: Sequence[Episode]) -> Judged:
    """The number of the first token as reward: what was written first decides."""
    return [replace(e, reward=float(e.completion_ids[0])) for e in episodes]


def test_base_and_tuned_are_measured_by_who_wrote(tiny_llama_path):
    net = network(tiny_llama_path)
    write, asked = writer(net, tiny_llama_path), prompts(tiny_llama_path) * 8
    before = measure(write, asked, first_token, [0]).figures
    same = measure(write, asked, first_token, [0], base=True).figures
    assert before["reward_greedy"] == same["reward_greedy"] and before["kl"] == pytest.approx(0, abs=1e-6)
    shake(net, 0.5)
    tuned = measure(write, asked, first_token, [0]).figures
    assert measure(write, asked, first_token, [0], base=True).figures == same
    assert tuned["reward_greedy"] != same["reward_greedy"] and tuned["kl"] > 0.05
    assert tuned["perplexity"] > same["perplexity"]


def test_pairs_are_matched_by_position_not_by_text(tiny_llama_path):
    """Rewards rise along a data set with every prompt twice; the tuned one is always just above its own partner."""
    asked = prompts(tiny_llama_path) * 2
    calls: list[int] = []

    def judge(episodes: list[Episode]) -> Judged:
        calls.append(len(episodes))
        ahead = 0.5 if len(calls) > 2 else 0.0  # base sampled, base greedy, tuned sampled, tuned greedy
        return [replace(e, reward=index + ahead) for index, e in enumerate(episodes)]

    report, pairs = base_and_tuned(writer(network(tiny_llama_path), tiny_llama_path), asked, judge, [0])
    assert report["win_rate"] == 1.0 and report["win_rate_ci"] == [1.0, 1.0]
    assert [t.reward - b.reward for b, t in pairs] == [0.5] * len(asked)
    assert all(b.prompt == t.prompt for b, t in pairs)


def test_several_seeds_are_pooled_and_shown_apart(tiny_llama_path):
    net = network(tiny_llama_path)
    shake(net, 0.5)
    write, asked = writer(net, tiny_llama_path), prompts(tiny_llama_path)
    report, pairs = base_and_tuned(write, asked, first_token, [3, 5])
    assert report["seeds"] == [3, 5] and len(pairs) == 2 * len(asked)
    alone = [base_and_tuned(write, asked, first_token, [seed])[0] for seed in (3, 5)]
    for side in ("base", "tuned"):
        by_seed = [one[side]["reward"] for one in alone]
        assert report[side]["reward_by_seed"] == by_seed and by_seed[0] != by_seed[1]
        assert report[side]["reward"] == pytest.approx(np.mean(by_seed))
        assert report[side]["reward_greedy"] == alone[0][side]["reward_greedy"]
        assert report[side]["prompts"] == len(asked) and "reward_by_seed" not in alone[0][side]
        assert report[side]["distinct_2"] == pytest.approx(np.mean([one[side]["distinct_2"] for one in alone]))
    rewards = np.array([tuned.reward for _, tuned in pairs])
    assert report["tuned"]["reward_ci"] == bootstrap_interval(rewards, [0, 1, 2, 3] * 2)


def test_pairs_are_shown_side_by_side():
    asked = replace(episode([1], [2], 0.25), prompt=[{"role": "user", "content": "How?"}], completion="bad")
    pairs = [(asked, replace(asked, completion="good", reward=0.75)), (episode([1], [2]), episode([1], [2]))]
    shown = {"prompt": "How?", "base": "bad", "base_reward": 0.25, "tuned": "good", "tuned_reward": 0.75}
    assert side_by_side(pairs, count=1) == [shown]
    assert [row["prompt"] for row in side_by_side(pairs)] == ["How?", "p"]


# --- rewards that have nothing to say -----------------------------------------------------------------------------


def no_constants(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_some_abstentions_are_left_out_and_told(tiny_llama_path):
    def judge(episodes: list[Episode]) -> Judged:
        return [None if index % 4 == 0 else replace(e, reward=1.0) for index, e in enumerate(episodes)]

    asked = prompts(tiny_llama_path) * 2
    report, pairs = base_and_tuned(writer(network(tiny_llama_path), tiny_llama_path), asked, judge, [0])
    assert (report["base"]["reward"], report["base"]["abstained"], len(pairs)) == (1.0, 2, 6)
    assert report["notes"] == [
        f"every reward abstained on 2 of 8 completions of the {side} model: left out" for side in ("base", "tuned")
    ]


def test_a_run_whose_rewards_abstain_on_everything_held_out_ends_with_valid_json(
    tiny_llama_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def judge(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return [None if "held" in p else float(len(c)) for p, c in zip(prompts, completions, strict=True)]

    rows = [{"prompt": f"the film {number}"} for number in range(8)]
    held = Dataset.from_list([{"prompt": "held one"}, {"prompt": "held two"}])
    small = {"max_completion_length": 4, "prompts_per_collect": 4, "learning_starts": 4, "capacity": 32}
    args = DQNConfig(
        output_dir=str(tmp_path / "run"), max_steps=1, eval_steps=1, final_beta_scales=[2.0], logging_steps=1, **small
    )
    DQNTrainer(tiny_llama_path, judge, args, Dataset.from_list(rows), eval_dataset=held, peft_config=lora()).train()
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text(), parse_constant=no_constants)
    for side in (report["base"], report["tuned"]):
        assert side["reward"] is side["reward_ci"] is side["reward_greedy"] is None
        assert side["abstained"] == 2 and side["length"] > 0 and side["perplexity"] > 1
    assert report["win_rate"] is report["win_rate_ci"] is None
    assert [point["reward"] for point in report["strength"]] == [None] * 3
    note = "every reward abstained on all 2 completions of the tuned model: nothing to compare"
    assert note in report["notes"] and note in " ".join(capsys.readouterr().out.split())
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1], parse_constant=no_constants)
    assert "eval/reward" not in line and "nonfinite_values" not in line


# --- against references -------------------------------------------------------------------------------------------


def test_bleu_by_hand():
    """5/6, 4/5, 3/4 and 2/3 of the n-grams of six words are in a reference of eight: (1/3)^(1/4) exp(1 - 8/6)."""
    assert bleu(["a b c d e x"], [["a b c d e f g h"]]) == pytest.approx(100 * (1 / 3) ** 0.25 * np.exp(-1 / 3))
    two = bleu(["a b c d e x", "k l m n o"], [["a b c d e f g h"], ["z", "k l m n o"]])  # the second has two references
    precisions = (5 + 5) / 11 * (4 + 4) / 9 * (3 + 3) / 7 * (2 + 2) / 5
    assert two == pytest.approx(100 * precisions**0.25 * np.exp(1 - (8 + 5) / 11))


def test_word_error_rate_by_hand():
    assert word_error_rate(["the cat sit on mat"], [["the cat sat on the mat"]]) == pytest.approx(2 / 6)
    texts, wanted = ["the cat sit on mat", "a b c"], [["the cat sat on the mat"], ["x y z", "a b"]]
    assert word_error_rate(texts, wanted) == pytest.approx((2 + 1) / (6 + 2))  # of two references the closer one
    assert word_error_rate(["a b c d"], [["x"]]) == 4.0


def test_rows_without_a_reference_do_not_count():
    rows = [{"reference": "a b"}, {"reference": None}, {"reference": ["", "c d"]}, {"reference": 3}, {}]
    assert references_of(rows) == [["a b"], [], ["c d"], [], []]
    figures = against_references([" a b ", "x", "c d", "x", "x"], references_of(rows))
    assert figures["wer"] == 0.0 and set(figures) == {"bleu", "wer"}
    assert against_references(["x"], [[]]) == {} and what_is_missing([{"prompt": "p"}]) == []
    assert what_is_missing([{"reference": 3}])[0].startswith("the column 'reference' holds no text")


def test_figures_of_references_are_there_and_a_missing_library_is_told(
    tiny_llama_path: str, monkeypatch: pytest.MonkeyPatch
):
    write = writer(network(tiny_llama_path), tiny_llama_path)
    asked = [replace(prompt, columns={"reference": "a b c"}) for prompt in prompts(tiny_llama_path)]
    report, pairs = base_and_tuned(write, asked, first_token, [0])
    texts = [base.completion.strip() for base, _ in pairs]
    assert report["base"]["wer"] == word_error_rate(texts, [["a b c"]] * 4)
    assert {"bleu", "bleu_greedy", "wer_greedy"} <= set(report["tuned"]) and "notes" not in report
    monkeypatch.setattr("llm_dqn.references.find_spec", lambda name: None if name == "sacrebleu" else name)
    without, _ = base_and_tuned(write, asked, first_token, [0])
    assert without["notes"] == [
        "the data has a column 'reference' but sacrebleu is not installed, so there is no BLEU; "
        "pip install 'llm-dqn[text]'"
    ]
    assert "bleu" not in without["base"] and without["base"]["wer"] == report["base"]["wer"]


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copied(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained run, to be changed."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(trained_run, folder)
    return folder


def test_with_nothing_given_the_evaluation_of_the_run_comes_out_again(copied: Path):
    written = json.loads((copied / "evaluation.json").read_text())
    report, _ = evaluate_run(str(copied))
    assert set(report) == set(written) and (report["seeds"], report["split"]) == (written["seeds"], "validation")
    for side in ("base", "tuned"):
        assert report[side] == {name: pytest.approx(value, abs=1e-4) for name, value in written[side].items()}
    assert (report["win_rate"], report["win_rate_ci"]) == (written["win_rate"], written["win_rate_ci"])


def use(recipe: Path, old: str, new: str) -> None:
    text = recipe.read_text()
    assert text.count(old) == 1
    recipe.write_text(text.replace(old, new))


@pytest.fixture
def with_test_prompts(copied: Path, tmp_path: Path) -> Path:
    """The run, whose recipe names test prompts of their own."""
    folder = tmp_path / "run"
    shutil.copytree(copied, folder)
    rows = [{"prompt": text, "reference": "你好世界"} for text in ("问候：", "你好，请说：", "请问候：")]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    use(folder / "recipe.yaml", "  test: null", f"  test: {tmp_path / 'test.jsonl'}")
    return folder


def test_a_run_has_three_splits(with_test_prompts: Path, copied: Path):
    tested, pairs = evaluate_run(str(with_test_prompts), split="test", seeds=[0])
    assert tested["split"] == "test" and str(pairs[0][0].prompt) == "问候："
    assert tested["tuned"]["prompts"] == 3 and tested["tuned"]["wer"] >= 0
    train, _ = evaluate_run(str(copied), split="train", seeds=[0], max_prompts=5)
    assert train["split"] == "train" and train["tuned"]["prompts"] == 5
    with pytest.raises(
        UserError, match=r"names no test prompts \(data.test and data.test_split are null\); give --pro"
    ):
        evaluate_run(str(copied), split="test")
    with pytest.raises(UserError, match=r"--split validaton: .* validation, test, train; did you mean validation"):
        evaluate_run(str(copied), split="validaton")


def test_the_command_shows_seeds_and_writes_json(
    with_test_prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "report.json"
    options = ["--split", "test", "--seeds", "0,1,2", "--output", str(output)]
    with pytest.raises(SystemExit) as left:
        cli.main(["evaluate", str(with_test_prompts), *options])
    assert not left.value.code
    report = json.loads(output.read_text(), parse_constant=no_constants)
    assert report["seeds"] == [0, 1, 2] and len(report["tuned"]["reward_by_seed"]) == 3
    shown = capsys.readouterr().out
    for seed, (base, tuned) in enumerate(
        zip(report["base"]["reward_by_seed"], report["tuned"]["reward_by_seed"], strict=True)
    ):
        assert f"seed {seed}: reward {base:.3f} before, {tuned:.3f} after" in shown
    assert "word error rate, sampled" in shown and "distinct tokens" in shown


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seeds", "0,x", "--seeds 0,x: expected whole numbers with commas between, such as 0,1,2"),
        ("--seeds", "1,1", "--seeds 1,1: expected different whole numbers"),
        ("--beta-scales", "1;2", "--beta-scales 1;2: expected numbers with commas between"),
        ("--beta-scales", "nan", "--beta-scales nan: expected a finite number"),
    ],
)
def test_wrong_numbers_are_told_before_any_work(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as left:
        cli.main(["evaluate", "no/such/run", option, value])
    assert left.value.code == 2 and capsys.readouterr().err.startswith(message)


def test_a_reward_is_asked_once_for_each_completion(copied: Path, tmp_path: Path):
    """Sampled and greedy, base and tuned: four completions a prompt, and one more for each further strength."""
    (tmp_path / "counted.py").write_text(
        "seen = []\n\ndef counted(prompts, completions, **columns):\n"
        f"    open({str(tmp_path / 'seen')!r}, 'a').write('x' * len(completions))\n"
        "    return [0.0] * len(completions)\n"
    )
    evaluate_run(
        str(copied), reward_specs=[f"{tmp_path / 'counted.py'}:counted"], max_prompts=3, beta_scales=[0, 0.5, 1, 2]
    )
    assert len((tmp_path / "seen").read_text()) == 3 * (4 + 2)
