"""What this machine has, in lines that can be pasted into a bug report. No secret is ever shown."""

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
from huggingface_hub import constants, get_token
from transformers import AutoConfig, AutoModelForCausalLM

from llm_dqn import models
from llm_dqn.errors import UserError
from llm_dqn.recipe import mislaid, resolve_path

PACKAGES = ("llm-dqn", "torch", "transformers", "peft", "accelerate", "datasets", "pydantic", "numpy", "trl", "vllm")
GIB = 2**30


def examine(model: str | None = None) -> Iterator[str]:
    """Lines about versions, devices, processes, disk and the Hub; with a model, whether it can be trained.

    Raises UserError for a model that cannot be opened.
    """
    yield f"python {platform.python_version()} on {platform.platform()}"
    yield ", ".join(f"{name} {found}" for name in PACKAGES if (found := _installed(name)))
    yield from _devices()
    gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    yield f"processes: --num-processes works on the CPU: {_said(gloo)}"
    yield f"disk: {shutil.disk_usage('.').free / GIB:.1f} GiB free here, {_cache_free():.1f} GiB in {constants.HF_HOME}"
    offline = ", offline: only what is in its cache can be opened" if constants.HF_HUB_OFFLINE else ""
    yield f"hub: token present: {_said(get_token() is not None)}{offline}"
    if model is not None:
        yield from _model(model)


def _said(value: bool) -> str:
    return "yes" if value else "no"


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> Iterator[str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield f"cpu: {cores} cores, {torch.get_num_threads()} threads used by torch"
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        bf16 = _said(torch.cuda.is_bf16_supported())
        yield f"gpu {index}: {facts.name}, {facts.total_memory / GIB:.0f} GiB, bfloat16: {bf16}"
    if torch.backends.mps.is_available():
        yield "gpu: Apple (mps)"
    elif not torch.cuda.is_available():
        yield "gpu: none; small models train on the CPU"


def _cache_free() -> float:
    folder = constants.HF_HOME
    while not os.path.exists(folder):
        folder = os.path.dirname(folder) or "."
    return shutil.disk_usage(folder).free / GIB


def _model(path: str) -> Iterator[str]:
    """What matters for Q-learning on a vocabulary; no weights are read."""
    if mistyped := mislaid(path):
        raise UserError(mistyped)
    path = resolve_path(path)
    models.check_model_folder(path)
    try:
        config = AutoConfig.from_pretrained(path)
        models.check_causal(path, config)
        tokenizer = models.load_tokenizer(path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise models.loading_error(path, None, "model", error) from error
    rows = models.lm_head(model).weight.shape[0]
    valid = models.num_valid_tokens(model, tokenizer)
    tied = bool(config.get_text_config().tie_word_embeddings)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    yield f"model {path}: {type(model).__name__}, {parameters / 1e6:.1f} M parameters"
    yield f"  output layer tied to the input embedding: {_said(tied)}" + (", untied before it is tuned" if tied else "")
    yield f"  vocabulary: {valid} tokens, {rows} rows" + (
        f"; the last {rows - valid} rows can never be chosen" if rows > valid else ""
    )
    stops = sorted(models.stop_token_ids(model, tokenizer))
    yield f"  ends a completion: {', '.join(tokenizer.convert_ids_to_tokens(stops))}; pads with {tokenizer.pad_token}"
    yield f"  chat template: {_said(bool(tokenizer.chat_template))}"
