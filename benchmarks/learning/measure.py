"""What a policy is worth on given prompts: sampled, greedy, and exactly where right completions can be listed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.learning.tasks import Row, Task
from llm_dqn.statistics import distinct_n

BATCH = 128


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    length: int,
    greedy: bool = False,
    temperature: float = 1.0,
) -> list[list[int]]:
    """Token ids of one completion a prompt, the end-of-sequence token included where it was written."""
    config = GenerationConfig(
        max_new_tokens=length,
        do_sample=not greedy,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({} if greedy else {"temperature": temperature, "top_k": 0, "top_p": 1.0}),
    )
    found: list[list[int]] = []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(prompts), BATCH):
            inputs = tokenizer(list(prompts[start : start + BATCH]), return_tensors="pt", padding=True)
            inputs.pop("token_type_ids", None)
            output = model.generate(**inputs, generation_config=config)
            found += [_ended(row, tokenizer) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]
    model.train(was_training)
    return found


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = tokenizer.eos_token_id
    return ids[: ids.index(end) + 1] if end in ids else ids


def lay_out(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], completions: Sequence[list[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, attention mask, labels), (B, L) each, padded on the right; labels are -100 outside the completions."""
    starts = tokenizer(list(prompts))["input_ids"]
    longest = max(len(start) + len(ids) for start, ids in zip(starts, completions, strict=True))
    ids = torch.full((len(starts), longest), tokenizer.pad_token_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (start, written) in enumerate(zip(starts, completions, strict=True)):
        end = len(start) + len(written)
        ids[row, :end] = torch.tensor([*start, *written])
        mask[row, :end] = 1
        labels[row, len(start) : end] = torch.tensor(written)
    return ids, mask, labels


def logprobs(model: PreTrainedModel, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """(B, L - 1) log-probability of each labelled token, 0 elsewhere."""
    scores = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    taken = scores.gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return taken.masked_fill(labels[:, 1:] == -100, 0.0)


@torch.no_grad()
def exactly_right(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, rows: Sequence[Row]) -> float:
    """Mean over prompts of the probability that a sampled completion is one of the right ones: no sampling noise."""
    assert task.answers is not None
    pairs = [(row["prompt"], answer) for row in rows for answer in task.answers(row)]
    prompts, answers = zip(*pairs, strict=True)
    completions = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in answers]
    total = 0.0
    for start in range(0, len(pairs), BATCH):
        some = slice(start, start + BATCH)
        total += float(logprobs(model, *lay_out(tokenizer, prompts[some], completions[some])).sum(1).exp().sum())
    return total / len(rows)


@torch.no_grad()
def divergence(
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    written: Sequence[list[int]],
) -> float:
    """KL(model || base) in nats a token, exact over the vocabulary, at the states of the given completions."""
    total, count = 0.0, 0
    for start in range(0, len(prompts), BATCH // 4):
        some = slice(start, start + BATCH // 4)
        ids, mask, labels = lay_out(tokenizer, prompts[some], written[some])
        ours, theirs = (
            one(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            for one in (model, base)
        )
        states = labels[:, 1:] != -100
        each = torch.where(ours > -1e30, ours.exp() * (ours - theirs), 0.0).sum(-1)
        total, count = total + float(each[states].sum()), count + int(states.sum())
    return total / count


@dataclass(frozen=True)
class Looked:
    """figures: of the policy, by name. written: token ids of a sampled completion of each row. rewards: theirs."""

    figures: dict[str, float]
    written: list[list[int]]
    rewards: list[float]


def measure(
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[Row],
    seed: int,
) -> Looked:
    """What one policy does; its calls of the judge count for no budget, and the global random stream stays put."""
    prompts = [row["prompt"] for row in rows]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}

    def judged(written: list[list[int]]) -> list[float]:
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        return task.judge()(prompts=prompts, completions=texts, **columns)

    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sampled = write(model, tokenizer, prompts, task.length)
        greedy = write(model, tokenizer, prompts, task.length, greedy=True)
    rewards = judged(sampled)
    found = {
        "reward": sum(rewards) / len(rewards),
        "greedy": sum(judged(greedy)) / len(rewards),
        "kl": divergence(model, base, tokenizer, prompts, sampled),
        "length": sum(map(len, sampled)) / len(sampled),
        "distinct_2": distinct_n(sampled, 2),
    }
    if task.answers is not None:
        found["exact"] = exactly_right(model, tokenizer, task, rows)
    model.train(was_training)
    return Looked({name: round(value, 5) for name, value in found.items()}, sampled, rewards)


def about_base(task: Task) -> dict[str, float]:
    """Figures of the base model on the tuning prompts, built if need be."""
    tokenizer = AutoTokenizer.from_pretrained(task.base())
    model = AutoModelForCausalLM.from_pretrained(task.base()).eval()
    return measure(model, model, tokenizer, task, task.tuning, seed=1).figures
