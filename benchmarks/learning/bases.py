"""Base language models and judges, built from a seed by a recipe and kept in a cache under the recipe's hash."""

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from data import lm

CACHE = Path(__file__).parents[1] / ".cache"


@dataclass(frozen=True)
class BaseRecipe:
    """Everything that decides which base model comes out.

    corpus: name and parameters of what it reads; "unread" of them: tokens at the start of each text that it is given
    and not trained to write. width, layers, heads: of the Llama model. steps, batch, peak: of its
    training. context: tokens it can read. version: counts changes of the corpus writer itself.
    """

    corpus: str
    parameters: dict[str, float]
    vocabulary: tuple[str, ...]
    steps: int
    batch: int = 64
    width: int = 96
    layers: int = 3
    heads: int = 4
    peak: float = 2e-3
    context: int = 64
    seed: int = 7
    version: int = 1


def cache_folder(*parts: str) -> Path:
    """A folder inside the cache, which keeps itself out of version control."""
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    return CACHE.joinpath(*parts)


def digest(facts: object) -> str:
    """A short hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


class Built:
    """A folder that is built when it is asked for the first time, and kept under a hash of what decides its content."""

    def __init__(self, name: str, facts: object, build: Callable[[Path], None]) -> None:
        self.facts, self.build = facts, build
        self.name = f"{name}-{digest(facts)}"

    def __call__(self) -> Path:
        """The folder; a build that was cut short leaves nothing behind."""
        folder = cache_folder(self.name)
        if not folder.exists():
            unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder.parent))
            try:
                self.build(unfinished)
                (unfinished / "built_from.json").write_text(json.dumps(self.facts, indent=1))
                if not folder.exists():  # another process may have built the same meanwhile
                    os.replace(unfinished, folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        return folder


def word_tokenizer(words: tuple[str, ...], context: int) -> PreTrainedTokenizerFast:
    """One token for each word between spaces."""
    specials = (lm.PAD, lm.EOS, lm.UNKNOWN)
    ids = {word: index for index, word in enumerate([*specials, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=lm.UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in specials])
    return lm.wrap_tokenizer(tokenizer, context, unk_token=lm.UNKNOWN)


Untrained = Callable[[PreTrainedTokenizerFast, BaseRecipe], PreTrainedModel]


def llama(tokenizer: PreTrainedTokenizerFast, recipe: BaseRecipe) -> PreTrainedModel:
    """Untrained, of the recipe's size."""
    return lm.new_llama(tokenizer, recipe.width, recipe.layers, recipe.heads, 2 * recipe.width)


def base_model(recipe: BaseRecipe, write: Callable[[random.Random], str], untrained: Untrained = llama) -> Built:
    """A base LM that has read texts by `write`."""

    def build(folder: Path) -> None:
        torch.manual_seed(recipe.seed)
        tokenizer = word_tokenizer(recipe.vocabulary, recipe.context)
        model = untrained(tokenizer, recipe)
        source = lm.batches(tokenizer, write, recipe.batch, recipe.seed)
        if unread := int(recipe.parameters.get("unread", 0)):
            source = ((ids, labels.index_fill(1, torch.arange(unread), -100)) for ids, labels in source)
        lm.train_lm(model, source, recipe.steps, recipe.peak, recipe.corpus)
        lm.save(model, tokenizer, folder)

    trainer = hashlib.sha256(Path(lm.__file__).read_bytes()).hexdigest()[:12]
    facts = {**asdict(recipe), "trainer": trainer}  # a llama's are as they were when there was nothing else
    return Built(f"base-{recipe.corpus}", facts if untrained is llama else facts | {"model": untrained.__name__}, build)
