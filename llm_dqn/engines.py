"""What writes completions: transformers' `generate`, its continuous batching, or a vLLM server.

An engine is a function (writer, request) -> one (token ids, log-probabilities) a prompt. The ids are (T,), the stop
token included; the log-probabilities are (T,) float32 log pi(a|s) of the model in the prompt's role, before
temperature and truncation, or None where the engine cannot tell them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llm_dqn.adapters import AdapterRoles, NotByRow, Role
from llm_dqn.errors import RunError
from llm_dqn.network import QNetwork
from llm_dqn.policy import BehaviourPolicy, TakenLogprobs, generation_config, logits_processors
from llm_dqn.types import Prompt
from llm_dqn.vllm_server import VLLMServer

EngineName = Literal["generate", "continuous", "vllm"]
Written = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Writer:
    """What writing needs besides a policy: the network, its tokenizer, and where completions stop."""

    network: QNetwork
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: frozenset[int]
    max_completion_length: int
    batch_size: int = 64  # completions generated at a time
    engine: EngineName = "generate"
    server: VLLMServer | None = None  # of the engine vllm


@dataclass(frozen=True)
class Request:
    """Prompts, and which role continues each. seed: of the draws; `generate` draws from torch's global stream instead.

    extra: makes one more processor of the logits from a batch's (B, L) attention mask.
    """

    prompts: Sequence[Prompt]
    policy: BehaviourPolicy
    roles: Sequence[Role]  # online or reference, one a prompt
    seed: int
    extra: Callable[[Tensor], LogitsProcessor] | None = None


Engine = Callable[[Writer, Request], list[Written]]


def write(writer: Writer, request: Request) -> list[Written]:
    """One completion a prompt by the writer's engine; `generate` stands in where logits are changed on their way.

    Raises RunError where the engine gives something else than was asked for.
    """
    engine = ENGINES["generate" if request.extra else writer.engine]
    written = engine(writer, request)
    _require_count(request, len(written))
    for ids, logprobs in written:
        if not len(ids) or int(ids.max()) >= writer.network.num_tokens:
            raise RunError(f"the engine {writer.engine} wrote no token, or one that the tokenizer does not have")
        if logprobs is not None and len(logprobs) != len(ids):
            raise RunError(f"the engine {writer.engine} gave {len(logprobs)} log-probabilities of {len(ids)} tokens")
    return written


def _require_count(request: Request, count: int) -> None:
    if count != len(request.prompts):
        raise RunError(f"{len(request.prompts)} completions were asked of the engine and {count} came back")


def each_role_apart(engine: Engine, writer: Writer, request: Request) -> list[Written]:
    """What an engine writes that can do one role at a time."""
    written: dict[int, Written] = {}
    for number, role in enumerate(dict.fromkeys(request.roles)):
        rows = [row for row, own in enumerate(request.roles) if own == role]
        prompts = [request.prompts[row] for row in rows]
        part = replace(request, prompts=prompts, roles=[role] * len(rows), seed=2 * request.seed + number)
        written.update(zip(rows, engine(writer, part), strict=True))
    return [written[row] for row in range(len(request.prompts))]


def until_stop(ids: Tensor, stop_token_ids: frozenset[int]) -> Tensor:
    """Cuts a row after its first stop token, which stays."""
    for position, token in enumerate(ids.tolist()):
        if token in stop_token_ids:
            return ids[: position + 1]
    return ids


# --- generate ---------------------------------------------------------------------------------------------------------


def by_generate(writer: Writer, request: Request) -> list[Written]:
    """Transformers' `generate`, in batches of the writer's size.

    Rows of both roles share a batch where the model takes that: the few that explore would otherwise take as many steps
    again as all others.
    """
    if len(set(request.roles)) > 1 and _mixing(writer.network) is None:
        return each_role_apart(by_generate, writer, request)
    written: list[Written] = []
    for start in range(0, len(request.prompts), writer.batch_size):
        rows = slice(start, start + writer.batch_size)
        part = replace(request, prompts=request.prompts[rows], roles=request.roles[rows])
        try:
            written += _generated(writer, part)
        except NotByRow:  # when the prompts are read, before anything is drawn
            written += each_role_apart(by_generate, writer, part)
    return written


def _generated(writer: Writer, request: Request) -> list[Written]:
    inputs = _left_padded(writer, request.prompts)
    taken = TakenLogprobs()
    processors = logits_processors(request.policy, writer.network.num_tokens, taken)
    if request.extra is not None:
        processors.append(request.extra(inputs["attention_mask"]))
    config = _config(writer, request.policy)
    with _acting(writer.network, request.roles) as model, _clean_defaults(model), _nan_explained():
        output = model.generate(**inputs, generation_config=config, logits_processor=processors)
    _require_count(request, len(output))
    logprobs = taken.finish(output).cpu()
    new = output[:, inputs["input_ids"].shape[1] :].cpu()  # (B, new tokens), padded after the stop token
    completions = [until_stop(row, writer.stop_token_ids) for row in new]
    return [(ids, logprobs[row, : len(ids)]) for row, ids in enumerate(completions)]


def _mixing(network: QNetwork) -> AdapterRoles | None:
    """What can give the rows of a batch to both roles, where that is possible; a linear head acts for whole batches."""
    roles = network.roles
    return roles if network.kind == "lm" and isinstance(roles, AdapterRoles) and roles.mixes_rows else None


@contextmanager
def _acting(network: QNetwork, roles: Sequence[Role]) -> Iterator[PreTrainedModel]:
    """The model whose rows are of these roles."""
    mixing = _mixing(network)
    if mixing is None or len(set(roles)) == 1:
        with network.writer(roles[0]) as model:
            yield model
    else:
        with network.writer("online") as model, mixing.mixed(roles):
            yield model


def _left_padded(writer: Writer, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    longest = max(len(prompt.ids) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), writer.tokenizer.pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
        attention_mask[row, longest - len(prompt.ids) :] = 1
    device = writer.network.device
    return {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}


def _config(writer: Writer, policy: BehaviourPolicy) -> GenerationConfig:
    stops, pad = set(writer.stop_token_ids), writer.tokenizer.pad_token_id
    return generation_config(policy, writer.max_completion_length, stops, pad)


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


@contextmanager
def _nan_explained() -> Iterator[None]:
    """Sampling from NaN fails in words that nobody understands."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise RunError(NOT_FINITE.format(which="writing")) from error


