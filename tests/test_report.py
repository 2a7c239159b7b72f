"""The report says what the files say, whatever of them exists, and its verdicts follow from numbers."""

import json
import re
import shutil
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest

from llm_dqn import calibration, warning_signs
from llm_dqn.cli import main
from llm_dqn.console import Console
from llm_dqn.errors import RunError, UserError
from llm_dqn.report import draw, write_report
from llm_dqn.run_files import EVALUATION_SAMPLES, RunFiles, read_run
from tests.test_heatmap import HOSTILE, Spans

MEGABYTE = 2**20


def line(prompt: str, text: str, reward: float, side: str = "tuned", **more: Any) -> dict[str, Any]:
    """A score line with one token a word."""
    words = re.findall(r"\S+\s*", text)
    zeros = [0.0] * len(words)
    found = {"side": side, "prompt": prompt, "completion": text, "reward": reward, "rewards": {"f": reward}}
    found |= {"token_ids": [crc32(ascii(word).encode()) for word in words], "tokens": words, "ended": "eos"}
    return found | {"q_values": zeros, "values": [reward] * len(words), "advantages": zeros} | more


def figures(reward: float, half: float = 0.02, **more: float) -> dict[str, Any]:
    return {"reward": reward, "reward_ci": [reward - half, reward + half], "prompts": 20} | more


def evaluated(base: dict[str, Any], tuned: dict[str, Any]) -> dict[str, Any]:
    return {"base": base, "tuned": tuned, "win_rate": 0.75}


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", Spans(html).text)


# --- a real run -----------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_samples_and_its_report(trained_run: Path) -> None:
    rows = [json.loads(row) for row in (trained_run / EVALUATION_SAMPLES).read_text(encoding="utf-8").splitlines()]
    evaluation = json.loads((trained_run / "evaluation.json").read_text())
    assert [row["side"] for row in rows] == ["base", "tuned"] * evaluation["tuned"]["prompts"]
    for base, tuned in zip(rows[::2], rows[1::2], strict=True):
        assert base["prompt"] == tuned["prompt"]
    for side in ("base", "tuned"):
        mine = [row for row in rows if row["side"] == side]
        assert np.mean([row["reward"] for row in mine]) == pytest.approx(evaluation[side]["reward"])
        assert np.mean([len(row["tokens"]) for row in mine]) == pytest.approx(evaluation[side]["length"])
    # the base's advantages are no zeros: they are what the tuned network thinks of the base's texts
    assert any(abs(a) > 1e-4 for row in rows if row["side"] == "base" for a in row["advantages"])
    report = trained_run / "report.html"
    assert 20_000 < report.stat().st_size < MEGABYTE
    assert f"from {evaluation['base']['reward']:.3f}" in text_of(report.read_text()) or "No sure change" in (
        text_of(report.read_text())
    )
    metrics = [json.loads(row) for row in (trained_run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["replay/age"] <= row["step"] for row in metrics) and metrics[-1]["replay/age"] > 0


def test_the_screen_names_the_report(trained_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Console().where(trained_run)
    said = capsys.readouterr().out
    assert "report.html" in said and EVALUATION_SAMPLES in said


def test_the_command_prints_the_path(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "report.html"))
    main_exit(["report", str(run)])
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    same = (run / "report.html").read_bytes()
    write_report(run)
    assert (run / "report.html").read_bytes() == same == (trained_run / "report.html").read_bytes()


def main_exit(arguments: list[str]) -> int:
    try:
        main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_a_resumed_run_leaves_the_same_samples(trained_run: Path, tmp_path: Path) -> None:
    from llm_dqn.recipe import load_recipe
    from llm_dqn.trainer import DQNTrainer

    run = shutil.copytree(trained_run, tmp_path / "run")
    for name in ("report.html", EVALUATION_SAMPLES, "evaluation.json", "checkpoints/step-000048"):
        gone = run / name
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    recipe = load_recipe(run / "recipe.yaml", [f"train.output_dir={run}"])
    DQNTrainer.from_recipe(recipe).train(resume=True)
    assert (run / EVALUATION_SAMPLES).read_bytes() == (trained_run / EVALUATION_SAMPLES).read_bytes()
    assert (run / "report.html").exists()


# --- whatever there is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kept",
    [
        ["recipe.yaml"],
        ["metrics.jsonl"],
        ["evaluation.json"],
        ["recipe.yaml", "metrics.jsonl", "samples.jsonl"],
        ["recipe.yaml", "metrics.jsonl", "samples.jsonl", "evaluation.json"],
        ["recipe.yaml", EVALUATION_SAMPLES],
    ],
    ids=lambda kept: "+".join(kept),
)
def test_any_part_of_a_run_can_be_drawn(trained_run: Path, tmp_path: Path, kept: list[str]) -> None:
    for name in kept:
        shutil.copy(trained_run / name, tmp_path / name)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert ("Not finished" in html) == ("evaluation.json" not in kept)
    assert ('id="learning"' in html) == ("metrics.jsonl" in kept)
    assert ('class="heat"' in html) == (EVALUATION_SAMPLES in kept)
    assert "--beta-scales" in html


