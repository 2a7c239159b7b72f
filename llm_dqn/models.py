"""Loads the base language model and its tokenizer, and knows how a model turns hidden states into logits.

Everything that can be wrong with a model is said here, before the first step and in one sentence.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llm_dqn.errors import NotReachable, UserError

logger = logging.getLogger(__name__)

# Tokens that vocabularies keep free, in the order in which they are taken as padding.
_RESERVED = (re.compile(r"(?i)pad"), re.compile(r"(?i)reserved|unused|extra_?\d+|placeholder"))
_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>")
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_LOADING_ERRORS = (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError)


def load_tokenizer(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or Hub id, with a padding token; `UserError` where that cannot be had."""
    check_reachable(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except _LOADING_ERRORS as error:
        raise loading_error(path, revision, "tokenizer", error) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of '{path}' has no end-of-sequence token, so no completion could ever end; "
            'add "eos_token" to its tokenizer_config.json'
        )
    ensure_pad_token(tokenizer, path)
    return tokenizer


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Gives a tokenizer without padding token a reserved one that no text uses, or else its end-of-sequence token."""
    if tokenizer.pad_token_id is not None:
        return
    vocabulary = tokenizer.get_vocab()
    named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    added = [token for token in tokenizer.get_added_vocab() if token not in named]
    reserved = [token for token in _PAD_NAMES if token in vocabulary]
    reserved += [token for pattern in _RESERVED for token in added if pattern.search(token)]
    for candidate in [*reserved, tokenizer.eos_token, tokenizer.unk_token, tokenizer.convert_ids_to_tokens(0)]:
        if candidate is not None:
            tokenizer.pad_token = candidate
            masked = "; padding is masked, so ends are still learned" if candidate == tokenizer.eos_token else ""
            logger.warning("the tokenizer of '%s' has no padding token: %s is used%s", path, candidate, masked)
            return


def load_causal_lm(
    path: str,
    revision: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    use_safetensors: bool = True,
) -> PreTrainedModel:
    """A decoder-only language model in evaluation mode, all of its weights read from files.

    use_safetensors: False also opens pickled weights, by torch's unpickler of tensors alone.
    """
    if dtype not in _DTYPES:
        raise UserError(f"dtype: '{dtype}' is not one of {', '.join(_DTYPES)}")
    load_config(path, revision, trust_remote_code, use_safetensors)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True if use_safetensors else None,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # damaged files make the parsers below raise of every kind
        raise loading_error(path, revision, "model", error) from error
    model, loading = loaded
    refuse_missing_weights(path, loading["missing_keys"])
    model.config._commit_hash = commit_of(path, revision)  # transformers itself notes it in some versions only
    return model.eval()


def commit_of(path: str, revision: str | None = None) -> str | None:
    """The commit at which a Hub model lies in the cache; None for a folder."""
    found = None if Path(path).is_dir() else try_to_load_from_cache(path, "config.json", revision=revision)
    match = re.search(r"snapshots/([0-9a-f]{40})/", Path(found).as_posix()) if isinstance(found, str) else None
    return match[1] if match else None


def load_config(
    path: str, revision: str | None = None, trust_remote_code: bool = False, use_safetensors: bool = True
) -> PreTrainedConfig:
    """What a decoder-only language model says of itself, in no time; `UserError` for a model that cannot be used."""
    check_model_folder(path)
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except _LOADING_ERRORS as error:
        raise loading_error(path, revision, "model", error) from error
    check_causal(path, config)
    if use_safetensors:
        check_safetensors(path)
    return config


def context_length(config: PreTrainedConfig) -> int | None:
    """How many tokens, prompt and completion together, the model was made to read; None where it does not say."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def check_causal(path: str, config: PreTrainedConfig) -> None:
    """`UserError` for a model that does not predict the next token."""
    name = (config.architectures or [type(config).__name__])[0]
    if config.is_encoder_decoder:
        raise UserError(
            f"'{path}' is {name}, a sequence-to-sequence model; llm_dqn needs a decoder-only language model"
        )
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    speaks = not config.architectures or any(name.endswith(_CAUSAL) for name in config.architectures)
    if not known or not speaks:
        raise UserError(
            f"'{path}' is {name}, which does not predict the next token; llm_dqn needs a decoder-only language model "
            "(an architecture named ...ForCausalLM or ...LMHeadModel)"
        )


