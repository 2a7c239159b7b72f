"""Tokenizers and tiny Llama language models: training from scratch and sampling."""

import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def byte_level_tokenizer(texts: list[str], vocab_size: int, specials: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer learned from the texts; any text can be encoded and decoded without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def character_tokenizer(characters: str) -> Tokenizer:
    """A tokenizer with one token a character; characters outside become `<unk>`."""
    words = [PAD, EOS, UNKNOWN, *dict.fromkeys(characters)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in (PAD, EOS, UNKNOWN)])
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer, max_length: int, **specials: str) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers knows it; padding on the left, as generation needs it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        pad_token=PAD,
        eos_token=EOS,
        **specials,
    )


def new_llama(tokenizer: PreTrainedTokenizerFast, width: int, layers: int, heads: int, inner: int) -> LlamaForCausalLM:
    """A Llama model with random weights and tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def pad_batch(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels, both (rows, longest); the labels are -100 on the padding."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
    return ids, labels


def encode_ended(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of every text, the end-of-sequence token after each."""
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def batches(
    tokenizer: PreTrainedTokenizerFast, write: Callable[[random.Random], str], size: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of freshly written texts, of similar lengths inside a batch."""
    rng = random.Random(seed)
    while True:
        rows = encode_ended(tokenizer, [write(rng) for _ in range(size * 16)])
        rows.sort(key=len)
        groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        rng.shuffle(groups)
        for group in groups:
            yield pad_batch(group, tokenizer.pad_token_id)


def cosine(step: int, steps: int, warmup: int) -> float:
    """The share of the peak learning rate at this step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_lm(model: LlamaForCausalLM, source: Iterator, steps: int, peak: float, name: str) -> None:
    """Ordinary next-token training, Muon for the matrices and AdamW for the rest, with a cosine schedule."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    optimisers = [
        torch.optim.Muon(matrices, lr=5 * peak, weight_decay=0.05),
        torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.98), weight_decay=0.05),
    ]

    def share(step: int) -> float:
        return cosine(step, steps, min(60, steps // 5))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimiser, share) for optimiser in optimisers]
    model.train()
    started = time.monotonic()
    for step in range(steps):
        ids, labels = next(source)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        for schedule in schedules:
            schedule.step()
        model.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"{name}: step {step}, loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
    model.eval()


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """The perplexity per token over the texts, the end-of-sequence token included."""
    total, count = 0.0, 0
    rows = sorted(encode_ended(tokenizer, texts), key=len)
    for start in range(0, len(rows), 64):
        ids, labels = pad_batch(rows[start : start + 64], tokenizer.pad_token_id)
        tokens = int((labels[:, 1:] != -100).sum())
        total += model(input_ids=ids, labels=labels).loss.item() * tokens
        count += tokens
    return math.exp(total / count)


@torch.no_grad()
def sample(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], new_tokens: int, seed: int
) -> tuple[list[str], float]:
    """A completion of each prompt at temperature 1, and the share of them that ended by themselves."""
    torch.manual_seed(seed)
    completions, ended = [], 0
    for start in range(0, len(prompts), 128):
        inputs = tokenizer(prompts[start : start + 128], return_tensors="pt", padding=True)
        output = model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=new_tokens)
        written = output[:, inputs["input_ids"].shape[1] :]
        ended += int((written == tokenizer.eos_token_id).any(dim=1).sum())
        completions += tokenizer.batch_decode(written, skip_special_tokens=True)
    return completions, ended / len(prompts)


def save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes an ordinary Hugging Face folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    # The class name that every version of transformers knows.
    settings.write_text(settings.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))
    for file in folder.iterdir():
        file.chmod(0o644)
