"""Makes every file of this folder from nothing but the grammar files and a seed.

`python data/build.py` writes all files, `python data/build.py --report` measures the ones that are there.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hello
import lm
import reward
import torch
from report import print_report
from reviews import Review, write_review
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).parent
SEED = 20
VOCABULARY = 1792
PROMPT_TOKENS = (10, 32)
NEW_TOKENS = 40


def write_text(rng: random.Random) -> str:
    """A review as the language model reads it."""
    return write_review(rng).text


def write_rows(name: str, rows: list[dict]) -> None:
    """Writes JSON lines."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (HERE / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_rows(name: str) -> list[dict]:
    """Reads JSON lines."""
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


def prompt_of(rng: random.Random, review: Review) -> str:
    """The opening, or in a third of the cases the opening and the neutral beginning of the first judging sentence."""
    stub = review.sentences[0].stub
    return f"{review.opening} {stub}" if stub and rng.random() < 0.65 else review.opening


def distinct(write: Callable[[], dict], key: str, count: int, taken: set[str]) -> Iterator[dict]:
    """`count` rows whose `key` is not in `taken`, which grows."""
    while count:
        row = write()
        if row[key] not in taken:
            taken.add(row[key])
            count -= 1
            yield row


def build_texts() -> None:
    """The labelled rows, the test rows with names that the training rows lack."""
    rng, taken = random.Random(SEED), set[str]()
    write_rows("labelled_test.jsonl", list(distinct(lambda: reward.labelled(rng, True), "text", 500, taken)))
    write_rows("labelled_train.jsonl", list(distinct(lambda: reward.labelled(rng, False), "text", 2000, taken)))


def build_tiny_lm(effort: float) -> None:
    """Tokenizer and language model for reviews."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED + 1)
    texts = [write_text(rng) for _ in range(20_000)]
    tokenizer = lm.wrap_tokenizer(lm.byte_level_tokenizer(texts, VOCABULARY, [lm.PAD, lm.EOS]), 512)
    model = lm.new_llama(tokenizer, width=160, layers=4, heads=5, inner=384)
    source = lm.batches(tokenizer, write_text, 16, SEED + 2)
    lm.train_lm(model, source, round(3000 * effort), 4e-3, "tiny_lm")
    lm.save(model, tokenizer, HERE / "tiny_lm")


def build_reward_model(effort: float) -> None:
    """The judge of the reviews, with its own tokenizer."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED + 3)
    texts = [write_text(rng) for _ in range(20_000)]
    backend = lm.byte_level_tokenizer(texts, VOCABULARY, [lm.PAD, lm.EOS, "<cls>"])
    tokenizer = lm.wrap_tokenizer(backend, reward.MAX_LENGTH, cls_token="<cls>")
    tokenizer.padding_side = "right"
    model = reward.new_reward_model(tokenizer)
    forbidden = {row["text"] for row in read_rows("labelled_test.jsonl")}
    reward.train_reward_model(model, tokenizer, round(3000 * effort), forbidden, SEED + 4)
    lm.save(model, tokenizer, HERE / "tiny_reward_model")


def build_prompts() -> None:
    """Prompts for training, and others, with names that no training text knows, for evaluation."""
    tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny_lm")
    taken: set[str] = set()
    for name, count, held_out in (("prompts_eval", 256, True), ("prompts_train", 1536, False)):
        rng = random.Random(SEED + 5 + held_out)

        def write(rng: random.Random = rng, held_out: bool = held_out) -> dict:
            while True:
                prompt = prompt_of(rng, write_review(rng, held_out))
                if PROMPT_TOKENS[0] <= len(tokenizer(prompt)["input_ids"]) <= PROMPT_TOKENS[1]:
                    return {"prompt": prompt}

        write_rows(f"{name}.jsonl", list(distinct(write, "prompt", count, taken)))


def build_logged() -> None:
    """Completions of the language model with their rewards, as a log of an earlier run would hold them."""
    model, tokenizer = (kind.from_pretrained(HERE / "tiny_lm") for kind in (AutoModelForCausalLM, AutoTokenizer))
    folder = HERE / "tiny_reward_model"
    judge, judge_tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    judge.eval()
    prompts = [row["prompt"] for row in read_rows("prompts_train.jsonl")]
    prompts = (prompts * 2)[:2000]
    completions, _ = lm.sample(model.eval(), tokenizer, prompts, NEW_TOKENS, SEED + 7)
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    scores = reward.rewards(judge, judge_tokenizer, texts)
    rows = zip(prompts, completions, scores, strict=True)
    write_rows("logged.jsonl", [{"prompt": p, "completion": c, "reward": round(r, 4)} for p, c, r in rows])


def build_hello(effort: float) -> None:
    """The greeting model and its prompts."""
    torch.manual_seed(SEED)
    tokenizer = lm.wrap_tokenizer(lm.character_tokenizer(hello.characters()), 64, unk_token=lm.UNKNOWN)
    model = lm.new_llama(tokenizer, width=64, layers=2, heads=4, inner=128)
    source = lm.batches(tokenizer, hello.write_line, 64, SEED + 8)
    lm.train_lm(model, source, round(1200 * effort), 3e-3, "hello_lm")
    lm.save(model, tokenizer, HERE / "hello_lm")
    write_rows("hello_prompts.jsonl", [{"prompt": prompt} for prompt in hello.prompts()])


def main() -> None:
    """Builds everything, or reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="measure the files that are there and build nothing")
    parser.add_argument(
        "--effort", type=float, default=1.0, help="share of the training steps; the shipped files use 1"
    )
    parser.add_argument("--only", nargs="*", help="stages to run: texts tiny_lm reward_model prompts logged hello")
    parser.add_argument("--threads", type=int, default=1, help="more sum in another order and give other weights")
    arguments = parser.parse_args()
    stages: dict[str, Callable[[], None]] = {
        "texts": build_texts,
        "tiny_lm": lambda: build_tiny_lm(arguments.effort),
        "reward_model": lambda: build_reward_model(arguments.effort),
        "prompts": build_prompts,
        "logged": build_logged,
        "hello": lambda: build_hello(arguments.effort),
    }
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    if not arguments.report:
        for name in arguments.only or stages:
            started = time.monotonic()
            stages[name]()
            print(f"stage {name}: {time.monotonic() - started:.0f} s", flush=True)
    print_report(HERE)


if __name__ == "__main__":
    main()
