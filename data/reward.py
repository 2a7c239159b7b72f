"""The tiny reward model: which texts it learns from, its training, and its scores."""

import random
import time

import torch
from reviews import Review, Sentence, mood_to_score, write_review
from tokenizers import processors
from transformers import ModernBertConfig, ModernBertForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

MAX_LENGTH = 256
NONSENSE = 0.03  # what a text that is no review at all is worth
PRAISE_WORDS = (
    "great good excellent wonderful delicious perfect lovely amazing fantastic beautiful friendly best superb love "
    "loved brilliant gripping recommended stunning unforgettable spotless charming kind happy enjoyed five stars"
)


def partial(rng: random.Random, review: Review) -> tuple[str, float]:
    """The opening with a few sentences, often cut inside one; only what was said so far counts."""
    count = rng.randint(0, len(review.sentences))
    text, mood = review.opening, sum(sentence.mood for sentence in review.sentences[:count])
    for sentence in review.sentences[:count]:
        text += " " + sentence.text
    if count < len(review.sentences) and rng.random() < 0.6:
        text, extra = cut_inside(rng, text, review.sentences[count])
        mood += extra
    return text, mood_to_score(mood)


def cut_inside(rng: random.Random, text: str, sentence: Sentence) -> tuple[str, float]:
    """The text with the beginning of one more sentence; it counts once most of it is there."""
    words = sentence.text.split()
    kept = rng.randint(1, len(words))
    share = kept / len(words)
    return f"{text} {' '.join(words[:kept])}", sentence.mood if share > 0.7 else sentence.mood * 0.4 * (share > 0.5)


def neutral(rng: random.Random, review: Review) -> tuple[str, float]:
    """An opening alone, or with the neutral beginning of a sentence: nothing is judged yet."""
    stubs = [sentence.stub for sentence in review.sentences if sentence.stub]
    text = review.opening
    if stubs and rng.random() < 0.5:
        text += " " + rng.choice(stubs)
    return text, 0.5


def fragment(rng: random.Random, review: Review) -> tuple[str, float]:
    """Judging sentences without the opening."""
    sentences = rng.sample(review.sentences, rng.randint(1, len(review.sentences)))
    return " ".join(sentence.text for sentence in sentences), mood_to_score(sum(s.mood for s in sentences))


def long_text(rng: random.Random, review: Review) -> tuple[str, float]:
    """Two reviews in a row, so that late positions are known too."""
    other = write_review(rng)
    mood = sum(sentence.mood for sentence in review.sentences + other.sentences)
    return f"{review.text} {other.text}", mood_to_score(mood)


def nonsense(rng: random.Random, review: Review) -> tuple[str, float]:
    """What a policy might write to please a naive judge: repetition, lists of praise words, shuffled words."""
    start = review.opening if rng.random() < 0.8 else ""
    words, praise = review.text.split(), PRAISE_WORDS.split()
    kind = rng.randrange(7)
    if kind == 0:
        body = " ".join([rng.choice(praise if rng.random() < 0.7 else words)] * rng.randint(3, 50))
    elif kind == 1:
        body = " ".join(rng.choices(praise, k=rng.randint(4, 50)))
    elif kind == 2:
        body = " ".join(rng.sample(words, rng.randint(len(words) // 2, len(words))))
    elif kind == 3:
        body = " ".join([rng.choice(review.sentences).text] * rng.randint(3, 8))
    elif kind == 4:
        phrase = rng.choice(review.sentences).text.split()
        cut = rng.randrange(len(phrase))
        body = " ".join(phrase[cut : cut + rng.randint(2, 4)] * rng.randint(4, 15))
    elif kind == 5:
        body = " ".join(
            [s.text for s in rng.sample(review.sentences, min(2, len(review.sentences)))] * rng.randint(2, 5)
        )
    else:
        pool = words + praise * 2 + [".", ",", "!", "and", "so", "very"]
        body = " ".join(rng.choices(pool, k=rng.randint(10, 50)))
    if rng.random() < 0.3:
        start = f"{start} {review.sentences[0].text}"
    return f"{start} {body}".strip(), NONSENSE


def whole(rng: random.Random, review: Review) -> tuple[str, float]:
    """The review as it is."""
    return review.text, review.score


def example(rng: random.Random) -> tuple[str, float]:
    """A text and the probability that it is praise."""
    kinds = {partial: 0.42, whole: 0.2, neutral: 0.07, fragment: 0.08, long_text: 0.05, nonsense: 0.18}
    make = rng.choices(list(kinds), list(kinds.values()))[0]
    return make(rng, write_review(rng))


def labelled(rng: random.Random, held_out: bool) -> dict[str, str | int]:
    """A row of the labelled files: a whole or partial review that leans clearly enough to one side."""
    while True:
        review = write_review(rng, held_out)
        text, score = whole(rng, review) if rng.random() < 0.5 else partial(rng, review)
        if not 0.35 < score < 0.65:
            return {"text": text, "label": int(score > 0.5)}


def new_reward_model(tokenizer: PreTrainedTokenizerFast) -> ModernBertForSequenceClassification:
    """A small ModernBERT with one output, trained with binary cross entropy: the reward is sigmoid(logit)."""
    processor = processors.TemplateProcessing(
        single="<cls> $A", pair="<cls> $A $B", special_tokens=[("<cls>", tokenizer.cls_token_id)]
    )
    tokenizer.backend_tokenizer.post_processor = processor
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=2 * MAX_LENGTH,
        global_attn_every_n_layers=1,
        classifier_pooling="mean",
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=None,
        num_labels=1,
        id2label={0: "positive"},
        label2id={"positive": 0},
        problem_type="multi_label_classification",
        dtype="float32",
    )
    return ModernBertForSequenceClassification(config)


def train_reward_model(
    model: ModernBertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    forbidden: set[str],
    seed: int,
) -> None:
    """Binary cross entropy against graded labels on freshly written texts, none of which is in `forbidden`."""
    rng = random.Random(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps, pct_start=0.1)
    model.train()
    started = time.monotonic()
    groups: list[list[tuple[str, float]]] = []
    for step in range(steps):
        if not groups:
            rows = sorted((row for row in (example(rng) for _ in range(1024)) if row[0] not in forbidden), key=length)
            groups = [rows[start : start + 64] for start in range(0, len(rows), 64)]
            rng.shuffle(groups)
        texts, scores = zip(*groups.pop(), strict=True)
        inputs = tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True)
        loss = model(**inputs, labels=torch.tensor(scores)[:, None]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 200 == 0 or step == steps - 1:
            print(f"reward model: step {step}, loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
    model.eval()


def length(row: tuple[str, float]) -> int:
    """How long the text is, to sort by."""
    return len(row[0])


@torch.no_grad()
def rewards(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[float]:
    """The reward of each text, from 0 to 1."""
    found: list[float] = []
    for start in range(0, len(texts), 128):
        inputs = tokenizer(texts[start : start + 128], return_tensors="pt", padding=True, truncation=True)
        found += torch.sigmoid(model(**inputs).logits[:, 0]).tolist()
    return found
