"""Prompts become episodes: the behaviour policy writes, and every token's log-probabilities are noted."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llm_dqn.adapters import Role
from llm_dqn.errors import RunError
from llm_dqn.network import QNetwork
from llm_dqn.policy import BehaviourPolicy, generation_config, logits_processors, sampled
from llm_dqn.replay import collate_tokens
from llm_dqn.types import Episode, Prompt


@dataclass(frozen=True)
class Writer:
    """What writing needs besides a policy: the network, its tokenizer, and where completions stop."""

    network: QNetwork
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: frozenset[int]
    max_completion_length: int
    batch_size: int = 64  # completions generated at a time


def rollout(
    writer: Writer,
    prompts: Sequence[Prompt],
    policy: BehaviourPolicy,
    seed: int,
    policy_version: int = 0,
    extra: Callable[[Tensor], LogitsProcessor] | None = None,
) -> list[Episode]:
    """One episode a prompt, in the order of `prompts`, not yet scored.

    Draws depend on `seed` alone and leave the global random streams as they were. `extra` makes one more processor of
    the logits for each batch from its (B, L) attention mask.
    """
    cuda = [writer.network.device] if writer.network.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        by_base = torch.zeros(len(prompts), dtype=torch.bool)
        if policy.explore == "prior":
            by_base = torch.rand(len(prompts)) < policy.epsilon
        episodes: dict[int, Episode] = {}
        writers: tuple[tuple[Role, Tensor], ...] = (("reference", by_base), ("online", ~by_base))
        for role, mask in writers:
            rows = mask.nonzero().flatten().tolist()
            # Prompts of like length share a batch, so that little is padded.
            rows.sort(key=lambda row: len(prompts[row].ids))
            for start in range(0, len(rows), writer.batch_size):
                part = rows[start : start + writer.batch_size]
                written = _write(writer, [prompts[row] for row in part], policy, role, extra)
                episodes.update(zip(part, written, strict=True))
    return [replace(episodes[row], policy_version=policy_version) for row in range(len(prompts))]


def _write(
    writer: Writer,
    prompts: Sequence[Prompt],
    policy: BehaviourPolicy,
    role: Role,
    extra: Callable[[Tensor], LogitsProcessor] | None,
) -> list[Episode]:
    config, processors, inputs = _request(writer, prompts, policy)
    if extra is not None:
        processors.append(extra(inputs["attention_mask"]))
    with writer.network.writer(role) as model, _clean_defaults(model), _nan_explained():
        output = model.generate(**inputs, generation_config=config, logits_processor=processors)
    written = output[:, inputs["input_ids"].shape[1] :].cpu()  # (B, new tokens), padded after the stop token
    if len(written) != len(prompts):
        raise RunError(f"{len(prompts)} completions were asked of the engine and {len(written)} came back")
    return describe(writer, prompts, [_until_stop(row, writer.stop_token_ids) for row in written])


def describe(writer: Writer, prompts: Sequence[Prompt], completions: Sequence[Tensor]) -> list[Episode]:
    """Given completions (T,) as episodes, with the reference's and the online policy's log-probabilities.

    Raises RunError where these are not finite: greedy generation from NaN logits writes token 0 without a word.
    """
    network = writer.network
    prompt_ids = [torch.tensor(prompt.ids) for prompt in prompts]
    tokens = collate_tokens(prompt_ids, completions).to(network.device)
    ref_logprobs = network.logprobs(tokens, "reference").cpu()
    logprobs = network.logprobs(tokens, "online").cpu()
    _require_finite(ref_logprobs, "base")
    _require_finite(logprobs, "tuned")
    return [
        Episode(
            prompt=prompt.prompt,
            completion=writer.tokenizer.decode(ids, skip_special_tokens=True),
            prompt_ids=prompt_ids[i],
            completion_ids=ids,
            ref_logprobs=ref_logprobs[i, : len(ids)],
            behaviour_logprobs=logprobs[i, : len(ids)],
            ended="eos" if int(ids[-1]) in writer.stop_token_ids else "length",
            columns=prompt.columns,
        )
        for i, (prompt, ids) in enumerate(zip(prompts, completions, strict=True))
    ]


def _request(
    writer: Writer, prompts: Sequence[Prompt], policy: BehaviourPolicy
) -> tuple[GenerationConfig, LogitsProcessorList, dict[str, Tensor]]:
    pad = writer.tokenizer.pad_token_id
    config = generation_config(policy, writer.max_completion_length, set(writer.stop_token_ids), pad)
    processors = logits_processors(policy, writer.network.num_tokens)
    longest = max(len(prompt.ids) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), pad, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
        attention_mask[row, longest - len(prompt.ids) :] = 1
    device = writer.network.device
    return config, processors, {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}


@contextmanager
def _clean_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Hides the model's own generation defaults, which `generate` mixes into what we ask for (a repetition penalty,
    say): the learner would then judge another policy than the one that wrote.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


NOT_FINITE = (
    "the {which} model's probabilities are not finite: its weights hold NaN or infinity, or its arithmetic overflows; "
    "look at the weights file, or compute in another model.dtype (float16 overflows where bfloat16 does not)"
)


def _require_finite(values: Tensor, which: str) -> None:
    if not values.isfinite().all():
        raise RunError(NOT_FINITE.format(which=which))


@contextmanager
def _nan_explained() -> Iterator[None]:
    """Sampling from NaN fails in words that nobody understands."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise RunError(NOT_FINITE.format(which="writing")) from error