def check_reachable(path: str) -> None:
    """`UserError` for a local path that does not exist; Hub ids pass."""
    folder = Path(path).expanduser()
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path or path.endswith("/")
    if looks_local and not folder.is_dir():
        raise UserError(f"'{path}' is not a folder; give a local model folder or a Hub id like 'owner/name'")


def check_model_folder(path: str) -> None:
    """`UserError` for a path that cannot be a model; Hub ids pass."""
    check_reachable(path)
    folder = Path(path).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        adapter = " but an adapter; give its base model here" if (folder / "adapter_config.json").is_file() else ""
        raise UserError(f"'{path}' has no config.json, so it is not a Hugging Face model folder{adapter}")


def hub_file(hub_id: str, filename: str, revision: str | None = None) -> Path | None:
    """One file of a Hub repository, from the cache or downloaded; None if it cannot be had."""
    try:
        return Path(hf_hub_download(hub_id, filename, revision=revision))
    except (HfHubHTTPError, HFValidationError, OSError):  # OSError: no network and nothing in the cache
        return None


def check_safetensors(path: str) -> None:
    """`UserError` for a local folder that holds pickled weights only."""
    folder = Path(path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise UserError(_no_safetensors(path) if any(folder.glob("*.bin")) else f"'{path}' holds no *.safetensors file")


def _no_safetensors(path: str) -> str:
    return (
        f"'{path}' has pickled weights (.bin) only, which can run code when opened; convert them once with "
        "model.save_pretrained(folder), or set model.use_safetensors: false if it is to be tuned and you trust them"
    )


def refuse_missing_weights(path: str, missing: Iterable[str]) -> None:
    """`UserError` where a model asks for weights that its files do not have and would start at random."""
    if names := sorted(missing):
        shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
        raise UserError(f"the files of '{path}' lack {len(names)} weights that would start at random: {shown}")


def loading_error(path: str, revision: str | None, part: str, error: BaseException) -> UserError:
    """What went wrong while a model or tokenizer was loaded, in one sentence for people."""
    text = str(error)
    where = f"'{path}'" + (f" at revision '{revision}'" if revision else "")
    if "trust_remote_code" in text:
        return UserError(
            f"{where} brings its own code; if you trust it, set trust_remote_code: true (pin model_revision)"
        )
    if "tokenizer" in part and Path(path).is_dir() and isinstance(error, OSError | ValueError):
        return UserError(f"{where} holds no usable tokenizer; save one there with tokenizer.save_pretrained(folder)")
    if isinstance(error, OSError) and "safetensors" in text:
        return UserError(_no_safetensors(path))
    if isinstance(error, OSError) and not Path(path).is_dir():
        return NotReachable(f"{where} is neither a local folder nor reachable on the Hub ({_first_sentence(text)})")
    if "weights_only" in text:
        return UserError(f"the weights of {where} hold more than tensors, which could run code; they were not opened")
    damaged = "; the file is damaged or was not copied whole" if isinstance(error, SafetensorError) else ""
    return UserError(
        f"the {part} {where} could not be loaded: {type(error).__name__}: {_first_sentence(text)}{damaged}"
    )


def _first_sentence(text: str) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
    return line if len(line) <= 300 else line[:297] + "..."


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every id that ends a completion: tokenizer, model and generation settings together."""
    generation = getattr(model, "generation_config", None)
    named = (
        tokenizer.eos_token_id,
        model.config.get_text_config().eos_token_id,
        getattr(generation, "eos_token_id", None),
    )
    ids: set[int] = set()
    for value in named:
        ids.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    valid = num_valid_tokens(model, tokenizer)
    ids = {int(token) for token in ids if 0 <= token < valid}
    if not ids:
        raise UserError("neither the tokenizer nor the model names an end-of-sequence token; set eos_token")
    return ids


def check_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """`UserError` for a tokenizer that writes ids which the model has no rows for; needs no weights."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if isinstance(rows, int):
        _tokens_within(rows, tokenizer)


def num_valid_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many rows of the output layer may be chosen: those that the tokenizer can spell. Rows beyond are padding."""
    return _tokens_within(lm_head(model).weight.shape[0], tokenizer)


def _tokens_within(rows: int, tokenizer: PreTrainedTokenizerBase) -> int:
    size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)  # ids may have gaps
    if size > rows:
        raise UserError(
            f"the tokenizer has {size} tokens but the model only {rows} rows; the two do not belong together, or call "
            "model.resize_token_embeddings(len(tokenizer)) and save the model again"
        )
    return size


def trunk(model: PreTrainedModel) -> nn.Module:
    """The transformer under the output layer; its `last_hidden_state` is what the output layer reads."""
    body = model.base_model
    if body is model:
        raise UserError(f"{type(model).__name__} has no transformer apart from its output layer")
    return body


def lm_head(model: PreTrainedModel) -> nn.Linear:
    """The output layer, hidden (..., H) -> (..., rows)."""
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"{type(model).__name__} has no output layer over the vocabulary")
    return head


def head_postprocess(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """What the architecture does to the output of its head before it calls it logits; elementwise and increasing."""
    config = model.config.get_text_config()

    def number(*names: str, default: float) -> float:
        for name in names:
            value = getattr(config, name, None)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
        return default

    # Cohere and Falcon-H1 multiply, Granite and MiniCPM divide, Gemma, RecurrentGemma and xLSTM cap.
    factor = number("logit_scale", "lm_head_multiplier", default=1.0)
    divisor = number("logits_scaling", default=1.0)
    cap = number("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", default=0.0)

    def postprocess(logits: Tensor) -> Tensor:
        logits = logits if factor == 1.0 else logits * factor
        logits = logits if divisor == 1.0 else logits / divisor
        return torch.tanh(logits / cap) * cap if cap else logits

    return postprocess


@torch.no_grad()
def verify_head_shortcut(model: PreTrainedModel) -> None:
    """Proves on random tokens that trunk -> head -> postprocess gives the model's own logits, or raises `UserError`.

    Also refuses a model in which a later token changes an earlier prediction, since then no prefix is a state.
    """
    rows, name = lm_head(model).weight.shape[0], type(model).__name__
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(rows, (2, 8), generator=generator).to(lm_head(model).weight.device)
    mask = torch.ones_like(ids)
    training = model.training
    model.eval()
    try:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        hidden = trunk(model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        ours = head_postprocess(model)(lm_head(model)(hidden))
        changed = ids.clone()
        changed[:, -1] = (changed[:, -1] + 1) % rows
        other = model(input_ids=changed, attention_mask=mask, use_cache=False).logits.float()
    finally:
        model.train(training)
    if not logits.isfinite().all():
        broken = [key for key, weight in model.named_parameters() if not weight.isfinite().all()][:3]
        said = (
            f"its weights are damaged ({', '.join(broken)})" if broken else "its weights are finite; try another dtype"
        )
        raise UserError(f"{name} predicts NaN or infinity: {said}")
    tolerance = (1e-5 if ours.dtype == torch.float32 else 2e-2) * max(1.0, logits.abs().max().item())
    difference = (ours - logits).abs().max().item()
    if not difference <= tolerance:
        raise UserError(
            f"{name} computes its logits in a way llm_dqn does not know (max difference {difference:.3g}); "
            "use another model or open a request naming this class"
        )
    if not (other - logits)[:, :-1].abs().max().item() <= 10 * tolerance:
        raise UserError(f"{name} lets earlier predictions see later tokens; llm_dqn needs a causal language model")


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """32 bytes that say which token has which id: equal for tokenizers that read stored token ids alike."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).digest()


def untie_head(model: PreTrainedModel) -> None:
    """Gives the output layer its own copy of the weights that it shares with the input embedding.

    Only for adapters on the output layer: merged into shared weights they would change the input as well. The model is
    loaded tied and untied here, since asking for an untied one while loading starts the head at random.
    """
    head = lm_head(model)
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}