def test_a_line_being_written_is_left_out_and_said(trained_run: Path, tmp_path: Path) -> None:
    metrics = (trained_run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(metrics[:-1]) + metrics[-1][:40])
    samples = (trained_run / EVALUATION_SAMPLES).read_bytes().splitlines(keepends=True)
    (tmp_path / EVALUATION_SAMPLES).write_bytes(b"".join(samples[:5]) + b'{"side": "tuned", "prompt": "\xf0\x9f')
    (tmp_path / "samples.jsonl").write_text('broken\n[1]\n{"step": 1, "prompt": "p", "completion": "c"}\n')
    (tmp_path / "evaluation.json").write_text("{")
    run = read_run(tmp_path)
    assert len(run.metrics) == len(metrics) - 1 and len(run.base) == len(run.tuned) == 2
    said = text_of(draw(run))
    for told in ("last line of metrics.jsonl is incomplete", f"last line of {EVALUATION_SAMPLES} is incomplete"):
        assert told in said
    assert "2 lines of samples.jsonl cannot be read (the first is line 1)" in said
    assert "evaluation.json cannot be read" in said


@pytest.mark.parametrize("what", ["nowhere", "a file", "an empty folder"])
def test_no_run_folder_is_the_users_error(tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "place"
    if what == "a file":
        place.write_text("x")
    elif what == "an empty folder":
        place.mkdir()
    with pytest.raises(UserError, match=str(place)):
        write_report(place)
    assert main_exit(["report", str(place)]) == 2
    assert "RUN: " in capsys.readouterr().err


def test_a_report_that_cannot_be_written_leaves_nothing_behind(trained_run: Path, tmp_path: Path) -> None:
    shutil.copy(trained_run / "metrics.jsonl", tmp_path)
    (tmp_path / "report.html").mkdir()
    with pytest.raises(RunError, match="could not write"):
        write_report(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]


def test_long_runs_and_long_texts_stay_small() -> None:
    """50,000 lines of metrics, thousands of samples, completions of 3,000 tokens with alternatives."""
    names = ("rollout/reward", "train/td_loss", "train/q_taken", "train/td_target", "train/kl", "rollout/epsilon")
    metrics = [
        {"step": i, "scored_completions": 4 * i, "seconds": i / 3} | {name: float(np.sin(i / 999)) for name in names}
        for i in range(50_000)
    ]
    words = " ".join(f"w{i % 700}" for i in range(3_000))
    other = {"token": " another", "token_id": 5, "q_value": 0.123456, "base_probability": 0.4, "probability": 0.2}
    lines = [line(f"p{i}", words, float(i % 7), alternatives=[[other] * 3] * 3_000) for i in range(16)]
    base = [found | {"side": "base"} for found in lines]
    run = RunFiles("long", metrics=metrics, base=base, tuned=lines, evaluation=evaluated(figures(0.1), figures(0.5)))
    html = draw(run)
    assert len(html.encode()) < 3 * MEGABYTE
    assert "3,000 tokens, the first 1,500 shown" in html
    assert max(path.count("L") for path in re.findall(r'd="([^"]*)"', html)) < 1_000


@pytest.mark.parametrize("text", [*HOSTILE, "\x1b]0;evil\x07", "\u202eevil", "\ud800"])
def test_hostile_text_stays_text(text: str) -> None:
    """In prompts, completions, names of rewards, samples, recipe, notes and the name of the run."""

    def page(text: str) -> str:
        words = {"tokens": [text, " word", " word"], "rewards": {text: 0.5, "g": 0.0}}
        base = line(text, f"{text} word word", 0.25, side="base", **words)
        tuned = line(text, f"{text} word word", 0.5, **words)
        return draw(
            RunFiles(
                name=text,
                recipe_text=f"# {text}",
                recipe={"model": {"model_name_or_path": text}, "train": {"seed": text, "max_steps": 3}},
                versions=[text],
                metrics=[
                    {"step": i, "scored_completions": i, "rollout/reward": 0.5, f"rollout/reward/{text}": 0.5}
                    for i in (1, 2)
                ],
                samples=[{"step": 0, "prompt": text, "completion": text, "reward": 0.5}],
                evaluation=evaluated(figures(0.25, distinct_2=0.4), figures(0.5, distinct_2=0.4)) | {"notes": [text]},
                base=[base],
                tuned=[tuned],
                notes=[text],
            )
        )

    hostile = page(text)
    tags, usual = ([tag for tag in Spans(html).tags if tag != "i"] for html in (hostile, page("harmless")))
    assert tags == usual
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", hostile)
    hostile.encode()


# --- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "half", "headline"),
    [
        (0.4, 0.6, 0.02, "The reward rose from 0.400 to 0.600."),
        (0.6, 0.4, 0.02, "The reward fell from 0.600 to 0.400."),
        (0.4, 0.42, 0.02, "No sure change: reward 0.400 before, 0.420 after."),
        (-0.4, -0.9, 0.2, "The reward fell from −0.400 to −0.900."),
    ],
)
def test_the_headline_says_what_changed_and_not_more(before: float, after: float, half: float, headline: str) -> None:
    html = draw(RunFiles("r", evaluation=evaluated(figures(before, half), figures(after, half))))
    assert headline in html


