"""The learning benchmark: tasks that are what they say, marks read right, runs that count what they spend."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.learning import __main__ as main
from benchmarks.learning import cells, dqn, figures, graphs, hours, letters, measure, protocol, store, sums, unseen
from benchmarks.learning.bases import BaseRecipe, base_model
from benchmarks.learning.course import Course
from benchmarks.learning.fine_tuning import _best, train_online
from benchmarks.learning.methods import REGIMES, for_task
from benchmarks.learning.search import auc, true_values
from benchmarks.learning.tasks import SEEN, TASKS, UNSEEN

SMALL = BaseRecipe("sums", {"habit": 0.5, "shortest": 2, "longest": 3}, sums.VOCABULARY, steps=4, width=16, layers=1)


@pytest.fixture(scope="module")
def small_task(tmp_path_factory):
    """The task of sums on a model that has hardly been trained."""
    built = base_model(SMALL, lambda rng: sums._text(rng, SMALL))
    folder = tmp_path_factory.mktemp("base")
    built.build(folder)
    rows = TASKS["sums"].prompts
    few = [part[:32] for part in rows()]
    return replace(TASKS["sums"], base=lambda: folder, judge=lambda: lengths, prompts=lambda: few)


def lengths(prompts, completions, **columns):
    """Different for nearly all completions, so that there is always something to learn from."""
    return [len(text) / 40 for text in completions]


def test_no_prompt_serves_two_purposes():
    for name in TASKS:
        train, tuning, test = TASKS[name].prompts()
        texts = [{row["prompt"] for row in part} for part in (train, tuning, test)]
        assert not (texts[0] & texts[1] | texts[0] & texts[2] | texts[1] & texts[2]), name
        least = 30 if name == "coins" else 50  # five coins come to no more amounts
        assert min(len(part) for part in (tuning, test)) >= least, name


@pytest.mark.parametrize(
    "name", ["sums", "rare_sums", "long_sums", "paths", "star", "sorting", "coins", "runs", "shift"]
)
def test_the_listed_answers_earn_the_full_reward_and_others_do_not(name):
    task, full = TASKS[name], 0.0 if name == "runs" else 1.0
    for row in task.test[:40]:
        answers = task.answers(row)
        columns = {key: [value] * len(answers) for key, value in row.items() if key != "prompt"}
        prompts = [row["prompt"]] * len(answers)
        judged = task.judge()(prompts=prompts, completions=answers, **columns)
        assert answers and judged == [full] * len(answers)
        cut = [" ".join(answer.split()[:-1]) for answer in answers]
        assert max(task.judge()(prompts=prompts, completions=cut, **columns)) < full


def test_a_detour_costs_what_it_is_longer_and_a_jump_everything():
    goal, start = 0, next(node for node, far in graphs.distances(0).items() if far == 2)
    middle = graphs.shortest_paths({"prompt": f"{goal} {start} :"})[0].split()[0]
    back_and_forth = f"{middle} {start} {middle} {goal}"
    assert graphs.optimality([f"{goal} {start} :"] * 2, [back_and_forth, f"{goal}"]) == [0.5, 0.0]


def test_who_lives_from_predicted_rewards_takes_part_where_they_can_be_predicted():
    plan = replace(main.FULL["logged"], tasks=("sums", "paths"))
    assert {method for task, method in plan.pairs() if task == "paths"} == set(plan.methods)
    assert {method for task, method in plan.pairs() if task == "sums"} == {*plan.methods} - {
        "grpo_predicted",
        "ours_log_alone",
    }


def test_rewards_of_the_unseen_tasks_are_what_they_say():
    assert unseen.places_right(["1 2 3", "2 1 3", "1 2 3 4", "", "1"], ["1 2 3"] * 5) == [1, 1 / 3, 3 / 4, 0, 1 / 3]
    assert unseen.paid(["c1 c2 c2 c5 c10", "c10 c10", "c1 c2 c2 c5 10", ""], ["20"] * 4) == [1, 0, 0, 0]
    first = unseen.before_the_first_mistake(["b c", "b d", "c c", "b c d", "b", ""], ["b c"] * 6)
    assert first == pytest.approx([1, 1 / 3, 0, 2 / 3, 1 / 3, 0])
    assert unseen.near_length(["one two", " ".join("a" * 13), ""]) == [-10, -1, -12]
    written = ["a 3 b 1", "a 2 b 1", "a 3", "", "b 1 a 3", "a 3 b 1 c"]
    assert unseen.edits(written, ["a 3 b 1"] * 6) == [0, -1, -2, -4, -4, -1]
    assert set(UNSEEN) | set(SEEN) == set(TASKS) and not set(UNSEEN) & set(SEEN)


def test_letters_are_long_and_known_to_their_tokenizer():
    import random

    texts = [letters.letter(random.Random(seed)) for seed in range(200)]
    assert sum(len(text.split()) for text in texts) / len(texts) > 60
    assert {word for text in texts for word in text.split()} <= set(letters.VOCABULARY)


def test_exact_probability_is_the_product_over_the_right_chain(small_task):
    tokenizer, model = (
        AutoTokenizer.from_pretrained(small_task.base()),
        AutoModelForCausalLM.from_pretrained(small_task.base()),
    )
    row = small_task.test[0]
    ids = [*tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id]
    expected, text = 1.0, tokenizer(row["prompt"])["input_ids"]
    with torch.no_grad():
        for token in ids:
            expected *= float(model(torch.tensor([text])).logits[0, -1].softmax(-1)[token])
            text = [*text, token]
    assert measure.exactly_right(model, tokenizer, small_task, [row]) == pytest.approx(expected, rel=1e-4)


def test_both_loops_spend_their_budget_and_measuring_spends_nothing(small_task):
    settings = {"learning_rate": 1e-4, "completions": 16, "of_each": 4, "remember": 1, "updates": 1, "batch": 4}
    course = Course(small_task, small_task.test[:8], (0, 16, 32), seed=0)
    train_online(small_task, course, settings, budget=32, seed=0)
    assert [(p["at"], p["scored"], p["updates"]) for p in course.points] == [(0, 0, 0), (16, 16, 1), (32, 32, 2)]
    course = Course(small_task, small_task.test[:8], (0, 16, 32), seed=0)
    ours = {
        "prompts_per_collect": 16,
        "learning_starts": 16,
        "updates_per_collect": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
    }
    found = dqn.train(small_task, course, ours, budget=32, seed=0, search_too=True)["search"]["tuned"]
    assert found["sample"] < found["oracle"] and found["value"] <= found["oracle"]
    assert [(p["at"], p["scored"]) for p in course.points] == [(0, 0), (16, 16), (32, 32)]
    assert course.points[0]["kl"] == 0.0 < course.points[-1]["kl"]


def test_the_value_of_a_prefix_is_the_chance_of_going_on_to_an_answer(small_task):
    tokenizer = AutoTokenizer.from_pretrained(small_task.base())
    model = AutoModelForCausalLM.from_pretrained(small_task.base())
    row = small_task.test[0]
    right = [*tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id]
    wrong = [right[0], right[0] + 1, *right[2:]]
    sound, broken = true_values(model, tokenizer, small_task, [row, row], [right, wrong])
    assert sound[0] == pytest.approx(measure.exactly_right(model, tokenizer, small_task, [row]), rel=1e-4)
    assert sound == sorted(sound) and broken[:2] == sound[:2] and set(broken[2:]) == {0.0}


def test_writers_are_as_old_as_the_regime_says_and_the_log_comes_first(small_task):
    ours = {
        "prompts_per_collect": 8,
        "learning_starts": 8,
        "updates_per_collect": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
    }
    course = Course(small_task, small_task.test[:8], (0, 16), seed=0)
    written = []
    weights = dqn.Watched.rollout

    class Spied(dqn.Watched):
        def rollout(self):
            episodes = weights(self)
            written.append(float(sum(weight.sum() for weight in self._refreshed[1].values())))
            return episodes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dqn, "Watched", Spied)
        dqn.train(small_task, course, ours, budget=32, seed=0, stale=16)
    assert written[0] == written[1] != written[2] == written[3]
    rows = [
        {"prompt": row["prompt"], "completion": "7", "reward": k % 2, "ended": "eos"}
        for k, row in enumerate(small_task.train)
    ]
    course = Course(small_task, small_task.test[:8], (0, 16), seed=0)
    dqn.train(small_task, course, {**ours, "logged_updates": 5}, budget=16, seed=0, logged=rows)
    assert [(p["scored"], p["updates"]) for p in course.points] == [(0, 0), (16, 7)]


def result(scores, ats=(0, 128, 256)):
    return {
        "settings": {},
        "points": [{"at": a, "seconds": a / 100, "reward": s} for a, s in zip(ats, scores, strict=True)],
    }


def test_marks_are_read_between_points():
    course = result([0.2, 0.4, 0.8])
    assert figures.reached(course, 0.3) == pytest.approx(64)
    assert figures.reached(course, 0.6) == pytest.approx(192)
    assert figures.reached(course, 0.1) == 0
    assert math.isinf(figures.reached(course, 0.9))


def test_auc_counts_pairs_in_order():
    assert auc(np.array([0.1, 0.4, 0.3, 0.9]), np.array([False, True, False, True])) == 1.0
    assert auc(np.array([0.5, 0.5]), np.array([False, True])) == 0.5
    assert auc(np.array([3.0, 1.0, 2.0]), np.array([False, True, True])) == 0.0


def test_the_best_peer_sets_the_marks():
    methods = {"ours": [result([0.2, 0.9, 1.0])], "grpo": [result([0.2, 0.3, 0.4])], "rloo": [result([0.2, 0.5, 0.6])]}
    assert figures.thresholds(methods) == pytest.approx((0.4, 0.56))
    assert figures.ratio(methods, "ours", 0).value == pytest.approx((128 * 2 / 3) / (128 * 2 / 7))
    slow = methods | {"ours": [result([0.2, 0.2, 0.45])]}
    found = figures.ratio(slow, "ours", 1)
    assert (found.bound, found.value) == ("<", pytest.approx((128 + 128 * 0.6) / 256))
    # a call of a second each on top of a hundredth of a CPU second
    assert figures.spent(methods["ours"], 0.56, cost=1.0)[0] == [pytest.approx(128 * 0.36 / 0.7 * 1.01)]
    assert figures.lead(methods, "ours")[0] == pytest.approx(0.4)
    fell_apart = methods | {"rloo": [result([0.2, 0.6, 0.0])]}
    assert figures.thresholds(fell_apart) == figures.thresholds(methods)


def test_tuning_compares_at_the_same_marks():
    often = result([0.3, 0.35, 0.4], ats=(32, 64, 128)) | {"settings": {"name": "often"}, "marks": (32, 64, 128)}
    seldom = result([0.4, 0.5], ats=(64, 128)) | {"settings": {"name": "seldom"}, "marks": (32, 64, 128)}
    assert protocol.best([often, seldom]) == {"name": "seldom"}


def test_what_is_not_through_its_grid_and_seeds_is_left_out_of_tables(tmp_path):
    plan = protocol.Plan("online", ("sums",), ("ours", "filtered"), 1, 2, tuning=64, budget=128, reference=128)
    kept = store.Store(tmp_path / "cells.jsonl")

    def add(some):
        for number, cell in enumerate(some):
            scores = [0.1 * number] * len(cell.marks)
            told = {"settings": cell.settings, "marks": cell.marks, "seed": cell.seed, "part": cell.part}
            told |= {"task": cell.task, "regime": cell.regime, "method": cell.method}
            kept.add(cell.key, result(scores, ats=cell.marks) | told)

    add(protocol.test_cells(plan, "sums", "ours", {}))
    tuning = protocol.tuning_cells(plan, "sums", "filtered")
    add(tuning)
    assert protocol.finished(plan, kept)["sums"].keys() == {"ours"}
    assert protocol.settled(plan, "sums", "filtered", lambda cells: None) is None
    best = tuning[1].settings
    for cell in protocol.further_cells(plan, "sums", "filtered", best):
        add([cell])  # none is better
    add(protocol.test_cells(plan, "sums", "filtered", tuning[0].settings))
    assert protocol.finished(plan, kept)["sums"].keys() == {"ours"}  # tested as it would not be chosen
    add(protocol.test_cells(plan, "sums", "filtered", best))
    assert protocol.finished(plan, kept)["sums"].keys() == {"ours", "filtered"}

    add(protocol.test_cells(replace(plan, reference=256), "sums", "filtered", best))  # another budget
    hindsight = protocol.by_hindsight(plan, protocol.finished(plan, kept), kept)["sums"]
    assert [seeds[0]["settings"] for name, seeds in hindsight.items() if name != "ours"] == [
        settings for _, settings in sorted((str(cell.settings), cell.settings) for cell in tuning)
    ]


def test_a_peer_may_keep_the_best_alone_where_rewards_are_counted(tmp_path):
    plan = protocol.Plan("online", ("sums", "paths"), ("filtered",), 1, 2, tuning=64, budget=128, reference=128)
    tried = {
        task: [cell.settings for cell in protocol.counted_cells(plan, task, "filtered", {"updates": 4})]
        for task in plan.tasks
    }
    assert tried == {"sums": [], "paths": [{"updates": 4, "above": 0.75}, {"updates": 4, "above": 0.9}]}
    assert protocol.counted_cells(plan, "paths", "reinforce", {}) == []

    def measured(cells):
        return [
            result([cell.settings.get("above", 0.0)] * 3, ats=cell.marks)
            | {"settings": cell.settings, "marks": cell.marks}
            for cell in cells
        ]

    assert protocol.settled(plan, "paths", "filtered", measured)["above"] == 0.9
    kept = _best([{"prompt": str(number)} for number in range(3)], [[1], [2], [3]], [0.2, 0.5, 0.9], 1, 0.4, 0.6)
    assert kept == [("2", [3])]


def test_hours_are_those_of_the_cells_that_are_there(tmp_path):
    plan = protocol.Plan("online", ("sums",), ("ours", "filtered"), 2, 2, tuning=64, budget=128, reference=128)
    kept = store.Store(tmp_path / "cells.jsonl")
    first, second = protocol.test_cells(plan, "sums", "ours", {})
    points = [{"at": 0, "seconds": 0.0}, {"at": 128, "seconds": 400.0}]
    facts = {"task": "sums", "method": "ours", "part": "test", "points": points}
    kept.add(first.key, facts | {"cpu": 600.0})  # 100 seconds a look
    kept.add(second.key, facts)
    known = kept.read()
    there, missing = hours.cells_of(plan, known)
    assert set(there) == {first.key, second.key} and missing == 2  # the two configurations of filtered SFT
    looks = hours.measuring(list(known.values()))
    assert [hours.seconds(one, looks) for one in known.values()] == [600.0, 600.0]
    lines = hours.table({"online": plan, "what shares its cells": plan}, kept, "this").splitlines()
    assert lines[-3:] == [
        "| online | 2 | 2 | 0.33 |",
        "| what shares its cells | 0 | 2 | 0.00 |",
        "| all | | | 0.33 |",
    ]


def test_all_regimes_are_one_command():
    parts = main._parts(["table", "--regime", "all"])
    assert {part.regime for part in parts} == set(REGIMES) - {"logged_500"} and len(parts) == len(REGIMES)
    assert [main._plans(part) for part in parts if part.long] == [list(main.LONG)]
    assert all(part.whole for part in parts) and not main._options(["run"]).whole
    plans = [plan for part in parts for plan in main._plans(part)]
    left_out = [(plan.regime, set(plan.methods) - {*main.in_six_hours(plan).methods}) for plan in plans]
    assert [one for one in left_out if one[1]] == [
        ("online", {"reinforce"}),
        ("online", {"grpo"}),
        ("logged", {"grpo_predicted"}),
    ]
    narrow = main._plans(main._options(["run", "--long", "--tasks", "letters", "sums", "--methods", "ours", "rloo"]))
    assert [(plan.tasks, plan.methods) for plan in narrow] == [(("sums",), ("ours",)), (("letters",), ("ours", "rloo"))]
    assert parts[-1].shown.endswith(f"table --regime {parts[-1].regime}")  # which makes that table alone
    for more in (["--tasks", "sums"], ["--long"]):
        with pytest.raises(SystemExit):
            main._options(["run", "--regime", "all", *more])


def test_every_tuned_method_has_twelve_configurations_to_try():
    for regime in REGIMES.values():
        for name, method in regime.methods.items():
            assert len(method.grid) in (1, 12, 16), name
            assert len(method.grid) == 1 or len(protocol.spread(method.grid, 12)) == 12
            for settings in method.grid:
                if method.kind == "dqn":
                    given = for_task(settings, TASKS["reviews"], method.kind)
                    cells.DQNConfig(output_dir="-", **{key: given[key] for key in given.keys() - dqn.OWN})


def test_a_store_keeps_finished_cells(tmp_path):
    finished = store.Store(tmp_path / "cells.jsonl")
    cell = cells.Cell("sums", "online", "ours", {}, 0, "test", (0, 64))
    finished.add(cell.key, {"points": [{"reward": 0.5, "at": 64}]})
    assert protocol.run_missing(finished, [cell])[0]["points"][0]["reward"] == 0.5
    assert replace(cell, seed=1).key not in finished.read()
