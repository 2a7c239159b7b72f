"""What comes from strangers (45 to 49): recipes, models' texts, rewards, and what may leave this machine."""

import ast
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import get_token

from llm_dqn import heatmap
from tests.faults.desk import Desk

TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz012345"  # looks like a real one, and is none
PACKAGE = Path(__file__).parents[2] / "llm_dqn"

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    "tag": (
        "train: !!python/object/apply:os.system ['touch owned']\n",
        1,
        "python/object/apply:os.system is not allowed",
    ),
    "name": ("x: 1\ntrain: !!python/name:os.system\n", 2, "is not allowed; write plain values"),
    "laughs": (LAUGHS, 1, "aliases unfold to more than 10,000 values"),
    "loop": ("x: &a [*a]\n", 1, "aliases unfold to more than 20 levels"),
    "deep": ("x:\n  " + "[" * 10_000, 2, "nested deeper than 20 levels"),
    "twice": ("train: {seed: 1,\n  seed: 2}\n", 2, "train.seed: written twice (lines 1 and 2); keep one"),
    "long": ("#" * 1_000_001, None, "longer than 1,000,000 characters; is this a recipe?"),
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_case_45_yaml_that_is_more_than_values(desk: Desk, hostile: str) -> None:
    """Refused with the line: tags run nothing, depth, size and unfolded aliases are limited, a key is written once."""
    text, line, says = HOSTILE[hostile]
    desk.write("hostile.yaml", text)
    code, _, errors = desk.command("check", "hostile.yaml")
    where = "hostile.yaml" if line is None else f"hostile.yaml:{line}"
    assert code == 2 and any(said.startswith(f"{where}: ") and says in said for said in errors.splitlines())
    assert not (desk.home / "owned").exists()
    assert desk.command("train", "hostile.yaml")[0] == 2


def test_case_46_access_tokens(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token in the environment is in no file of a run, in nothing that is printed, in nothing that is uploaded."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(variable, TOKEN)
    assert get_token() == TOKEN
    run, shown = desk.trained(train__save_steps=2, train__eval_steps=2)
    for arguments in (
        ("doctor",),
        ("check", "r.yaml"),
        ("evaluate", str(run), "--output", str(run / "again.json")),
        ("train", "r.yaml", "--resume"),
        ("push", str(run), "me/x", "--dry-run"),
    ):
        code, out, errors = desk.command(*arguments)
        assert code == 0, (arguments, errors)
        shown += out + errors
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 15
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in shown


def test_case_47_what_is_uploaded(desk: Desk, trained_run: Path) -> None:
    """Adapter, tokenizer, card, recipe and figures, to a private place; never replay, optimizer or samples."""
    code, out, errors = desk.command("push", str(trained_run), "me/x", "--dry-run")
    assert code == 0, errors
    named = {name for name in (path.name for path in trained_run.rglob("*") if path.is_file()) if name in out}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md", "recipe.yaml"} <= named
    assert not [name for name in named if name in ("samples.jsonl", "evaluation_samples.jsonl", "state.json")]
    assert "replay" not in out.replace("replay, optimizer", "") and "checkpoints" not in out
    assert "private" in out and "nothing was sent" in out


EVIL = "from pathlib import Path\nPath('owned').touch()\ndef judge(completions, **columns):\n    return [0.0]\n"


def test_case_48_strangers_recipes(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe names code that is run. `check --no-import` runs none of it, and says what it has not looked into."""
    desk.judge(EVIL)
    desk.write("evil_package/__init__.py", EVIL)
    monkeypatch.syspath_prepend(str(desk.home))
    desk.set(reward__funcs=["judge.py:judge", "evil_package.inner.judge"])
    code, out, errors = desk.command("check", "r.yaml", "--no-import")
    assert code == 0, errors
    assert not (desk.home / "owned").exists()
    shown = out.splitlines()
    start = shown.index("a run would run this code, and it was not looked into:")
    assert shown[start + 1 :] == [
        f"  reward judge.py:judge ({desk.home / 'judge.py'} is there)",
        "  reward evil_package.inner.judge (a module; not looked for)",
        "no rollout and no update were tried; read the code before you train",
        "ok",
    ]
    assert desk.command("check", "r.yaml")[0] == 2 and (desk.home / "owned").exists()  # it would have


def test_case_48_no_import_still_finds_mistakes(desk: Desk) -> None:
    """Without running anything, a missing file or function is found; code and pickles of a model are left alone."""
    desk.judge(EVIL)
    desk.set(reward__funcs=["judge.py:jugde"], model__trust_remote_code=True)
    desk.rows("prompts.jsonl", [{"prompt": None}])
    code, out, errors = desk.command("check", "r.yaml", "--no-import")
    assert code == 2 and not (desk.home / "owned").exists() and desk.weights_opened == 0
    assert "judge.py has no 'jugde'; did you mean judge?" in errors
    assert "  model models/tiny, because of trust_remote_code: true" in out


TEXT = "<script>alert(1)</script> [bold red]x[/] \x1b[31m\x1b]0;title\x07 \x9b2J \u202egnitirw \u2066"
CODES = ("\x1b", "\x07", "\x9b", "\u202e", "\u2066")


def test_case_49_html(desk: Desk) -> None:
    """Texts are escaped in every page, which opens no address and may not reach the network."""
    line = {
        **{"prompt": TEXT, "completion": TEXT, "reward": 1.0, "rewards": {TEXT: 1.0}},
        **{"token_ids": [1, 2], "tokens": [TEXT, "</s>"], "q_values": [1.0, 1.0], "values": [0.0, 1.0]},
        **{"advantages": [1.0, 0.0], "ended": "eos"},
    }
    page = heatmap.page([line], TEXT)
    assert "alert(1)" in page and "<script>alert" not in page
    assert not [code for code in CODES if code in page]
    assert "default-src 'none'" in html.unescape(page) and not re.findall(r"https?://(?!www\.w3\.org/)", page)


def test_case_49_terminal(desk: Desk) -> None:
    """Control and direction codes in prompts, completions, names and errors are spelled out; markup is no markup."""
    desk.rows("prompts.jsonl", [{"prompt": f"{TEXT} {number}"} for number in range(10)])
    desk.judge(f"def length(completions, **columns):\n    raise ValueError({TEXT!r})\n")
    shown = ""
    for settings in ({}, {"reward__on_error": 0.5}):
        desk.set(**settings)
        for command in ("check", "train"):
            shown += "".join(desk.command(command, "r.yaml")[1:])
    desk.set(model__model_name_or_path=f"models/{TEXT}", data__train=f"{TEXT}.jsonl")
    shown += "".join(desk.command("check", "r.yaml")[1:])
    shown += "".join(desk.command("recipes", "show", str(desk.write("t.yaml", TEXT)))[1:])
    assert "[bold red]x[/]" in shown and "before and after" in shown and "\\u202egnitirw" in shown
    assert not [code for code in CODES if code in shown]
    samples = (desk.home / "runs" / "x" / "samples.jsonl").read_text()
    assert json.loads(samples.splitlines()[0])["prompt"].startswith(TEXT) and "\x1b" not in samples


def test_case_49_no_other_way_to_the_terminal() -> None:
    """Everything that is printed goes through the one function that spells codes out."""
    allowed = {"terminal.py": ["print", "print"]}
    for path in sorted(PACKAGE.glob("*.py")):
        prints = [name for name in _calls(path) if name in ("print", "typer.echo", "click.echo", "sys.stdout.write")]
        assert sorted(prints) == allowed.get(path.name, []), f"{path.name}: print by terminal.say or by Console"


def _calls(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)
