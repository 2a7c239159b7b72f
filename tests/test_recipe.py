import json
import os
import textwrap
from pathlib import Path
from typing import Any

import pytest

from llm_dqn.errors import UserError, did_you_mean, nearest
from llm_dqn.recipe import (
    FLAT_SECTIONS,
    DQNConfig,
    EpsilonSection,
    Recipe,
    RecipeError,
    dump_recipe,
    load_recipe,
    load_recipe_partially,
    parse_recipe,
    parse_recipe_partially,
    resolve_path,
    shipped_recipes,
    shipped_root,
    with_resolved_paths,
)

SMALLEST = """\
model: {model_name_or_path: data/tiny_lm}
data: {train: prompts.jsonl}
reward: {funcs: [reward.py:f]}
train: {output_dir: runs/x}
"""


def lines_of(text: str, *overrides: str, source: str = "x.yaml") -> list[str]:
    """Everything that is wrong, as the command line prints it."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(textwrap.dedent(text), source, overrides)
    return str(caught.value).splitlines()


def test_five_mistakes_are_five_lines_with_place_and_cure() -> None:
    text = """\
        model:
          model_name_or_path: gpt2
        data:
          train: prompts.jsonl
          too_long: drp
        reward:
          funcs: []
        train:
          output_dir: runs/x
          learning_rat: 0.1
          max_steps: eight
        replay: {capacity: 40}
        """
    assert lines_of(text) == [
        "x.yaml:5: data.too_long: expected one of error, drop, truncate, keep_start, got 'drp'; did you mean drop?",
        "x.yaml:7: reward.funcs: expected a list with at least one entry, got []",
        "x.yaml:10: train.learning_rat: unknown key (got 0.1); did you mean learning_rate?",
        "x.yaml:11: train.max_steps: expected a whole number of at least 1, got 'eight'",
        "x.yaml:12: replay.capacity: must be at least learning_starts (64), got 40; "
        "raise the capacity or start learning earlier",
    ]


def test_missing_keys_are_named_with_what_they_are_for() -> None:
    lines = lines_of("model: {}\ndata:\n  train: x\n")
    assert [line.split(":")[0:3] for line in lines[:1]] == [["x.yaml", "1", " model.model_name_or_path"]]
    assert any(line.startswith("x.yaml: reward.funcs: missing") for line in lines)
    assert any(
        line.startswith("x.yaml: train.output_dir: missing, and has no default (Folder of the run") for line in lines
    )
    assert len(lines) == 3


def test_a_key_written_twice_is_an_error_with_both_lines() -> None:
    text = SMALLEST + "dqn:\n  beta: 0.1\n  beta: 0.2\ndqn: {}\n"
    assert lines_of(text) == [
        "x.yaml:7: dqn.beta: written twice (lines 6 and 7); keep one",
        "x.yaml:8: dqn: written twice (lines 5 and 8); keep one",
    ]


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a: [1\nb: 2", 2, "not valid YAML"),
        ("a: b: c", 1, "not valid YAML"),
        ("a:\n\tb: 1", 2, "not valid YAML"),
        ("- 1", 1, "expected sections"),
        ("a: 1\n---\nb: 2", 2, "not valid YAML"),
        ("train: !!python/object/apply:os.system [id]", 1, "the tag tag:yaml.org,2002:python/object/apply:os.system"),
        ("train: !!python/name:os.system", 1, "not allowed"),
        ("train:\n  x: &a [*a]", 2, "aliases unfold to more than 20 levels"),
        ("a: " + "[" * 5000, 1, "nested deeper than 20 levels"),
        (
            "a: &a [" + "1," * 99 + "]\nb: &b [" + "*a," * 99 + "]\nc: [" + "*b," * 99 + "]",
            1,
            "more than 10,000 values",
        ),
        ("? [a, b]\n: 1", 1, "a key must be a single word"),
    ],
)
def test_what_is_no_plain_yaml_is_refused_with_its_line(text: str, line: int, says: str) -> None:
    (problem,) = lines_of(text)
    assert problem.startswith(f"x.yaml:{line}: ") and says in problem


def test_a_huge_or_binary_file_is_refused(tmp_path: Path) -> None:
    assert "is this a recipe?" in lines_of("#" + "x" * 1_000_001)[0]
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match=r"x\.yaml:1: not UTF-8 text \(byte 0xff\)"):
        load_recipe(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("section", "line", "says"),
    [
        ("train", "seed: true", "expected a whole number of at least 0, got true"),
        ("train", "max_steps: 3.0", "expected a whole number of at least 1, got 3.0"),
        ("train", "bf16: 1", "expected true or false, got 1"),
        ("train", "learning_rate: false", "expected a number of at least 0 or null, got false"),
        ("train", "learning_rate: .nan", "expected a number of at least 0 or null, got nan"),
        ("train", "report_to: [1]", "expected text or a list, got [1]"),
        ("train", "output_dir: 2024", "expected text, got 2024"),
        ("dqn", "gamma: 0", "expected a number above 0 and at most 1, got 0"),
        ("dqn", "n_step: 0", "expected a whole number of at least 1 or null, got 0"),
        ("dqn", "q_head: linaer", "expected one of lm, linear, got 'linaer'; did you mean linear?"),
        ("rollout", "epsilon: 0.1", "expected a section of `key: value` lines, got 0.1"),
        ("rollout", "engine: vlm", "expected one of generate, continuous, vllm, got 'vlm'; did you mean vllm?"),
        ("dqn", "learning_rate: 1", "unknown key (got 1); did you mean train.learning_rate?"),
    ],
)
def test_a_wrong_value_is_explained_in_plain_words(section: str, line: str, says: str) -> None:
    key = f"{section}.{line.split(':')[0]}"
    text = SMALLEST.replace("train: {output_dir: runs/x}", "train:\n  output_dir: runs/x")
    if key == "train.output_dir":
        text = text.replace("\n  output_dir: runs/x", "")
    text = text + f"  {line}\n" if section == "train" else text + f"{section}:\n  {line}\n"
    (problem,) = lines_of(text)
    assert problem == f"x.yaml:{len(text.splitlines())}: {key}: {says}"


@pytest.mark.parametrize(
    ("settings", "key", "says"),
    [
        ({"rollout": {"epsilon": {"start": 0.1, "end": 0.5}}}, "rollout.epsilon.end", "at most epsilon.start (0.1)"),
        ({"reward": {"weights": [1.0, 2.0]}}, "reward.weights", "one number a reward function (1), got 2"),
        ({"dqn": {"double": True}}, "dqn.double", "needs backup: max"),
        ({"dqn": {"prior": "uniform"}}, "dqn.prior", "needs q_head: linear"),
        ({"dqn": {"expectile": 0.7}}, "dqn.expectile", "needs q_head: linear"),
        ({"replay": {"capacity": 40}}, "replay.capacity", "at least learning_starts (64), got 40"),
        (
            {"replay": {"capacity": 64}, "train": {"per_device_train_batch_size": 128}},
            "replay.capacity",
            "(128), got 64",
        ),
        ({"replay": {"prioritized": True, "success_share": 0.5}}, "replay.prioritized", "set success_share: 0"),
        ({"train": {"warmup_steps": 5}}, "train.warmup_steps", "use constant_with_warmup"),
    ],
)
def test_settings_that_cannot_go_together_are_refused_in_yaml_and_in_python(
    settings: dict[str, dict[str, Any]], key: str, says: str
) -> None:
    overrides = [
        f"{section}.{name}={json.dumps(value)}" for section, keys in settings.items() for name, value in keys.items()
    ]
    with pytest.raises(RecipeError) as caught:
        parse_recipe(SMALLEST, "x.yaml", overrides)
    (problem,) = caught.value.problems
    assert problem.key == key and says in problem.message
    flat = {name: value for keys in settings.values() for name, value in keys.items()}
    if "weights" not in flat:  # in Python the functions are given to the trainer
        with pytest.raises(ValueError, match=problem.message.split("(")[0]):
            DQNConfig(output_dir="x", **flat)


def test_what_is_broken_already_is_not_judged_again() -> None:
    lines = lines_of(SMALLEST, "replay.capacity=-1", "replay.learning_starts=100")
    assert lines == ["override replay.capacity=-1: expected a whole number of at least 1, got -1"]


def test_overrides_reach_every_depth_and_read_yaml() -> None:
    overrides = ["rollout.epsilon.end=0.01", "lora=null", "reward.funcs.0=other.py:g", "train.learning_rate=1e-5"]
    recipe = parse_recipe(SMALLEST, "x.yaml", [*overrides, "train.run_name=a=b", "train.report_to=[wandb, trackio]"])
    assert recipe.rollout.epsilon == EpsilonSection(end=0.01)
    assert recipe.lora is None
    assert recipe.reward.funcs == ["other.py:g"]
    assert recipe.train.learning_rate == 1e-5
    assert (recipe.train.run_name, recipe.train.report_to) == ("a=b", ["wandb", "trackio"])
    reopened = parse_recipe(SMALLEST + "lora: null\n", "x.yaml", ["lora.r=8"])
    assert reopened.lora is not None and reopened.lora.r == 8


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.learning_rat=1", "unknown key (got 1); did you mean learning_rate?"),
        ("learning_rate=1", "unknown key (got 1); did you mean train.learning_rate?"),
        ("trian.seed=1", "trian: unknown key (got {'seed': 1}); did you mean train?"),
        ("train.seed", "expected key=value with a dotted key, such as train.max_steps=100"),
        ("=1", "expected key=value with a dotted key, such as train.max_steps=100"),
        ("train.output_dir.x=1", "train.output_dir is a single value ('runs/x') and has no keys below it"),
        ("reward.funcs.3=x", "reward.funcs has 1 entries, counted from 0; there is no entry 3"),
        ("train.seed=[", "the value is not valid YAML"),
        ("train.seed=-1", "expected a whole number of at least 0, got -1"),
    ],
)
def test_a_wrong_override_is_shown_as_it_was_typed(override: str, says: str) -> None:
    (line,) = lines_of(SMALLEST, override)
    assert line.startswith(f"override {override}: {says}")


def test_an_override_replaces_a_mistake_in_the_file() -> None:
    recipe = parse_recipe(SMALLEST + "dqn: {beta: -1}\n", "x.yaml", ["dqn.beta=0.5"])
    assert recipe.dqn.beta == 0.5


def test_values_are_read_as_people_write_them() -> None:
    text = SMALLEST.replace("runs/x}", "2024-01-01, learning_rate: 1e-5, value_learning_rate: 2}")
    recipe = parse_recipe(text + "dqn:\nreplay:\n  # capacity: 3\nrollout: {temperature: 0}\n", "x.yaml")
    assert (recipe.train.output_dir, recipe.train.learning_rate, recipe.train.value_learning_rate) == (
        "2024-01-01",
        1e-5,
        2,
    )
    assert recipe.replay.capacity == 4096


def test_dump_and_load_give_the_same_recipe() -> None:
    recipe = parse_recipe(
        SMALLEST, "x.yaml", ["reward.on_error=0.5", "dqn.n_step=3", "train.run_name=你好", "lora=null"]
    )
    text = dump_recipe(recipe)
    assert parse_recipe(text, "y.yaml") == recipe
    assert text.startswith("model:") and "你好" in text
    assert parse_recipe(text, "y.yaml", ["train.seed=7"]) != recipe


def test_python_takes_the_leaf_names_with_the_same_defaults() -> None:
    recipe = parse_recipe(SMALLEST, "x.yaml")
    config = DQNConfig(output_dir=Path("runs/x"), funcs=["reward.py:f"])
    for name, section in FLAT_SECTIONS.items():
        for leaf in section.model_fields:
            assert getattr(config, leaf) == getattr(getattr(recipe, name), leaf), leaf
    assert DQNConfig(output_dir="x").funcs == []
    given = DQNConfig(output_dir="x", epsilon={"start": 1.0, "end": 0.5})
    assert given == DQNConfig(output_dir="x", epsilon=EpsilonSection(end=0.5))


def test_python_mistakes_are_told_all_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        DQNConfig(learning_rat=1, epsilon={"strat": 1.0}, seed=True)
    assert sorted(str(caught.value).splitlines()) == [
        "DQNConfig: epsilon.strat: unknown key (got 1.0); did you mean start?",
        "DQNConfig: learning_rat: unknown key (got 1); did you mean learning_rate?",
        "DQNConfig: output_dir: missing, and has no default (Folder of the run: recipe, metrics, adapter, checkpoints)",
        "DQNConfig: seed: expected a whole number of at least 0, got true",
    ]


def test_leaf_names_are_unique_so_that_they_can_be_flat() -> None:
    leaves = [leaf for section in FLAT_SECTIONS.values() for leaf in section.model_fields]
    assert len(leaves) == len(set(leaves))


def test_every_key_is_described() -> None:
    for section in Recipe.model_json_schema()["$defs"].values():
        for leaf, schema in section["properties"].items():
            assert schema.get("description", "").endswith("."), f"{section['title']}.{leaf}"


def test_settings_do_not_change_after_reading() -> None:
    config = DQNConfig(output_dir="x")
    with pytest.raises(ValueError):
        config.seed = 3  # type: ignore[misc]


def test_a_broken_recipe_is_used_as_far_as_it_goes() -> None:
    text = """\
        model: {model_name_or_path: gpt2, dtype: int3}
        data: {train: 7, prompt_column: question}
        reward: {funcs: []}
        train: {output_dir: runs/x, seed: 5}
        rollout:
          epsilon: {start: 2, end: 0.01}
          temperature: 0.5
        lora: {r: x, lora_alpha: 5}
        dqn: 3
        """
    recipe, problems = parse_recipe_partially(textwrap.dedent(text), "x.yaml")
    assert recipe is not None
    assert (recipe.model.model_name_or_path, recipe.model.dtype) == ("gpt2", "auto")
    assert (recipe.data.train, recipe.data.prompt_column) == (None, "question")
    assert recipe.reward.funcs is None
    assert (recipe.rollout.epsilon.start, recipe.rollout.epsilon.end, recipe.rollout.temperature) == (1.0, 0.01, 0.5)
    assert recipe.lora is not None and (recipe.lora.r, recipe.lora.lora_alpha) == (16, 5)
    assert recipe.dqn.beta is None
    assert [problem.key for problem in problems] == [
        "model.dtype",
        "data.train",
        "reward.funcs",
        "rollout.epsilon.start",
        "lora.r",
        "dqn",
    ]
    assert with_resolved_paths(recipe).reward.funcs is None
    assert str(recipe.problem("data.prompt_column", "no such column")) == (
        "x.yaml:2: data.prompt_column: no such column"
    )
    assert parse_recipe_partially("a: [", "x.yaml")[0] is None


def test_a_name_finds_a_shipped_recipe_and_a_typo_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        load_recipe("quickstart")
        == load_recipe("recipes/quickstart.yaml")
        == load_recipe(shipped_recipes()["quickstart"])
    )
    with pytest.raises(UserError, match=r"recipe quikstart: no such file.*did you mean quickstart\?"):
        load_recipe("quikstart")
    (tmp_path / "quickstart").mkdir()  # a folder of that name is not in the way
    assert load_recipe("quickstart").folder == shipped_root() / "recipes"
    with pytest.raises(UserError, match="is a folder"):
        load_recipe_partially(tmp_path)


def test_paths_are_found_here_beside_the_recipe_and_among_the_shipped_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, beside = tmp_path / "here", tmp_path / "beside"
    for folder in (here, beside):
        folder.mkdir()
        (folder / "mine.py").touch()
    (beside / "only.jsonl").touch()
    monkeypatch.chdir(here)
    assert resolve_path("mine.py:f", beside) == "mine.py:f"
    assert resolve_path("only.jsonl", beside) == str(beside / "only.jsonl")
    assert (
        resolve_path("data/tiny_reward_model#POSITIVE") == str(shipped_root() / "data/tiny_reward_model") + "#POSITIVE"
    )
    for unknown in ("org/model", "org/model#LABEL", "missing.py:f", "package.module.f", "openai/gsm8k:main"):
        assert resolve_path(unknown, beside) == unknown
    assert resolve_path(str(beside / "mine.py") + ":f") == str(beside / "mine.py") + ":f"
    recipe_file = beside / "r.yaml"
    recipe_file.write_text(SMALLEST.replace("prompts.jsonl", "only.jsonl"))
    resolved = with_resolved_paths(load_recipe(recipe_file))
    assert resolved.data.train == str(beside / "only.jsonl")
    assert os.path.isabs(resolved.model.model_name_or_path)


def test_nearest_says_nothing_when_nothing_is_near() -> None:
    assert nearest("Learning-Rate", ["learning_rate", "seed"]) == "learning_rate"
    assert nearest("zebra", ["learning_rate", "seed"]) is None
    assert did_you_mean("Seeds", ["learning_rate", "seed"]) == "; did you mean seed?"
    assert did_you_mean("zebra", ["learning_rate", "seed"]) == ""