def test_pairs_decide_how_sure_the_change_is() -> None:
    """Between prompts rewards differ widely, within pairs hardly: only pairs can tell."""
    rewards = np.linspace(0, 1, 40)
    sides = [[line(f"p{i}", "a b c", float(r + shift), side=side) for i, r in enumerate(rewards)]
             for side, shift in (("base", 0.0), ("tuned", 0.05))]  # fmt: skip
    evaluation = evaluated(figures(0.5, 0.1), figures(0.55, 0.1))
    assert "No sure change" in draw(RunFiles("r", evaluation=evaluation))
    html = draw(RunFiles("r", evaluation=evaluation, base=sides[0], tuned=sides[1]))
    assert "The reward rose" in html and "scores +0.050 (95 % interval +0.050 to +0.050)" in html
    assert "better in 40 of 40 pairs, worse in 0 and equal in 0" in html


def test_strength_is_drawn_where_it_was_measured() -> None:
    points = [
        {"beta_scale": b, "reward": b / 2, "reward_ci": [b / 2 - 0.1, b / 2 + 0.1], "kl": b * b} for b in (0, 1, 2)
    ]
    points.append({"beta_scale": 3, "reward": None, "reward_ci": None, "kl": 9.0})
    html = draw(RunFiles("r", evaluation=evaluated(figures(0.0), figures(0.5)) | {"strength": points}))
    assert "What distance buys" in html and "has not been measured" not in html
    assert 'data-x="0 1 2"' in html and 'data-y="0 1 4"' in html


# --- calibration ----------------------------------------------------------------------------------------------------


