"""What writes completions: transformers' `generate`, its continuous batching, or a vLLM server.

An engine is a function (writer, request) -> one (token ids, log-probabilities) a prompt. The ids are (T,), the stop
token included; the log-probabilities are (T,) float32 log pi(a|s) of the model in the request's role, before
temperature and truncation, or None where the engine cannot tell them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

from llm_dqn.adapters import Role
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
    """Prompts for the policy of one role. seed: of the draws; `generate` draws from torch's global stream instead.

    extra: makes one more processor of the logits from a batch's (B, L) attention mask.
    """

    prompts: Sequence[Prompt]
    policy: BehaviourPolicy
    role: Role
    seed: int
    extra: Callable[[Tensor], LogitsProcessor] | None = None


def write(writer: Writer, request: Request) -> list[Written]:
    """One completion a prompt by the writer's engine; `generate` stands in where logits are changed on their way.

    Raises RunError where the engine gives something else than was asked for.
    """
    engine = ENGINES["generate" if request.extra else writer.engine]
    written = engine(writer, request)
    if len(written) != len(request.prompts):
        raise RunError(f"{len(request.prompts)} completions were asked of the engine and {len(written)} came back")
    for ids, logprobs in written:
        if not len(ids) or int(ids.max()) >= writer.network.num_tokens:
            raise RunError(f"the engine {writer.engine} wrote no token, or one that the tokenizer does not have")
        if logprobs is not None and len(logprobs) != len(ids):
            raise RunError(f"the engine {writer.engine} gave {len(logprobs)} log-probabilities of {len(ids)} tokens")
    return written


def until_stop(ids: Tensor, stop_token_ids: frozenset[int]) -> Tensor:
    """Cuts a row after its first stop token, which stays."""
    for position, token in enumerate(ids.tolist()):
        if token in stop_token_ids:
            return ids[: position + 1]
    return ids


# --- generate ---------------------------------------------------------------------------------------------------------


def by_generate(writer: Writer, request: Request) -> list[Written]:
    """Transformers' `generate`, in batches of the writer's size."""
    written: list[Written] = []
    for start in range(0, len(request.prompts), writer.batch_size):
        written += _generated(writer, request, request.prompts[start : start + writer.batch_size])
    return written


def _generated(writer: Writer, request: Request, prompts: Sequence[Prompt]) -> list[Written]:
    inputs = _left_padded(writer, prompts)
    taken = TakenLogprobs()
    processors = logits_processors(request.policy, writer.network.num_tokens, taken)
    if request.extra is not None:
        processors.append(request.extra(inputs["attention_mask"]))
    config = _config(writer, request.policy)
    with writer.network.writer(request.role) as model, _clean_defaults(model), _nan_explained():
        output = model.generate(**inputs, generation_config=config, logits_processor=processors)
    logprobs = taken.finish(output).cpu()
    new = output[:, inputs["input_ids"].shape[1] :].cpu()  # (B, new tokens), padded after the stop token
    completions = [until_stop(row, writer.stop_token_ids) for row in new]
    return [(ids, logprobs[row, : len(ids)]) for row, ids in enumerate(completions)]


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
    network = writer.network
    config = _config(writer, request.policy)
    with network.writer(request.role) as model, _clean_defaults(model):
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
    model = server.base_model if request.role == "reference" else server.adapter(writer.network.roles.save)
    sampling = {
        "max_tokens": writer.max_completion_length,
        "temperature": policy.temperature,
        "top_k": policy.top_k,
        "top_p": policy.top_p,
        "min_p": policy.min_p or 0.0,
        "stop_token_ids": sorted(writer.stop_token_ids),
    }
    completions = server.complete(model, [prompt.ids for prompt in request.prompts], sampling, request.seed)
    return [(torch.tensor(ids), torch.tensor(logprobs)) for ids, logprobs in completions]


ENGINES: dict[str, Callable[[Writer, Request], list[Written]]] = {
    "generate": by_generate,
    "continuous": by_continuous_batching,
    "vllm": by_vllm,
}
