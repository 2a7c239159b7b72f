"""Turns base + adapter into a plain Hugging Face model, and proves that it is the same before anything is written.

Merging adds each adapter's product to the weights it sits on, W + s B A. That is exact up to rounding, except where a
weight serves two places: with tied embeddings an adapter on the output layer would change the input as well (and some
versions of PEFT add it twice). So nothing is believed: base + adapter, opened as plain PEFT opens it, and the merged
model answer the same texts, and only equal answers are written. One model at a time is in memory, in float32.
"""

import gc
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import file_digest
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm_dqn import __version__, data, models
from llm_dqn.card import read_card
from llm_dqn.errors import RunError, UserError
from llm_dqn.opening import Named, locate

TOLERANCE = 1e-5  # largest difference of logits over the largest logit, in float32
DTYPES = ("auto", "float32", "bfloat16", "float16")
REAL_TEXTS, RANDOM_TEXTS, TEXT_TOKENS, NEW_TOKENS = 6, 4, 64, 16
NOT_MERGEABLE = (AttributeError, NotImplementedError, ValueError, TypeError, RuntimeError)


class MergeError(RunError):
    """Base + adapter and the merged model are not the same, or the files could not be written."""

    heading = "the merge failed"


@dataclass(frozen=True)
class Proof:
    """How base + adapter and the merged model compared. Differences are relative to the largest logit.

    positions: token positions at which all logits were compared. reloaded_difference: of the files, opened with plain
    transformers, against the model they were written from. rounding_*: what a coarser `dtype` then changed.
    """

    probes: int
    real_texts: int
    positions: int
    relative_difference: float
    tolerance: float
    greedy_tokens: int
    greedy_equal: bool
    untied_head: bool
    dtype: str = "float32"
    reloaded_difference: float = 0.0
    rounding_difference: float = 0.0
    rounding_greedy_equal: float = 1.0

    @property
    def holds(self) -> bool:
        """Whether the two are the same model."""
        return self.relative_difference <= self.tolerance and self.greedy_equal

    def __str__(self) -> str:
        return (
            f"logits of base + adapter and merged model differ by {self.relative_difference:.2g} of the largest "
            f"(allowed: {self.tolerance:.0e}) on {self.probes} texts, {self.positions} positions; "
            f"greedy tokens {'equal' if self.greedy_equal else 'differ'}"
        )


@dataclass(frozen=True)
class Probe:
    """A text whose every position is compared, and its beginning, which both models continue greedily."""

    text: list[int]
    prompt: list[int]


@dataclass(frozen=True)
class Answers:
    """What a model says of the probes: logits (L, rows) each, float32, and the tokens it goes on with."""

    logits: list[Tensor]
    greedy: list[list[int]]