def test_the_return_after_each_token() -> None:
    """R less the advantages from here on for soft values, discounted R for hard ones."""
    made = line("p", "a b c", 1.0, values=[0.5, 0.5, 0.5], advantages=[0.1, -0.2, 0.3])
    soft = calibration.predictions([made], soft=True, gamma=1.0)
    assert sorted(soft.realised) == pytest.approx(sorted([1 - 0.1 + 0.2 - 0.3, 1 + 0.2 - 0.3, 1 - 0.3]))
    assert soft.realised[np.argmin(soft.position)] == pytest.approx(0.8)
    hard = calibration.predictions([made], soft=False, gamma=0.5)
    assert list(hard.realised[np.argsort(hard.position)]) == [0.25, 0.5, 1.0]
    discounted = calibration.predictions([made], soft=True, gamma=0.5)
    last, middle = 1 - 0.3, 0.5 * 0.7 + 0.2
    assert sorted(discounted.realised) == pytest.approx(sorted([last, middle, 0.5 * middle - 0.1]))


def test_right_values_lie_on_the_diagonal_and_wrong_ones_beside() -> None:
    rng = np.random.default_rng(0)
    lines = [line(f"p{i}", "a b c d e f", float(r)) for i, r in enumerate(rng.uniform(size=60))]
    right = calibration.predictions(lines, soft=True, gamma=1.0)
    assert right.error == pytest.approx(0) and right.bias == pytest.approx(0)
    assert right.blind_error == pytest.approx(np.std([found["reward"] for found in lines]))
    for predicted, realised, (low, high) in calibration.reliability(right):
        assert predicted == pytest.approx(realised) and low <= realised <= high
    high_by = [found | {"values": [v + 0.25 for v in found["values"]]} for found in lines]
    assert calibration.predictions(high_by, True, 1.0).bias == pytest.approx(0.25)
    assert [len(part) for part in calibration.by_fifth(right)] == [60, 60, 120, 60, 60]
    assert len(calibration.predictions([lines[0] | {"reward": None}], True, 1.0)) == 0


# --- warning signs --------------------------------------------------------------------------------------------------


def sides(texts: list[str], before: list[str] | None = None, reward: float = 0.5) -> tuple[list, list]:
    before = before or [f"the {i} quick brown fox number {i} runs" for i in range(len(texts))]
    return (
        [line(f"p{i}", text, reward, side="base") for i, text in enumerate(before)],
        [line(f"p{i}", text, reward) for i, text in enumerate(texts)],
    )


@pytest.mark.parametrize(
    ("after", "level"), [(20, "fine"), (23, "fine"), (28, "look"), (11, "look"), (60, "alarm"), (4, "alarm")]
)
def test_length_drift(after: float, level: str) -> None:
    sign = warning_signs.length([], [], evaluated(figures(0, length=20.0), figures(0, length=after)))
    assert sign.level == level and f"20.0 tokens before, {after:.1f} after" in sign.figures


@pytest.mark.parametrize(("slope", "says"), [(1.0, "The reward pays for it: longer"), (-1.0, "does not ask for that")])
def test_length_that_the_reward_pays_for(slope: float, says: str) -> None:
    base = [line(f"p{i}", "w " * (i + 2), slope * i, side="base") for i in range(20)]
    tuned = [line(f"p{i}", "w " * 40, 1.0) for i in range(20)]
    sign = warning_signs.length(base, tuned, evaluated(figures(0, length=20.0), figures(0, length=30.0)))
    assert says in sign.verdict and sign.level == "look"


def test_completions_that_run_into_the_limit() -> None:
    base, tuned = sides(["a b c"] * 10)
    cut = [found | {"ended": "length"} for found in tuned]
    same = evaluated(figures(0, length=20.0), figures(0, length=20.0))
    assert warning_signs.length(base, tuned, same).level == "fine"
    sign = warning_signs.length(base, cut, same)
    assert sign.level == "look" and "0% before, 100% after" in sign.figures


def test_repetition() -> None:
    varied = [f"one {i} two three four five six" for i in range(10)]
    assert warning_signs.repetition(*sides(varied)).level == "fine"
    sign = warning_signs.repetition(*sides(["great great great great great great "] * 10))
    assert sign.level == "alarm" and "0.0% before, 80.0% after" in sign.figures


