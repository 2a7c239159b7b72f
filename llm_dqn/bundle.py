"""What leaves this machine when a run is shared: which files, and what is changed in them on the way.

An allow-list: replay, optimizer, checkpoints and samples (their prompts may be private) are on no list, so they are
never sent. Absolute paths of this machine are cut to their last part; anything that looks like an access token stops
the upload.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import file_digest
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from huggingface_hub import get_token, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from llm_dqn.card import CURVE, Card, Kind, license_of, read_card
from llm_dqn.errors import UserError
from llm_dqn.shipped import lies_here, resolve_path

WEIGHTS = {
    "adapter": ("adapter_model.safetensors", "q_head.safetensors"),
    "model": ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors", "q_head.safetensors"),
    "merged": ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
}
CONFIGS = {
    "adapter": ("adapter_config.json",),
    "model": ("config.json", "generation_config.json"),
    "merged": ("config.json", "generation_config.json", "merge.json"),
}
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
)  # fmt: skip
OF_THE_RUN = ("metrics.jsonl", "evaluation.json")
_TOKEN = re.compile(rb"\b(?:hf|api_org)_[A-Za-z0-9]{20,}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Upload:
    """One file of the repository: its name there, and its bytes or where they lie."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class Bundle:
    """Everything of one upload, and what people should know of it before."""

    kind: Kind
    files: list[Upload]
    notes: list[str]
    local_base: str  # the base model as this machine knows it


def bundle(run: str, repo_id: str, base_model: str | None = None, base_revision: str | None = None) -> Bundle:
    """Collects what `llm-dqn push` sends of a run folder, an adapter folder or the folder of a merged model.

    base_model: the Hub id of the base model, for runs that were trained from a folder. Opens no connection. Raises
    UserError for a folder that holds nothing to share, a repository id that cannot be, and a token in any file.
    """
    check_repo_id("REPO_ID", repo_id)
    if base_model is not None:
        check_repo_id("--base-model", base_model, owner=False)
    artefact, folder, kind = _parts(Path(run).expanduser())
    recipe_file = folder / "recipe.yaml"
    recipe_text = recipe_file.read_text(encoding="utf-8") if recipe_file.is_file() else ""
    local = _named_base(artefact, recipe_text)
    on_hub = base_model is not None or _is_hub_id(local)
    base = base_model or (local if on_hub else _portable_folder(local))
    revision = base_revision or (None if base_model else _revision(artefact, recipe_text, local) if on_hub else None)
    cut: list[str] = []
    portable = _portable_recipe(recipe_text, base, revision, cut) if recipe_text else ""
    card = replace(
        read_card(artefact, folder, repo_id, local, kind, portable), base=base, base_on_hub=on_hub, revision=revision
    )
    card = replace(card, license=card.license or _cached_license(base) if on_hub else card.license)
    uploads = list(_uploads(artefact, folder, card, portable, cut))
    for upload in uploads:
        _refuse_tokens(upload)
    return Bundle(kind, uploads, _notes(cut, kind, on_hub, local), local)


def holds_other_weights(base: str, hashes: Mapping[str, str]) -> bool:
    """Whether a file of the base model's folder has another content than the Hub's of that name, by its sha256."""
    for file in sorted(Path(resolve_path(base)).glob("*.safetensors")) if base else ():
        if file.name in hashes:
            with file.open("rb") as stream:
                if file_digest(stream, "sha256").hexdigest() != hashes[file.name]:
                    return True
    return False


def check_repo_id(argument: str, repo_id: str, owner: bool = True) -> None:
    """UserError for a name that the Hub would not take; with `owner`, one without its owner is none either."""
    try:
        validate_repo_id(repo_id)
        wrong = "" if "/" in repo_id or not owner else "it names no owner"
    except HFValidationError as error:
        wrong = str(error).split(":")[0].rstrip(".")
    if wrong:
        raise UserError(f"{argument} {repo_id}: {wrong}; give a name like 'owner/name'")


def _parts(run: Path) -> tuple[Path, Path, Kind]:
    """(folder with the weights, folder with the run's files, what it is)."""
    for artefact in (run / "adapter", run / "model", run):
        folder = run
        if artefact == run and run.name in ("adapter", "model", "merged") and (run.parent / "recipe.yaml").is_file():
            folder = run.parent
        if (artefact / "adapter_config.json").is_file():
            return artefact, folder, "adapter"
        if (artefact / "config.json").is_file():
            return artefact, folder, "merged" if (artefact / "merge.json").is_file() else "model"
    if (run / "recipe.yaml").is_file():
        raise UserError(f"{run} holds no adapter yet: let `llm-dqn train` finish, or continue it with --resume")
    what = "holds neither a run nor an adapter nor a model" if run.is_dir() else "is no folder on this machine"
    raise UserError(f"{run} {what}; give a run folder, an adapter folder or the folder of a merged model")


# --- the base model ---------------------------------------------------------------------------------------------------


def _named_base(artefact: Path, recipe_text: str) -> str:
    """The base model as the artefact's own files name it."""
    for file, key in (("adapter_config.json", "base_model_name_or_path"), ("merge.json", "base_model")):
        if (artefact / file).is_file():
            return str(_read_json(artefact / file).get(key) or "")
    recipe = yaml.safe_load(recipe_text) or {}
    return str((recipe.get("model") or {}).get("model_name_or_path") or "")