# --- continuous -------------------------------------------------------------------------------------------------------

PAGE = 32  # tokens in a page of the cache
PREFILL = 2048  # tokens read at a time, beside one of each row that is being written


def by_continuous_batching(writer: Writer, request: Request) -> list[Written]:
    """Transformers' continuous batching: a row that has ended makes room for the next one, and nothing is padded.

    Its cache is made anew each time: one that was kept would hold what older weights had read.
    """
    if len(set(request.roles)) > 1:
        return each_role_apart(by_continuous_batching, writer, request)
    network = writer.network
    config = _config(writer, request.policy)
    with network.writer(request.roles[0]) as model, _clean_defaults(model):
        rows = model.config.get_text_config().vocab_size
        if rows > network.num_tokens:
            config.suppress_tokens = list(range(network.num_tokens, rows))
        manager = model.init_continuous_batching(config, _continuous_config(writer, request))
        try:
            names = manager.add_requests([prompt.ids for prompt in request.prompts], writer.max_completion_length)
            manager.start()  # after all requests are there: what shares a batch, and so the draws, depends on nothing
            results: dict[str, Any] = {}
            while len(results) < len(names):
                result = manager.get_result(timeout=1)
                if result is not None and (result.is_finished() or result.error):
                    results[result.request_id] = result
                elif result is None and not manager.is_running():
                    break
        finally:
            manager.stop()
            manager.destroy()
    for name in names:
        if name not in results or results[name].error:
            reason = results[name].error if name in results else "its thread ended"
            raise RunError(f"continuous batching left a completion out: {reason}")
    # its log-probabilities are those after temperature and truncation
    plain = request.policy.temperature == 1 and not request.policy.top_k and request.policy.top_p == 1
    done = [results[name] for name in names]
    return [
        (torch.tensor(result.generated_tokens), torch.tensor(result.logprobs) if plain else None) for result in done
    ]


def _continuous_config(writer: Writer, request: Request) -> ContinuousBatchingConfig:
    """Sized for what is written at a time; left alone the library takes all memory that is free."""
    at_once = min(writer.batch_size, len(request.prompts))
    longest = max(len(prompt.ids) for prompt in request.prompts) + writer.max_completion_length
    return ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=at_once * (math.ceil(longest / PAGE) + 1),
        max_batch_tokens=at_once + min(PREFILL, sum(len(prompt.ids) for prompt in request.prompts)),
        max_requests_per_batch=at_once,
        allow_block_sharing=True,
        return_logprobs=True,
        seed=request.seed,
        auto_switch_to_flash=False,  # it would fetch a kernel from the Hub; `model.attn_implementation` chooses
        drop_unsupported_processors=False,  # suppress_tokens is no less right row by row
    )


# --- vllm -------------------------------------------------------------------------------------------------------------


def by_vllm(writer: Writer, request: Request) -> list[Written]:
    """A vLLM server, which is given the adapter as it is now."""
    server, policy = writer.server, request.policy
    assert server is not None
    adapter = server.adapter(writer.network.roles.save) if "online" in request.roles else ""
    names = [server.base_model if role == "reference" else adapter for role in request.roles]
    sampling = {
        "max_tokens": writer.max_completion_length,
        "temperature": policy.temperature,
        "top_k": policy.top_k,
        "top_p": policy.top_p,
        "min_p": policy.min_p or 0.0,
        "stop_token_ids": sorted(writer.stop_token_ids),
    }
    completions = server.complete(names, [prompt.ids for prompt in request.prompts], sampling, request.seed)
    return [(torch.tensor(ids), torch.tensor(logprobs)) for ids, logprobs in completions]


ENGINES: dict[str, Engine] = {
    "generate": by_generate,
    "continuous": by_continuous_batching,
    "vllm": by_vllm,
}
