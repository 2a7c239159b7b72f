"""Tiny random language models and tokenizers, built in the test run: nothing is downloaded."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SENTENCES = (
    "the film was a quiet joy from start to end",
    "i hated the plot and the noise",
    "what a lovely warm story about two friends",
    "a dull, slow and pointless evening; 3 of 10",
    "The answer is 42. User: hello! Assistant: yes?",
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2}
_GEMMA = _GROUPED | {"head_dim": 8}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}

# Caps and scales are chosen so that forgetting one changes the logits of these small models visibly.
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", _GROUPED),
    "qwen2": ("qwen2", _GROUPED),
    "qwen3": ("qwen3", _GEMMA),
    "gpt2": ("gpt2", _GPT2),
    "gpt_neox": ("gpt_neox", _COMMON),
    "gemma": ("gemma", _GEMMA),
    "gemma2": ("gemma2", _GEMMA | {"final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", _GEMMA | {"final_logit_softcapping": 3.0}),
    "mistral": ("mistral", _GROUPED),
    "phi": ("phi", _COMMON),
    "cohere": ("cohere", _GROUPED | {"logit_scale": 0.25}),
    "granite": ("granite", _GROUPED | {"logits_scaling": 4.0}),
    "opt": ("opt", _COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
}


def tokenizer(chat: bool = False, pad: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 300 tokens that can spell any text; <bos> is never added by itself."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>"] if pad else ["<eos>", "<bos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>" if pad else None
    )
    if chat:
        made.chat_template = CHAT_TEMPLATE
    return made


def build(
    architecture: str, folder: Path | str, vocab_rows: int | None = None, tied: bool | None = None, chat: bool = False
) -> str:
    """Saves a seeded random model of one of `ARCHITECTURES` and its tokenizer in `folder`; returns the path.

    `vocab_rows` is the number of rows of the head (default: the tokenizer's), `tied` shares them with the embedding
    (default: as the architecture does).
    """
    words = tokenizer(chat=chat)
    model = random_model(architecture, vocab_rows or len(words), words, tied)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def random_model(
    architecture: str, vocab_rows: int, words: PreTrainedTokenizerFast, tied: bool | None = None
) -> PreTrainedModel:
    """The model alone, in evaluation mode; the global random state is left as it was."""
    model_type, settings = ARCHITECTURES[architecture]
    options = {
        "vocab_size": vocab_rows,
        "eos_token_id": words.eos_token_id,
        "bos_token_id": words.bos_token_id,
        "pad_token_id": words.pad_token_id,
        "initializer_range": 0.2,  # large enough for predictions that differ from token to token
        "attention_dropout": 0.0,
    }
    if tied is not None:
        options["tie_word_embeddings"] = tied
    config = CONFIG_MAPPING[model_type](**settings, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
