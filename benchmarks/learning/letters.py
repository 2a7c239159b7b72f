"""Letters to a shop, 60 to 100 words long, judged by a small learned classifier: polite and complete, or not."""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import processors
from transformers import ModernBertConfig, ModernBertForSequenceClassification

from benchmarks.learning.bases import BaseRecipe, Built, base_model, word_tokenizer
from data import lm

ITEMS = ["lamp", "table", "kettle", "chair", "radio", "clock", "carpet", "mirror", "printer", "camera"]
PEOPLE = ["adams", "brown", "clark", "davis", "evans", "foster", "green", "harris", "jones", "king"]
FAULTS = ["broken", "scratched", "late", "wrong", "noisy", "dirty", "cracked", "faded"]
DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday"]
NEUTRAL = (
    "i ordered the ITEM on DAY and it came on DAY .",
    "when i opened the box the ITEM was FAULT .",
    "the number of my order is on the back of this letter .",
    "my neighbour has bought the same ITEM from you last year .",
    "i have put the ITEM back into its box for now .",
    "the ITEM stands in my hall since DAY morning .",
)
POLITE = (
    "i would be most grateful if you could look into this .",
    "thank you very much for the help of your kind staff .",
    "i am sure that this was nothing but an honest mistake .",
    "please take all the time that you need for an answer .",
    "i have always been very happy with your lovely shop .",
    "it would be wonderful if a new ITEM could be sent .",
)
RUDE = (
    "i have never seen such a stupid and lazy shop before .",
    "send me a new ITEM at once or you will regret it .",
    "your useless staff should be ashamed of this FAULT rubbish .",
    "only a fool would pay for a FAULT ITEM like this .",
    "do not dare to waste any more of my time again .",
    "i want my money back now and not on DAY .",
)
CLOSING = "yours sincerely"
SENTENCES = (6, 8)
LENGTH = 92  # tokens a completion may have: with the longest prompt it fits into the context
POLITE_SHARE = 0.42  # of the judging sentences of an ordinary letter

_WORDS = {word for text in (*NEUTRAL, *POLITE, *RUDE, CLOSING) for word in text.split()} - {"ITEM", "DAY", "FAULT"}
VOCABULARY = (*sorted(_WORDS | {*ITEMS, *PEOPLE, *FAULTS, *DAYS, "dear", "mr", "mrs", ",", "my"}),)
BASE = BaseRecipe("letters", {"polite": POLITE_SHARE}, VOCABULARY, steps=500, batch=32, context=128)
JUDGE = {"steps": 500, "seed": 5, "width": 48, "layers": 2, "version": 1}


def opening(rng: random.Random) -> tuple[str, str]:
    """(the first words of a letter, the thing it is about)."""
    item = rng.choice(ITEMS)
    return f"dear {rng.choice(('mr', 'mrs'))} {rng.choice(PEOPLE)} , the {item}", item


def _fill(rng: random.Random, text: str, item: str) -> str:
    words = {"ITEM": item, "DAY": rng.choice(DAYS), "FAULT": rng.choice(FAULTS)}
    return " ".join(words.get(word, word) for word in text.split())


def body(rng: random.Random, item: str, polite: float) -> tuple[list[str], list[bool | None]]:
    """Sentences of a letter, and of each whether it is polite; None where it is neither."""
    # A letter begins with what happened and leans to one side: it is more of one mood than chance would make it.
    leaning = rng.betavariate(2 * polite, 2 * (1 - polite))
    sentences = [f"is {rng.choice(FAULTS)} ."]
    moods: list[bool | None] = [None]
    for _ in range(rng.randint(*SENTENCES)):
        mood = None if rng.random() < 0.35 else rng.random() < leaning
        kind = NEUTRAL if mood is None else POLITE if mood else RUDE
        sentences.append(_fill(rng, rng.choice(kind), item))
        moods.append(mood)
    return sentences, moods


def letter(rng: random.Random, polite: float = POLITE_SHARE) -> str:
    """A whole letter as the base model reads it."""
    start, item = opening(rng)
    return f"{start} {' '.join(body(rng, item, polite)[0])} {CLOSING}"


LETTERS_BASE = base_model(BASE, letter)


def rows(seed: int) -> Iterator[dict[str, str]]:
    """Endless rows: the first three sentences of a letter, and the space that the completion does not begin with."""
    rng = random.Random(seed)
    while True:
        start, item = opening(rng)
        first = _fill(rng, rng.choice(NEUTRAL), item)
        yield {"prompt": f"{start} is {rng.choice(FAULTS)} . {first} {_fill(rng, rng.choice(NEUTRAL), item)} "}


# --- the judge --------------------------------------------------------------------------------------------------------


def graded(rng: random.Random) -> tuple[str, float]:
    """A text and how good a judge finds it: the polite share of what is judged; little where it is cut or nonsense."""
    start, item = opening(rng)
    sentences, moods = body(rng, item, rng.random() * 0.98 + 0.01)
    judged = [mood for mood in moods if mood is not None]
    score = sum(judged) / len(judged) if judged else 0.5
    kind = rng.random()
    if kind < 0.65:
        return f"{start} {' '.join(sentences)} {CLOSING}", 0.05 + 0.9 * score
    if kind < 0.8:
        return f"{start} {' '.join(sentences[: rng.randint(1, 5)])}", 0.1  # breaks off
    if kind < 0.9:
        same = [sentences[0], *[rng.choice(sentences[1:])] * rng.randint(3, 8)]
        return f"{start} {' '.join(same)} {CLOSING}", 0.05  # says one thing over and over
    words = " ".join(sentences).split()
    return f"{start} {' '.join(rng.sample(words, len(words)))}", 0.02


def _train_judge(folder: Path) -> None:
    torch.manual_seed(JUDGE["seed"])
    rng = random.Random(JUDGE["seed"])
    tokenizer = word_tokenizer(VOCABULARY, 160)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    tokenizer.padding_side = "right"
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=JUDGE["width"],
        num_hidden_layers=JUDGE["layers"],
        num_attention_heads=4,
        intermediate_size=2 * JUDGE["width"],
        max_position_embeddings=160,
        global_attn_every_n_layers=1,
        classifier_pooling="mean",
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=None,
        sep_token_id=None,
        num_labels=1,
        problem_type="multi_label_classification",
        dtype="float32",
    )
    model = ModernBertForSequenceClassification(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=JUDGE["steps"], pct_start=0.1)
    model.train()
    for step in range(JUDGE["steps"]):
        texts, scores = zip(*[graded(rng) for _ in range(48)], strict=True)
        inputs = tokenizer(list(texts), return_tensors="pt", padding=True)
        loss = model(**inputs, labels=torch.tensor(scores)[:, None]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 100 == 0 or step == JUDGE["steps"] - 1:
            print(f"judge of letters: step {step}, loss {loss.item():.3f}", flush=True)
    lm.save(model.eval(), tokenizer, folder)


# Folder of a sequence-classification model with one output, whose sigmoid is the reward.
LETTERS_JUDGE = Built("judge-letters", {**JUDGE, "vocabulary": VOCABULARY}, _train_judge)
