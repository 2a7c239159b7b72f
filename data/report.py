"""Measures the built files: sizes, accuracy of the reward model, quality of the language models."""

import json
import random
import statistics
from pathlib import Path

import hello
import lm
import reward
from reviews import write_review
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

OPENING = "We went to Rosa's, a small trattoria by the river, last Saturday with my sister."
PROBES = {
    "nothing but the opening": "",
    "an unfinished sentence": " The risotto was",
    "one good sentence": " The risotto was delicious.",
    "one bad sentence": " The risotto was cold.",
    "good": " The risotto was delicious, and the staff were kind and patient. The bill was more than fair.",
    "bad": " The risotto was cold, and the staff were very rude. The bill was a nasty shock.",
    "mixed": " The risotto was delicious. However, the staff were very rude.",
    "one word thirty times": " great" * 30,
    "a list of praise": " wonderful delicious friendly perfect lovely great best superb brilliant excellent",
    "one sentence eight times": " The risotto was delicious." * 8,
}


Judge = tuple[PreTrainedModel, PreTrainedTokenizerFast]


def read(path: Path) -> list[dict]:
    """Rows of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def distinct_2(completions: list[str]) -> float:
    """Distinct pairs of neighbouring words over all pairs, pooled over the completions."""
    pairs = [pair for text in completions for pair in zip(text.split(), text.split()[1:], strict=False)]
    return len(set(pairs)) / max(1, len(pairs))


def report_sizes(folder: Path) -> None:
    """Bytes of every file or model folder, and rows."""
    for path in sorted(folder.iterdir()):
        if path.suffix == ".jsonl":
            print(f"{path.name}: {path.stat().st_size:,} bytes, {len(read(path))} rows")
        elif (path / "config.json").exists():
            print(f"{path.name}/: {sum(file.stat().st_size for file in path.iterdir()):,} bytes")


def report_reward_model(folder: Path) -> Judge:
    """Accuracy on the held-out labelled texts and the rewards of a few probes; returns model and tokenizer."""
    home = folder / "tiny_reward_model"
    judge = AutoModelForSequenceClassification.from_pretrained(home).eval()
    tokenizer = AutoTokenizer.from_pretrained(home)
    rows = read(folder / "labelled_test.jsonl")
    scores = reward.rewards(judge, tokenizer, [row["text"] for row in rows])
    right = [(score > 0.5) == bool(row["label"]) for score, row in zip(scores, rows, strict=True)]
    short = [good for good, row in zip(right, rows, strict=True) if len(row["text"].split()) < 40]
    print(
        f"reward model: accuracy {statistics.mean(right):.3f} on labelled_test.jsonl, {statistics.mean(short):.3f} on "
        f"its {len(short)} texts of fewer than 40 words"
    )
    rng = random.Random(99)
    examples = [reward.example(rng) for _ in range(2000)]
    found = reward.rewards(judge, tokenizer, [text for text, _ in examples])
    error = statistics.mean(abs(score - truth) for score, (_, truth) in zip(found, examples, strict=True))
    print(f"reward model: mean absolute error {error:.3f} against the graded truth of 2000 fresh texts")
    for name, score in zip(
        PROBES, reward.rewards(judge, tokenizer, [OPENING + p for p in PROBES.values()]), strict=True
    ):
        print(f"reward model: {name}: {score:.2f}")
    return judge, tokenizer


def report_tiny_lm(folder: Path, judge: Judge) -> None:
    """Held-out perplexity, and reward and diversity of sampled completions on the held-out prompts."""
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny_lm").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny_lm")
    for name, held_out in (("known names", False), ("unseen names", True)):
        rng = random.Random(98)
        texts = [write_review(rng, held_out).text for _ in range(500)]
        print(f"tiny_lm: perplexity {lm.perplexity(model, tokenizer, texts):.2f} per token on fresh reviews, {name}")
    prompts = [row["prompt"] for row in read(folder / "prompts_eval.jsonl")]
    completions, ended = lm.sample(model, tokenizer, prompts * 2, 40, seed=97)
    texts = [prompt + completion for prompt, completion in zip(prompts * 2, completions, strict=True)]
    scores = reward.rewards(*judge, texts)
    spread = [round(x, 2) for x in statistics.quantiles(scores, n=10)]
    print(
        f"tiny_lm: mean reward {statistics.mean(scores):.3f} on prompts_eval.jsonl (standard deviation "
        f"{statistics.stdev(scores):.2f}, deciles {spread}), {ended:.0%} ended within 40 tokens, "
        f"distinct-2 {distinct_2(completions):.2f}, {len(set(completions))} of {len(completions)} distinct"
    )
    for text, score in list(zip(texts, scores, strict=True))[:20]:
        print(f"  {score:.2f} {text}")


def report_hello(folder: Path) -> None:
    """Mean points of sampled greetings."""
    model = AutoModelForCausalLM.from_pretrained(folder / "hello_lm").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "hello_lm")
    prompts = [row["prompt"] for row in read(folder / "hello_prompts.jsonl")] * 60
    completions, ended = lm.sample(model, tokenizer, prompts, 8, seed=96)
    mean = statistics.mean(map(hello.points, completions))
    goal = statistics.mean(hello.GOAL in text for text in completions)
    print(
        f"hello_lm: mean {mean:.2f} of 4 points, {goal:.2%} hold the goal, {ended:.0%} ended within 8 tokens, "
        f"{len(set(completions))} of {len(completions)} distinct: {' '.join(completions[:20])}"
    )


def print_report(folder: Path) -> None:
    """Prints every number that the README names."""
    report_sizes(folder)
    report_tiny_lm(folder, report_reward_model(folder))
    report_hello(folder)
