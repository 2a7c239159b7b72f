"""Push, fail, push again, pull: against a Hub on loopback, by the real command in processes of its own."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from llm_dqn import bundle as bundling
from llm_dqn.bundle import bundle, check_repo_id
from llm_dqn.errors import UserError
from tests.hub_server import Fault, Hub, problems_of_card

ROOT = Path(__file__).parents[1]
TOKEN = "hf_" + "TestOnly" * 4
ALLOWED = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "evaluation.json", "metrics.jsonl",
    "q_head.safetensors", "recipe.yaml", "reward.svg", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
PROMPTS = ("问候：", "请说：", "回答：")

PULL = """
import json, sys
sys.modules["llm_dqn"] = None  # whoever imports it fails
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
settings = GenerationConfig(do_sample=False, max_new_tokens=8, pad_token_id=0)
answers = {}
for name, opener in (("me/greeter", AutoPeftModelForCausalLM), ("me/greeter-merged", AutoModelForCausalLM)):
    model, tokenizer = opener.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    answers[name] = []
    for prompt in json.loads(sys.argv[1]):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        answers[name].append(written[0].tolist())
print(json.dumps(answers))
"""
SENTENCES = """
import json, os, sys
from llm_dqn import hub
from llm_dqn.errors import RunError, UserError
hub.WAITS = (0.0, 0.0, 0.0)
found = {}
for name, run, repo, options in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = options.pop("token", os.environ["HF_TOKEN"])
    try:
        found[name] = [0, hub.push(run, repo, say=lambda line: None, **options)]
    except (UserError, RunError) as error:
        found[name] = [2 if isinstance(error, UserError) else 1, str(error)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub({TOKEN: "me"}).running() as server:
        server.add_repo("me/hello", ROOT / "data" / "hello_lm")
        yield server


@pytest.fixture
def calm(hub: Hub) -> Hub:
    """The server without faults, its list of requests empty."""
    hub.forget()
    return hub


@pytest.fixture(scope="module")
def run(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose adapter was made stronger, beside files that nobody should ever send."""
    folder = tmp_path_factory.mktemp("share") / "greeter"
    shutil.copytree(trained_run, folder)
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    save_file({name: 3 * value for name, value in weights.items()}, folder / "adapter" / "adapter_model.safetensors")
    for stray in ("notes.txt", "adapter/optimizer.safetensors", "adapter/replay.jsonl", "adapter/.env", "adapter/a.py"):
        (folder / stray).write_text("private")
    return folder


@pytest.fixture(scope="module")
def client(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python in a fresh process that knows this Hub and nothing else."""
    home = tmp_path_factory.mktemp("hf_home")

    def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        given = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        return subprocess.run(
            [sys.executable, *arguments], env=plain | given | environment, cwd=ROOT, capture_output=True, text=True
        )

    return call


def greedy_tokens(run: Path, tuned: bool = True) -> list[list[int]]:
    """What base + adapter write here, in plain PEFT."""
    model = AutoPeftModelForCausalLM.from_pretrained(run / "adapter").eval()
    if not tuned:
        model = model.unload()
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    settings = GenerationConfig(do_sample=False, max_new_tokens=8, pad_token_id=0)
    rows = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        rows.append(written[0].tolist())
    return rows


def fingerprint(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_push_fail_push_again_pull(
    hub: Hub, run: Path, client: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Invariant 8 over the wire: what others pull writes the same greedy tokens, whatever happened on the way."""
    before, expected = fingerprint(run), greedy_tokens(run)
    assert expected != greedy_tokens(run, tuned=False)
    push = ("-m", "llm_dqn", "push", str(run), "me/greeter", "--base-model", "me/hello")

    hub.faults = [Fault("PUT /lfs", kind="damage", times=1)]  # the bytes that arrive are not those of the hash
    failed = client(*push)
    assert failed.returncode == 1, failed.stderr
    assert "the upload failed: the Hub says that a file arrived damaged" in failed.stderr
    assert "the same command goes on where this one stopped" in failed.stderr and "Traceback" not in failed.stderr
    assert hub.files("me/greeter") == {} and fingerprint(run) == before  # nothing half there, everything still here

    hub.forget()
    again = client(*push)
    assert again.returncode == 0, again.stderr
    assert f"uploaded: {hub.url}/me/greeter/commit/" in again.stdout
    assert hub.count("PUT /lfs") == 1  # the other weights had arrived, and are not sent again
    files = hub.files("me/greeter")
    assert files.keys() == ALLOWED and hub.repos["me/greeter"].private
    assert files["adapter_model.safetensors"] == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    config = json.loads(files["adapter_config.json"])
    pinned = hub.repos["me/hello"].branches["main"]
    assert config["base_model_name_or_path"] == "me/hello" and config["revision"] == pinned
    assert hub.count("POST /api/validate-yaml") == 1 and problems_of_card(files["README.md"].decode()) == []
    card = files["README.md"].decode()
    assert "base_model: me/hello" in card and f"at revision `{pinned}`" in card

    merged = client("-m", "llm_dqn", "push", str(run), "me/greeter-merged", "--merged", "--base-model", "me/hello")
    assert merged.returncode == 0, merged.stderr
    assert "proven: logits of base + adapter and merged model differ by" in merged.stdout
    sent = hub.files("me/greeter-merged").keys()
    assert {"model.safetensors", "config.json", "merge.json", "README.md"} <= sent and "adapter_config.json" not in sent

    pulled = client("-c", PULL, json.dumps(PROMPTS))
    assert pulled.returncode == 0, pulled.stderr[-3000:]
    assert json.loads(pulled.stdout.splitlines()[-1]) == {"me/greeter": expected, "me/greeter-merged": expected}

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    options = ("--prompts", str(prompts), "--output", str(tmp_path / "out.jsonl"), "--greedy")
    wrote = client("-m", "llm_dqn", "generate", "me/greeter", *options, "--max-completion-length", "8")
    assert wrote.returncode == 0, wrote.stderr
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    ours = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in expected]
    assert [line["prompt"] + line["completion"] for line in lines] == ours

    snippet = card.split("```python\n")[1].split("```")[0]
    hub.forget()
    ran = client("-c", snippet, HF_HUB_OFFLINE="1")
    assert ran.returncode == 0 and ran.stdout.strip() and hub.requests == [], ran.stderr[-2000:]

    said = "".join(part.stdout + part.stderr for part in (failed, again, merged, pulled, wrote, ran))
    assert TOKEN not in said and not any(TOKEN.encode() in body for body in [*hub.bodies, *hub.contents.values()])
    assert not any(TOKEN.encode() in file.read_bytes() for file in run.rglob("*") if file.is_file())


def test_trouble_that_passes_is_waited_out(
    calm: Hub, run: Path, client: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """All files inside the commit (the other way of uploading), and every call in trouble once."""
    calm.lfs = False
    calm.faults = [
        Fault("POST /api/repos/create", kind="drop", times=1),
        Fault("POST /api/models/me/patient/preupload", 429, times=1, headers={"Retry-After": "2"}),
        Fault("POST /api/models/me/patient/commit", 503, times=1),
        Fault("POST /api/models/me/patient/commit", kind="lose", times=1),  # done, and the answer never came
    ]
    try:
        pushed = client("-m", "llm_dqn", "push", str(run), "me/patient", "--branch", "trial")
    finally:
        calm.lfs = True
    assert pushed.returncode == 0, pushed.stderr
    printed = pushed.stdout + pushed.stderr
    assert "the connection broke" in printed and "the Hub answered 503" in printed and "Retry" in printed
    assert calm.files("me/patient", "trial").keys() == ALLOWED and calm.files("me/patient") == {}
    assert len(calm.repos["me/patient"].commits) == 2  # the empty one and ours: no upload came twice
    assert calm.count("PUT /lfs") == 0
    assert "which others do not have" in pushed.stdout  # no --base-model was given
    config = json.loads(calm.files("me/patient", "trial")["adapter_config.json"])
    assert config["base_model_name_or_path"].startswith("./")  # never to be taken for a Hub id


def test_every_refusal_is_one_plain_sentence(
    calm: Hub, run: Path, client: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    for name, (step, status) in {
        "c401": ("commit", 401), "c403": ("preupload", 403), "c404": ("preupload", 404), "c409": ("commit", 409),
        "c413": ("commit", 413), "c503": ("commit", 503),
    }.items():  # fmt: skip
        calm.faults.append(Fault(f"POST /api/models/me/{name}/{step}", status))
    calm.faults.append(Fault("POST /api/models/me/c429/commit", 429, headers={"Retry-After": "4000"}))
    calm.faults.append(Fault("POST /api/models/me/drop/commit", kind="drop"))
    calm.add_repo("me/open", tmp_path)
    calm.add_repo("me/gated", tmp_path, private=True)
    calm.repos["me/gated"].gated = True
    calm.add_repo("me/whole", ROOT / "data" / "hello_lm", private=True)
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "model.safetensors").write_bytes(b"other weights")
    calm.add_repo("me/other", tmp_path / "fake")
    odd = shutil.copytree(run, tmp_path / "odd")
    base = shutil.copytree(ROOT / "data" / "hello_lm", tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: no-such-licence\n---\n")
    config = json.loads((odd / "adapter" / "adapter_config.json").read_text())
    text = json.dumps(config | {"base_model_name_or_path": str(base)})
    (odd / "adapter" / "adapter_config.json").write_text(text)
    cases: dict[str, tuple[int, str, tuple[Any, ...]]] = {
        "c401": (1, "the Hub does not accept the access token; log in with `hf auth login`, or set HF_TOKEN", ()),
        "c403": (1, "the access token may not write to 'me'", ()),
        "c404": (1, "me/c404 or a branch of it is not on the Hub, or not visible", ()),
        "c409": (1, "somebody else is writing to me/c409 at the same time", ()),
        "c413": (1, "a file is larger than the Hub takes", ()),
        "c429": (1, "too many requests of this account", ()),
        "c503": (1, "the Hub has trouble of its own (error 503); try again later", ()),
        "drop": (1, f"the connection to {calm.url} broke", ()),
        "gated": (1, "is gated; ask for access on its page", ()),
        "stranger": (1, "the access token may not write to 'them'", (str(run), "them/x", {})),
        "no base": (1, "me/nothing or a branch of it is not on", (str(run), "me/a", {"base_model": "me/nothing"})),
        "bad card": (1, 'Invalid metadata in README.md. - "license" must be one of', (str(odd), "me/b", {})),
        "open": (2, "me/open exists and everybody can read it; add --public", ()),
        "whole": (2, "holds a whole model, and an adapter beside it would open wrongly", ()),
        "wrong token": (1, "the Hub does not accept the access token", (str(run), "me/c", {"token": "hf_wrong"})),
    }  # fmt: skip
    asked = [[name, *(more or (str(run), f"me/{name}", {}))] for name, (_, _, more) in cases.items()]
    ran = client("-c", SENTENCES, json.dumps(asked))
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    for name, (code, sentence, _) in cases.items():
        assert found[name][0] == code and sentence in found[name][1], (name, found[name])
        assert "http" not in found[name][1].replace(calm.url, "") and "\n" not in found[name][1]
        assert code == 2 or "nothing is lost" in found[name][1]
    assert calm.count("POST /api/models/me/c503/commit") == 4 and calm.count("POST /api/models/me/c401/commit") == 1


def test_a_dry_run_needs_no_network_and_no_token(
    calm: Hub, run: Path, client: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    shown = client("-m", "llm_dqn", "push", str(run), "me/x", "--dry-run", HF_TOKEN="")
    assert shown.returncode == 0, shown.stderr
    assert calm.requests == [] and "nothing was sent" in shown.stdout and "private repository me/x" in shown.stdout
    size = (run / "adapter" / "adapter_model.safetensors").stat().st_size
    listed = {line.split()[0]: line.split()[1:] for line in shown.stdout.splitlines() if line.startswith("  ")}
    assert listed.keys() == ALLOWED and listed["adapter_model.safetensors"] == [f"{size / 1000:.1f}", "kB"]


def test_without_a_token_nothing_begins(
    calm: Hub, run: Path, client: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    refused = client("-m", "llm_dqn", "push", str(run), "me/x", HF_TOKEN="")
    assert refused.returncode == 2 and "no access token for the Hugging Face Hub: log in with" in refused.stderr
    assert calm.requests == []


# --- what is in the bundle, without any Hub --------------------------------------------------------------------------


def contents(run: Path, **options: Any) -> tuple[dict[str, bytes], list[str]]:
    made = bundle(str(run), "me/x", **options)
    read = {u.name: u.content if isinstance(u.content, bytes) else u.content.read_bytes() for u in made.files}
    return read, made.notes


def changed(run: Path, folder: Path, file: str, old: str, new: str) -> Path:
    copy = shutil.copytree(run, folder)
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new))
    return copy


def test_paths_of_this_machine_stay_here(run: Path, tmp_path: Path) -> None:
    copy = changed(
        run, tmp_path / "copy", "recipe.yaml", "train: data/hello_prompts.jsonl", "train: /home/ann/secret/p.jsonl"
    )
    files, notes = contents(copy)
    text = b"".join(files.values())
    assert b"/home/ann" not in text and str(tmp_path.parent).encode() not in text
    assert b"train: p.jsonl" in files["recipe.yaml"] and files["recipe.yaml"].startswith(b"# llm-dqn ")
    assert any("recipe.yaml: data: train" in note and "train: output_dir" in note for note in notes)
    windows = changed(
        run, tmp_path / "w", "recipe.yaml", "train: data/hello_prompts.jsonl", r"train: C:\Users\ann\p.jsonl"
    )
    assert b"ann" not in contents(windows)[0]["recipe.yaml"]


@pytest.mark.parametrize("file", ["recipe.yaml", "adapter/tokenizer_config.json", "evaluation.json", "metrics.jsonl"])
def test_a_token_in_any_file_stops_everything(run: Path, tmp_path: Path, file: str) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    place, name = copy / file, Path(file).name
    if name.endswith(".yaml"):
        place.write_text(place.read_text().replace("run_name: null", f"run_name: {TOKEN}"))
    elif name == "metrics.jsonl":
        place.write_text(place.read_text() + json.dumps({"note": TOKEN}) + "\n")
    else:
        place.write_text(json.dumps(json.loads(place.read_text()) | {"note": TOKEN}))
    with pytest.raises(UserError, match=rf"{name}, line \d+, holds what looks like an access token") as refused:
        contents(copy)
    assert TOKEN not in str(refused.value)


def test_the_own_token_is_found_whatever_it_looks_like(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundling, "get_token", lambda: "oddly-shaped-secret")
    copy = changed(run, tmp_path / "copy", "recipe.yaml", "run_name: null", "run_name: oddly-shaped-secret")
    with pytest.raises(UserError, match="holds what looks like an access token"):
        contents(copy)


def test_the_commit_of_a_base_from_the_hub_is_pinned(run: Path, tmp_path: Path) -> None:
    """As training noted it; or else as it lies in this machine's cache; with the licence that is known there."""
    commit = "0123456789" * 4
    cache = Path(os.environ["HF_HOME"]) / "hub" / "models--someone--base"
    (cache / "snapshots" / commit).mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    (cache / "snapshots" / commit / "config.json").write_text("{}")
    (cache / "snapshots" / commit / "README.md").write_text("---\nlicense: other\nlicense_name: house\n---\n# base\n")
    copy = shutil.copytree(run, tmp_path / "copy")
    file = copy / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": "someone/base"}
    for noted, expected in ((None, commit), ("f" * 40, "f" * 40)):
        file.write_text(json.dumps(config | {"revision": noted}))
        files, notes = contents(copy)
        assert json.loads(files["adapter_config.json"])["revision"] == expected
        assert f"at revision `{expected}`" in files["README.md"].decode()
        assert "license: other\nlicense_name: house" in files["README.md"].decode()
        assert not any("which others do not have" in note for note in notes)


@pytest.mark.parametrize("name", ["x", "a/b/c", "me/with space", "me/--x", "/x", "me/x.git"])
def test_names_that_cannot_be_are_refused_at_once(name: str) -> None:
    with pytest.raises(UserError, match=r"REPO_ID .*give a name like 'owner/name'"):
        check_repo_id("REPO_ID", name)


def test_what_cannot_be_shared_says_so(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder on this machine; give a run folder"):
        bundle("someone/adapter", "me/x")
    with pytest.raises(UserError, match="holds neither a run nor an adapter nor a model"):
        bundle(str(tmp_path), "me/x")
    (tmp_path / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    with pytest.raises(UserError, match="holds no adapter yet"):
        bundle(str(tmp_path), "me/x")
    assert {upload.name for upload in bundle(str(run / "adapter"), "me/x").files} == ALLOWED