def _until_stop(ids: Tensor, stop_token_ids: frozenset[int]) -> Tensor:
    """Cuts a row after its first stop token, which stays."""
    for position, token in enumerate(ids.tolist()):
        if token in stop_token_ids:
            return ids[: position + 1]
    return ids


# Nats by which generator and learner may differ about one token: float32, and coarser arithmetic.
TOLERANCE, COARSE_TOLERANCE = 2e-3, 0.3


def _verify_finite(writer: Writer, prompts: Sequence[Prompt]) -> None:
    """Asserts that what each role thinks of a first token is a number."""
    first = torch.tensor([min(writer.stop_token_ids, default=0)])
    tokens = collate_tokens([torch.tensor(prompt.ids) for prompt in prompts], [first] * len(prompts))
    for role, which in (("reference", "base"), ("online", "tuned"), ("target", "target")):
        _require_finite(writer.network.logprobs(tokens.to(writer.network.device), role), which)  # type: ignore[arg-type]


def verify_generator(writer: Writer, prompts: Sequence[Prompt]) -> None:
    """Asserts that what generates is what learns: both give the tokens of a few completions the same log-probability.

    A generator that ignores the adapter, or positions a padded prompt wrongly, would otherwise train for days on
    nothing. Raises RunError with the largest difference, and for probabilities or values that are not finite.
    """
    tolerance = TOLERANCE if writer.network.full_precision else COARSE_TOLERANCE
    prompts = sorted(prompts, key=lambda prompt: len(prompt.ids))
    prompts = [prompts[0], prompts[-1]]  # different lengths, so that padding is tried
    _verify_finite(writer, prompts)
    config, processors, inputs = _request(writer, prompts, sampled())
    config.max_new_tokens = min(8, writer.max_completion_length)
    config.update(output_logits=True, return_dict_in_generate=True)
    cuda = [writer.network.device] if writer.network.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), writer.network.writer("online") as model, _clean_defaults(model):
        torch.manual_seed(0)
        output = model.generate(**inputs, generation_config=config, logits_processor=processors)
    logits = torch.stack(output.logits, dim=1)[..., : writer.network.num_tokens].float().log_softmax(-1).cpu()
    for row, prompt in enumerate(prompts):
        new_ids = output.sequences[row, inputs["input_ids"].shape[1] :].cpu()
        ids = _until_stop(new_ids, writer.stop_token_ids)
        generated = logits[row, : len(ids)].gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        tokens = collate_tokens([torch.tensor(prompt.ids)], [ids]).to(writer.network.device)
        difference = (generated - writer.network.logprobs(tokens, "online").cpu()[0]).abs().max().item()
        if not difference <= tolerance:
            raise RunError(
                f"the generator and the learner disagree by {difference:.3g} nats about the same tokens (allowed: "
                f"{tolerance:g}); completions would come from another policy than the one that is trained"
            )
