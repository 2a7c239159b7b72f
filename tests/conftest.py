"""What every test may use: no network, one thread, and tiny models that are built once."""

import atexit
import os
import shutil
import tempfile

os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="llm_dqn_tests_")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests import tiny_models

torch.set_num_threads(1)
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def build_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`tiny_models.build` with a fresh folder; equal arguments give the same folder, so treat it as read-only."""
    built: dict[tuple, str] = {}

    def build(architecture: str, **options: object) -> str:
        key = (architecture, *sorted(options.items()))
        if key not in built:
            built[key] = tiny_models.build(architecture, tmp_path_factory.mktemp(architecture), **options)  # type: ignore[arg-type]
        return built[key]

    return build


@pytest.fixture(scope="session")
def tiny_llama_path(build_model: Callable[..., str]) -> str:
    """Folder of a tiny random Llama with untied head, with its tokenizer."""
    return build_model("llama")


@pytest.fixture(scope="session")
def tiny_chat_path(build_model: Callable[..., str]) -> str:
    """The same with a chat template."""
    return build_model("llama", chat=True)


@pytest.fixture(scope="session")
def tokenizer_path(tiny_llama_path: str) -> str:
    """Folder that holds the tiny tokenizer."""
    return tiny_llama_path


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer itself, without chat template."""
    return tiny_models.tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a chat template."""
    return tiny_models.tokenizer(chat=True)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short finished run of hello_world with two checkpoints; copy it before you change it."""
    from llm_dqn.recipe import load_recipe
    from llm_dqn.trainer import DQNTrainer

    folder = tmp_path_factory.mktemp("trained") / "run"
    settings = ["max_steps=48", "save_steps=32", "logging_steps=8", "eval_steps=16", "final_eval_prompts=16"]
    overrides = [f"train.output_dir={folder}", *(f"train.{setting}" for setting in settings)]
    DQNTrainer.from_recipe(load_recipe("hello_world", overrides)).train()
    return folder


@pytest.fixture(params=sorted(tiny_models.ARCHITECTURES))
def architecture_path(request: pytest.FixtureRequest, build_model: Callable[..., str]) -> str:
    """Folder of a tiny model of each architecture in turn; narrow with `indirect` parametrisation."""
    return build_model(request.param)