def merge(run: str, out: str, dtype: str = "auto", say: Callable[[str], None] = print) -> Proof:
    """Writes the merged model of a run, an adapter folder or a Hub adapter to the new folder `out`.

    dtype: of the written weights; "auto" keeps the base model's. The proof is made in float32 before rounding, and what
    rounding changes is measured after it. Raises UserError for what cannot be merged, MergeError where the proof fails.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: not one of {', '.join(DTYPES)}")
    target = Path(out).expanduser()
    if target.exists():
        raise UserError(f"{out} exists already; remove it or choose another folder")
    named = locate(run)
    _check_mergeable(named)
    tokenizer = named.load_tokenizer()
    written_as = _stored_dtype(named) if dtype == "auto" else dtype
    probes, real_texts = _probes(named, tokenizer)
    say(f"comparing base + adapter with the merged model on {len(probes)} texts ...")
    reference = _answers(_with_adapter(named, untie=False), probes)
    model, proof = _proven_merge(named, probes, reference)
    proof = replace(proof, real_texts=real_texts, dtype=written_as)
    say(f"proven: {proof}")
    _round_weights(model, getattr(torch, written_as))
    with _finished_folder(target) as folder:
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        _round_weights(model, torch.float32)
        expected = _answers(model, probes)
        del model
        proof = _reloaded(folder, probes, expected, reference, proof)
        _describe(folder, named, out, proof)
    say(f"{out} written as {proof.dtype}; opened again, it differs by {proof.reloaded_difference:.2g}")
    return proof


def merge_beside(run: str, say: Callable[[str], None] = print) -> str:
    """The merged model in the folder `merged` of a run, or beside an adapter; made again when the adapter changed.

    Returns the folder. A run that was tuned whole, or a merged model itself, is returned as it is.
    """
    named = locate(run)
    place = Path(named.name)
    if not place.is_dir():
        raise UserError(f"--merged: {run} is no folder on this machine; merge it first: llm-dqn merge {run} OUT")
    if named.adapter is None:
        return run
    out = place / "merged" if named.recipe is not None else place.with_name(f"{place.name}-merged")
    if out.exists() and _is_merge_of(out, named):
        say(f"{out} holds this adapter merged and proven already")
    else:
        if (out / "merge.json").is_file():
            shutil.rmtree(out)  # of an earlier adapter
        merge(run, str(out), say=say)
    return str(out)


def _is_merge_of(folder: Path, named: Named) -> bool:
    record = folder / "merge.json"
    facts = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    return facts.get("adapter_sha256") == _adapter_hash(named)


# --- what can be merged -----------------------------------------------------------------------------------------------


def _check_mergeable(named: Named) -> None:
    if named.tuned is not None:
        raise UserError(
            f"{named.name} was tuned whole, so there is nothing to merge: {named.tuned} is a plain Hugging Face model; "
            "copy that folder"
        )
    if named.adapter is None:
        raise UserError(f"{named.name} is a plain model without adapter: there is nothing to merge")
    _adapter_weights(named)
    config = _base_config(named)
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"the base model '{named.base}' is quantized, and merging into rounded weights is not exact; train on, or "
            "name in adapter_config.json, its unquantized original"
        )


def _adapter_weights(named: Named) -> Path:
    """The adapter's weights; UserError where they are pickled or missing."""
    adapter = str(named.adapter)
    name = "adapter_model.safetensors"
    file = Path(adapter) / name if Path(adapter).is_dir() else models.hub_file(adapter, name)
    if file is None or not file.is_file():
        raise UserError(f"{adapter} has no {name}; pickled weights are not opened: save it again with a recent PEFT")
    return file


def _adapter_hash(named: Named) -> str:
    with _adapter_weights(named).open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