def _revision(artefact: Path, recipe_text: str, base: str) -> str | None:
    """The base model's commit: as it was noted while training, or else as it lies in the cache of this machine."""
    for file, key in (("adapter_config.json", "revision"), ("merge.json", "base_revision")):
        if (artefact / file).is_file() and (noted := _read_json(artefact / file).get(key)):
            return str(noted)
    recipe = yaml.safe_load(recipe_text) or {}
    asked = (recipe.get("model") or {}).get("model_revision")
    cached = try_to_load_from_cache(base, "config.json", revision=asked)
    commit = Path(cached).parent.name if isinstance(cached, str) else ""
    return commit if _COMMIT.fullmatch(commit) else asked


def _is_hub_id(base: str) -> bool:
    return bool(base) and not (lies_here(base) or _is_absolute(base) or base.startswith((".", "/")))


def _portable_folder(path: str) -> str:
    """How a folder of this machine is named to others: recognisably a folder, never to be taken for a Hub id."""
    return f"./{_last(path)}" if _is_absolute(path) else f"./{path.removeprefix('./')}"


def _cached_license(base: str) -> dict[str, str]:
    cached = try_to_load_from_cache(base, "README.md")
    return license_of(Path(cached)) if isinstance(cached, str) else {}


# --- files ------------------------------------------------------------------------------------------------------------


def _uploads(artefact: Path, folder: Path, card: Card, recipe_text: str, cut: list[str]) -> Iterator[Upload]:
    for pattern in WEIGHTS[card.kind]:
        yield from (Upload(file.name, file) for file in sorted(artefact.glob(pattern)))
    for name in TOKENIZER:
        if (artefact / name).is_file():
            yield Upload(
                name, _portable_json(artefact / name, cut) if name == "tokenizer_config.json" else artefact / name
            )
    for name in CONFIGS[card.kind]:
        if (artefact / name).is_file():
            yield Upload(name, _portable_json(artefact / name, cut, _named_again(name, card)))
    for name in OF_THE_RUN:
        if (folder / name).is_file():
            yield Upload(name, folder / name)
    if recipe_text:
        yield Upload("recipe.yaml", recipe_text.encode())
    if card.curve is not None:
        yield Upload(CURVE, card.curve.encode())
    yield Upload("README.md", card.markdown().encode())


def _named_again(file: str, card: Card) -> dict[str, Any]:
    """Under which keys a config names the base model, and how it is named in the repository."""
    keys = {
        "adapter_config.json": ("base_model_name_or_path", "revision"),
        "merge.json": ("base_model", "base_revision"),
    }
    return dict(zip(keys[file], (card.base, card.revision), strict=True)) if file in keys else {}


def _portable_json(file: Path, cut: list[str], changes: Mapping[str, Any] | None = None) -> bytes:
    content = {**_read_json(file), **(changes or {})}
    return (json.dumps(_without_paths(content, file.name, cut), indent=2, ensure_ascii=False) + "\n").encode()


def _portable_recipe(text: str, base: str, revision: str | None, cut: list[str]) -> str:
    """The recipe as others may read it: its comments (the versions), and its values without paths of this machine."""
    comments = "".join(line + "\n" for line in text.splitlines() if line.startswith("#"))
    recipe = yaml.safe_load(text)
    if isinstance(recipe.get("model"), dict):
        recipe["model"] |= {"model_name_or_path": base, "model_revision": revision}
    clean = _without_paths(recipe, "recipe.yaml", cut)
    return comments + yaml.safe_dump(clean, sort_keys=False, allow_unicode=True, width=120)


def _without_paths(value: Any, place: str, cut: list[str]) -> Any:
    """The same with every absolute path cut to its last part; what was cut is noted."""
    if isinstance(value, dict):
        return {key: _without_paths(part, f"{place}: {key}", cut) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_paths(part, place, cut) for part in value]
    if isinstance(value, str) and _is_absolute(value):
        cut.append(place)
        return _last(value)
    return value


def _is_absolute(text: str) -> bool:
    if "\n" in text or len(PureWindowsPath(text).parts) < 2:  # knows both kinds of slashes
        return False
    return PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute() or text.startswith("~")


def _last(path: str) -> str:
    return PureWindowsPath(path).name


def _refuse_tokens(upload: Upload) -> None:
    """UserError where a text that would be sent holds an access token, which is named by its place and never shown."""
    if upload.name.endswith(".safetensors"):
        return
    content = upload.content if isinstance(upload.content, bytes) else upload.content.read_bytes()
    own = get_token()
    for number, line in enumerate(content.splitlines(), start=1):
        if _TOKEN.search(line) or (own and own.encode() in line):
            raise UserError(
                f"{upload.name}, line {number}, holds what looks like an access token, so nothing is uploaded; remove "
                "it from the run, and revoke the token if it was ever shared"
            )


def _notes(cut: list[str], kind: Kind, on_hub: bool, local: str) -> list[str]:
    notes = []
    if cut:
        places = ", ".join(dict.fromkeys(cut))
        notes.append(f"paths of this machine are cut to their last part in the uploaded copy ({places})")
    if not on_hub and kind == "adapter":
        notes.append(
            f"the base model is the folder '{local or 'unknown'}', which others do not have, so they cannot open the "
            "adapter: add --base-model OWNER/NAME with its Hub id, or push the whole model with --merged"
        )
    return notes


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))