def test_the_same_text_for_different_prompts() -> None:
    evaluation = evaluated(figures(0, distinct_2=0.5), figures(0, distinct_2=0.5))
    varied = [f"story {i} has its own ending {i}." for i in range(20)]
    assert warning_signs.sameness(*sides(varied), evaluation).level == "fine"
    copies = warning_signs.sameness(*sides(["All the same here."] * 20), evaluation)
    assert copies.level == "alarm" and "whole copies 0% before, 100% after" in copies.figures
    stock = [f"story {i} is new. " + ("Highly recommended!" if i < 6 else f"Ending {i}.") for i in range(20)]
    sign = warning_signs.sameness(*sides(stock), evaluation)
    assert sign.level == "look" and "“Highly recommended!” in 0% before, 30% after" in sign.figures
    fallen = evaluated(figures(0, distinct_2=0.5), figures(0, distinct_2=0.2))
    assert warning_signs.sameness([], [], fallen).level == "alarm"
    # twice the same prompt (several seeds) with the same text is no copy
    again = [found | {"prompt": "p"} for found in sides(["All the same here."] * 2)[1]]
    assert "whole copies 0% before, 0% after" in warning_signs.sameness(again, again, evaluation).figures


@pytest.mark.parametrize(("kl", "level"), [(0.1, "fine"), (0.8, "look"), (3.0, "alarm")])
def test_distance(kl: float, level: str) -> None:
    assert warning_signs.distance(evaluated(figures(0, kl=0.0), figures(0, kl=kl, length=10.0))).level == level


@pytest.mark.parametrize(
    ("trained", "held_out", "level"), [(0.4, 0.4, "fine"), (0.4, 0.1, "look"), (0.4, 0.0, "alarm"), (-0.1, 0.2, "look")]
)
def test_training_that_does_not_carry_over(trained: float, held_out: float, level: str) -> None:
    metrics = [{"step": i, "rollout/reward": 0.3 + trained * i / 9} for i in range(10)]
    metrics[-2]["rollout/reward"] = metrics[-1]["rollout/reward"]
    assert warning_signs.held_out(metrics, evaluated(figures(0.3), figures(0.3 + held_out))).level == level


def test_one_reward_paid_by_another() -> None:
    base = [line(f"p{i}", "a", 1.0, rewards={"kind": 0.2 + i % 2 / 9, "true": 0.8, "odd": None}) for i in range(20)]
    tuned = [line(f"p{i}", "a", 1.0, rewards={"kind": 0.9, "true": 0.1 + i % 3 / 9, "odd": 1.0}) for i in range(20)]
    sign = warning_signs.parts(base, tuned)
    assert sign is not None and sign.level == "look" and sign.verdict == "true fell while kind rose."
    assert warning_signs.parts(*sides(["a"])) is None


@pytest.mark.parametrize(
    ("q", "bias", "level"), [(0.5, 0.0, "fine"), (1.5, 0.0, "alarm"), (0.5, 0.2, "look"), (0.5, 0.9, "alarm")]
)
def test_wishful_values(q: float, bias: float, level: str) -> None:
    lines = [line("p", "a", reward) for reward in (0.0, 1.0)]
    assert warning_signs.belief([{"step": 1, "train/q_taken": q}], lines, bias).level == level


def test_the_overall_verdict_names_the_worst() -> None:
    def sign(name: str, level: Any) -> warning_signs.Sign:
        return warning_signs.Sign(name, level, "", "")

    fine, look, alarm, unknown = sign("A", "fine"), sign("B", "look"), sign("C", "alarm"), sign("D", "unknown")
    assert warning_signs.overall([fine, look, alarm]).startswith("Signs of reward hacking: c.")
    assert warning_signs.overall([fine, look]) == "No alarm, but one thing deserves a look: b."
    assert warning_signs.overall([fine, unknown]) == "None of the 1 signs of reward hacking looked for was found."
    assert "cannot be said" in warning_signs.overall([unknown])