def _base_config(named: Named) -> Any:
    models.check_model_folder(named.base)
    try:
        return AutoConfig.from_pretrained(
            named.base, revision=named.revision, trust_remote_code=named.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise models.loading_error(named.base, named.revision, "model", error) from error


def _stored_dtype(named: Named) -> str:
    """The type of the base model's weights as its config says; float32, which loses nothing, where it does not."""
    config = _base_config(named)
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    name = str(stored).removeprefix("torch.")
    return name if name in DTYPES else "float32"


# --- the proof --------------------------------------------------------------------------------------------------------


def _probes(named: Named, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Probe], int]:
    """Texts that the run wrote, as many as are known, and random tokens that no adapter was made for."""
    folder = Path(named.name)
    folder = folder.parent if folder.name == "adapter" and named.recipe is None else folder
    real = list(_texts_of_the_run(folder / "samples.jsonl", tokenizer))
    generator = torch.Generator().manual_seed(0)
    rows = min(len(tokenizer), _base_config(named).get_text_config().vocab_size)
    random = [torch.randint(rows, (TEXT_TOKENS // 2,), generator=generator).tolist() for _ in range(RANDOM_TEXTS)]
    return real + [Probe(ids, ids[:8]) for ids in random], len(real)


def _texts_of_the_run(samples: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Probe]:
    if not samples.is_file():
        return
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines() if line.strip()]
    for line in lines[:: max(1, len(lines) // REAL_TEXTS)][:REAL_TEXTS]:
        chat = not isinstance(line["prompt"], str)
        prompt = data.render_chat(line["prompt"], tokenizer) if chat else line["prompt"]
        asked, whole = data.encode_texts([prompt, prompt + line["completion"]], tokenizer, chat=chat)
        if asked:
            yield Probe(whole[:TEXT_TOKENS], asked[:TEXT_TOKENS])


@contextmanager
def _without_warnings() -> Iterator[None]:
    """PEFT warns of tied weights wherever there are any; here it is measured whether they matter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"peft\.")
        yield


def _with_adapter(named: Named, untie: bool) -> PeftModel:
    """Base + adapter in float32, as plain PEFT opens it; `untie` gives a tied output layer its own weights first."""
    base = named.load_base("float32")
    if untie:
        models.untie_head(base)
    try:
        with _without_warnings():
            return PeftModel.from_pretrained(base, str(named.adapter)).eval()
    except (*NOT_MERGEABLE, OSError, KeyError) as error:
        raise UserError(f"the adapter {named.adapter} does not open on '{named.base}': {_first_line(error)}") from error


def _proven_merge(named: Named, probes: Sequence[Probe], reference: Answers) -> tuple[PreTrainedModel, Proof]:
    """The merged model and its proof. A tied output layer stays tied where that is exact, and is untied where not."""
    failed = ""
    for untie in (False, True):
        gc.collect()
        opened = _with_adapter(named, untie)
        tied = models.lm_head(opened.get_base_model()).weight is opened.get_input_embeddings().weight
        try:
            with _without_warnings():
                merged = opened.merge_and_unload()
        except NOT_MERGEABLE as error:
            kind = named.adapter_config.get("peft_type", "?")
            raise UserError(
                f"this {kind} adapter cannot be merged: {_first_line(error)}; serve base + adapter instead"
            ) from error
        proof = _compare(reference, _answers(merged, probes), untie)
        if proof.holds:
            return merged, proof
        failed = failed or str(proof)
        if not tied and not _ties(named):
            break
        del opened, merged
    raise MergeError(
        f"nothing was written, because merging {named.adapter} is not exact: {failed}; serve base + adapter instead"
    )


def _ties(named: Named) -> bool:
    return bool(getattr(_base_config(named).get_text_config(), "tie_word_embeddings", False))


@torch.no_grad()
def _answers(model: PreTrainedModel | PeftModel, probes: Sequence[Probe]) -> Answers:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=0, eos_token_id=None
    )
    logits, greedy = [], []
    for probe in probes:
        text, prompt = (torch.tensor([ids], device=device) for ids in (probe.text, probe.prompt))
        answer = model(input_ids=text, attention_mask=torch.ones_like(text), use_cache=False)
        logits.append(answer.logits[0].float().cpu())
        mask = torch.ones_like(prompt)
        written = model.generate(input_ids=prompt, attention_mask=mask, generation_config=settings)
        greedy.append(written[0, len(probe.prompt) :].tolist())
    return Answers(logits, greedy)


def _compare(reference: Answers, other: Answers, untied: bool = False) -> Proof:
    tokens = [a == b for x, y in zip(reference.greedy, other.greedy, strict=True) for a, b in zip(x, y, strict=True)]
    return Proof(
        probes=len(reference.logits),
        real_texts=0,
        positions=sum(len(logits) for logits in reference.logits),
        relative_difference=_difference(reference, other),
        tolerance=TOLERANCE,
        greedy_tokens=len(tokens),
        greedy_equal=all(tokens),
        untied_head=untied,
        rounding_greedy_equal=sum(tokens) / len(tokens),
    )


def _difference(reference: Answers, other: Answers) -> float:
    """Largest difference of any logit, over the largest logit; infinite where a number is missing."""
    largest = max(float(logits.abs().max()) for logits in reference.logits)
    pairs = zip(reference.logits, other.logits, strict=True)
    worst = max(float((a - b).abs().max()) if a.shape == b.shape else float("inf") for a, b in pairs)
    return worst / max(largest, 1e-12) if worst == worst else float("inf")


# --- writing ----------------------------------------------------------------------------------------------------------


def _round_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Weights alone: `model.to` would also round tables, such as those of rotary positions, that no file holds."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@contextmanager
def _finished_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes it when all went well, and vanishes otherwise."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from error
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp's is the owner's alone
        os.rename(folder, target)
    except OSError as error:
        raise MergeError(f"{target} could not be written: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _reloaded(folder: Path, probes: Sequence[Probe], expected: Answers, reference: Answers, proof: Proof) -> Proof:
    """The proof with what the written files say, opened with plain transformers; MergeError if it is another thing."""
    gc.collect()
    found = _answers(models.load_causal_lm(str(folder), dtype="float32"), probes)
    reloaded, rounded = _compare(expected, found), _compare(reference, found)
    if not reloaded.holds:
        raise MergeError(f"nothing was kept, because the written files do not open as the merged model: {reloaded}")
    return replace(
        proof,
        reloaded_difference=reloaded.relative_difference,
        rounding_difference=rounded.relative_difference,
        rounding_greedy_equal=rounded.rounding_greedy_equal,
    )


def _describe(folder: Path, named: Named, place: str, proof: Proof) -> None:
    """`merge.json` and the model card."""
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    facts = {
        "base_model": named.base,
        "base_revision": named.revision,
        "adapter_sha256": _adapter_hash(named),
        "proof": asdict(proof),
        "versions": {"llm-dqn": __version__, **versions},
    }
    (folder / "merge.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    read_card(folder, Path(named.name), place, named.base, "merged").write(folder)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
