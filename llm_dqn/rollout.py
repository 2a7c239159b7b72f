"""Prompts become episodes: the behaviour policy writes, and every token's log-probabilities are noted."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from transformers import LogitsProcessor

from llm_dqn.adapters import Role
from llm_dqn.engines import NOT_FINITE, Request, Writer, write
from llm_dqn.errors import RunError
from llm_dqn.policy import BehaviourPolicy, sampled
from llm_dqn.replay import collate_tokens
from llm_dqn.types import Episode, Prompt

__all__ = ["Writer", "at_temperatures", "describe", "rollout", "verify_generator"]


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
        # Prompts of like length share a batch, so that little is padded.
        rows = sorted(range(len(prompts)), key=lambda row: len(prompts[row].ids))
        asked = [prompts[row] for row in rows]
        roles: list[Role] = ["reference" if by_base[row] else "online" for row in rows]
        written = write(writer, Request(asked, policy, roles, seed, extra)) if rows else []
        episodes: dict[int, Episode] = {}
        for start in range(0, len(rows), writer.batch_size):
            part = slice(start, start + writer.batch_size)
            # what an engine says of the policy's own tokens is not asked a second time
            told = [
                own if role == "online" else None for (_, own), role in zip(written[part], roles[part], strict=True)
            ]
            described = describe(writer, asked[part], [ids for ids, _ in written[part]], told)
            episodes.update(zip(rows[part], described, strict=True))
    return [replace(episodes[row], policy_version=policy_version) for row in range(len(prompts))]


def at_temperatures(
    prompts: Sequence[Prompt], temperatures: Sequence[float], write: Callable[[list[Prompt], float], list[Episode]]
) -> list[Episode]:
    """One episode a prompt, in the order of `prompts`; `write` is asked once for all prompts of a temperature."""
    found: dict[int, Episode] = {}
    for temperature in sorted(set(temperatures)):
        rows = [row for row, its_own in enumerate(temperatures) if its_own == temperature]
        found |= zip(rows, write([prompts[row] for row in rows], temperature), strict=True)
    return [found[row] for row in range(len(prompts))]


def describe(
    writer: Writer,
    prompts: Sequence[Prompt],
    completions: Sequence[Tensor],
    told: Sequence[Tensor | None] | None = None,
) -> list[Episode]:
    """Given completions (T,) as episodes, with the reference's and the online policy's log-probabilities.

    told: the online policy's, (T,) each, where they are known. Raises RunError where any are not finite: greedy
    generation from NaN logits writes token 0 without a word.
    """
    network = writer.network
    prompt_ids = [torch.tensor(prompt.ids) for prompt in prompts]
    tokens = collate_tokens(prompt_ids, completions).to(network.device)
    ref_logprobs = network.logprobs(tokens, "reference").cpu()
    logprobs = dict(enumerate(told or [None] * len(prompts)))
    unknown = [row for row, own in logprobs.items() if own is None]
    if unknown:
        tokens = collate_tokens([prompt_ids[row] for row in unknown], [completions[row] for row in unknown])
        logprobs |= dict(zip(unknown, network.logprobs(tokens.to(network.device), "online").cpu(), strict=True))
    known = [own[: len(ids)] for own, ids in zip(logprobs.values(), completions, strict=True) if own is not None]
    _require_finite(ref_logprobs, "base")
    _require_finite(torch.cat(known), "tuned")
    return [
        Episode(
            prompt=prompt.prompt,
            completion=writer.tokenizer.decode(ids, skip_special_tokens=True),
            prompt_ids=prompt_ids[i],
            completion_ids=ids,
            ref_logprobs=ref_logprobs[i, : len(ids)],
            behaviour_logprobs=known[i],
            ended="eos" if int(ids[-1]) in writer.stop_token_ids else "length",
            columns=prompt.columns,
        )
        for i, (prompt, ids) in enumerate(zip(prompts, completions, strict=True))
    ]


def _require_finite(values: Tensor, which: str) -> None:
    if not values.isfinite().all():
        raise RunError(NOT_FINITE.format(which=which))


# Nats by which generator and learner may differ about one token: float32, and coarser arithmetic.
TOLERANCE, COARSE_TOLERANCE = 2e-3, 0.3


def _verify_finite(writer: Writer, prompts: Sequence[Prompt]) -> None:
    """Asserts that what each role thinks of a first token is a number."""
    first = torch.tensor([min(writer.stop_token_ids, default=0)])
    tokens = collate_tokens([torch.tensor(prompt.ids) for prompt in prompts], [first] * len(prompts))
    for role, which in (("reference", "base"), ("online", "tuned"), ("target", "target")):
        _require_finite(writer.network.logprobs(tokens.to(writer.network.device), role), which)  # type: ignore[arg-type]


def verify_generator(writer: Writer, prompts: Sequence[Prompt]) -> None:
    """Asserts that what writes is what learns: both give the tokens of a few completions the same log-probability.

    An engine that ignores the adapter, or positions a padded prompt wrongly, would otherwise train for days on nothing.
    A server is tried with an adapter that differs from the base. Raises RunError with the largest difference, and for
    probabilities or values that are not finite.
    """
    prompts = sorted(prompts, key=lambda prompt: len(prompt.ids))
    prompts = [prompts[0], prompts[-1]]  # different lengths, so that padding is tried
    _verify_finite(writer, prompts)
    probe = replace(writer, max_completion_length=min(8, writer.max_completion_length))
    if writer.server is None:
        _verify_role(probe, prompts, "online")
        return
    _verify_role(probe, prompts, "reference")
    with _away_from_base(probe, prompts):
        _verify_role(probe, prompts, "online")


def _verify_role(writer: Writer, prompts: Sequence[Prompt], role: Role) -> None:
    network = writer.network
    # A server computes in a precision of its own.
    tolerance = TOLERANCE if network.full_precision and writer.server is None else COARSE_TOLERANCE
    cuda = [network.device] if network.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(0)
        written = write(writer, Request(prompts, sampled(), [role] * len(prompts), seed=0))
    for prompt, (ids, generated) in zip(prompts, written, strict=True):
        assert generated is not None  # of plain sampling every engine knows them
        tokens = collate_tokens([torch.tensor(prompt.ids)], [ids]).to(network.device)
        difference = (generated - network.logprobs(tokens, role).cpu()[0]).abs().max().item()
        if not difference <= tolerance:
            raise RunError(
                f"the generator and the learner disagree by {difference:.3g} nats about the same tokens (allowed: "
                f"{tolerance:g}, engine {writer.engine}, {role} policy); completions would come from another policy "
                "than the one that is trained"
            )


@contextmanager
def _away_from_base(writer: Writer, prompts: Sequence[Prompt]) -> Iterator[None]:
    """Moves the adapter until both policies differ by far more than is allowed, and puts it back bit for bit.

    A fresh adapter says what the base says, so a server that ignores it would not be noticed.
    """
    network = writer.network
    tuned = [parameter for parameter in network.model.parameters() if parameter.requires_grad]
    kept = [parameter.detach().clone() for parameter in tuned]
    tokens = collate_tokens([torch.tensor(p.ids) for p in prompts], [torch.tensor(p.ids[-4:]) for p in prompts])
    tokens = tokens.to(network.device)
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for scale in (0.01, 0.02, 0.04, 0.08, 0.16, 0.32):
                for parameter in tuned:
                    parameter += (scale * torch.randn(parameter.shape, generator=generator)).to(parameter)
                apart = network.logprobs(tokens, "online") - network.logprobs(tokens, "reference")
                if apart.abs().max() > 10 * COARSE_TOLERANCE:
                    break
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(tuned, kept, strict=True):
                parameter.copy_(value)
