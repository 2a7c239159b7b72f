"""Q-heads over the vocabulary, and the chunked arithmetic that keeps (N, V) tensors small and short-lived.

N positions, H hidden size, V tokens that may be chosen (rows of the LM's head beyond the tokenizer are cut off).
All Q-values are float32 whatever the trunk computes in.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llm_dqn.errors import UserError

LogitsFunction = Callable[[Tensor], Tensor]  # hidden (N, H) -> logits (N, V) float32

CHUNK = 1024  # positions whose vocabulary is expanded at a time; 1024 x 152k float32 is 622 MB


class ValueHead(nn.Module):
    """V(s) from a hidden state: (N, H) -> (N,). Its last layer starts at zero, so V is a constant before learning.

    scale: reward that an output of 1 stands for. A step of the optimizer moves outputs as far whatever rewards are.
    """

    def __init__(self, hidden_size: int, width: int = 256) -> None:
        super().__init__()
        self.scale = 1.0
        self.body = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, width), nn.GELU())
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, H) -> (N,) float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.out(self.body(hidden.float())).squeeze(-1) * self.scale

    def start_at(self, value: float) -> None:
        """Makes V the constant `value`: the mean reward seen so far is the best guess before learning."""
        with torch.no_grad():
            self.out.bias.fill_(value / self.scale)

    def measure_in(self, scale: float) -> None:
        """Another scale, and V stays what it is."""
        with torch.no_grad():
            for parameter in self.out.parameters():
                parameter.mul_(self.scale / scale)
        self.scale = scale


class LinearQHead(nn.Module):
    """The textbook head Q(s, a) = w_a . h(s) + b: (N, H) -> (N, V).

    Weights start at zero and `b`, one number for all tokens, at the mean reward: before learning every action is worth
    the same, so the prior alone acts (the calibrated start of LMRL-Gym, https://arxiv.org/abs/2311.18232).
    """

    def __init__(self, hidden_size: int, num_tokens: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_tokens, hidden_size))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, H) -> (N, V) float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ self.weight.T + self.bias

    def taken(self, hidden: Tensor, actions: Tensor) -> Tensor:
        """Q of one action a position from its row alone, (N, H), (N,) -> (N,): no (N, V) tensor."""
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.linalg.vecdot(hidden.float(), self.weight[actions]) + self.bias

    def start_at(self, value: float) -> None:
        """Makes every Q the constant `value`."""
        with torch.no_grad():
            self.bias.fill_(value)


class ActingHead(nn.Module):
    """Stands in for the LM's output layer while a `LinearQHead` acts: logits = log prior + Q / beta.

    Sampling from it is sampling pi = prior * exp(Q / beta); with a uniform prior its argmax is the textbook's greedy
    action argmax_a Q(s, a). Rows beyond the tokenizer keep the LM's own logits and are masked by the sampler.
    """

    def __init__(self, lm_head: nn.Module, q_head: LinearQHead, beta: float, uniform_prior: bool) -> None:
        super().__init__()
        self.lm_head, self.q_head, self.beta, self.uniform_prior = lm_head, q_head, beta, uniform_prior

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., rows of the LM head)."""
        logits = self.lm_head(hidden).float()
        scaled_q = self.q_head(hidden) / self.beta
        num_tokens = scaled_q.shape[-1]
        acting = scaled_q if self.uniform_prior else logits[..., :num_tokens] + scaled_q
        return torch.cat([acting, logits[..., num_tokens:]], dim=-1)


@dataclass(frozen=True)
class HeadSettings:
    """What a network has on its trunk, and how that acts.

    q_head: "lm", the LM's own output layer with V beside it, or "linear", the textbook head. beta: what a nat away from
    the prior costs, in rewards. uniform_prior: a linear head acts by Q alone and the LM's output layer has no say.
    with_value: V beside a linear head too.
    """

    q_head: Literal["lm", "linear"] = "lm"
    beta: float = 0.1
    uniform_prior: bool = False
    with_value: bool = False

    def build(self, hidden_size: int, num_tokens: int) -> nn.ModuleDict:
        """The heads, as they are before learning: "q" of a linear one, "value" where there is V."""
        heads: dict[str, nn.Module] = {}
        if self.q_head == "linear":
            heads["q"] = LinearQHead(hidden_size, num_tokens)
        if self.q_head == "lm" or self.with_value:
            heads["value"] = ValueHead(hidden_size)
        return nn.ModuleDict(heads)


LM_HEAD = HeadSettings()


def saved_heads(file: Path, num_tokens: int) -> HeadSettings:
    """What the heads in a `q_head.safetensors` are; `UserError` for any other file."""
    try:
        with safe_open(file, framework="pt") as heads:
            facts = json.loads((heads.metadata() or {}).get("llm_dqn", "null"))
            has_value = any(name.startswith("value.") for name in heads.keys())  # noqa: SIM118 -- no dict
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}); remove it to go on without values") from error
    if not isinstance(facts, dict) or not {"q_head", "beta", "num_tokens"} <= set(facts):
        raise UserError(f"{file} does not say which head it holds; remove it to go on without values")
    if facts["num_tokens"] != num_tokens:
        raise UserError(f"{file} has Q-values of {facts['num_tokens']} tokens, the tokenizer has {num_tokens}")
    uniform = bool(facts.get("uniform", False))
    return HeadSettings(facts["q_head"], float(facts["beta"]), uniform, has_value)


def _pieces(*tensors: Tensor, size: int) -> Iterator[tuple[Tensor, ...]]:
    for start in range(0, tensors[0].shape[0], size):
        yield tuple(tensor[start : start + size] for tensor in tensors)


def taken_logprobs(hidden: Tensor, actions: Tensor, logits_of: LogitsFunction, size: int) -> Tensor:
    """Log softmax(logits)[action], (N, H), (N,) -> (N,), by any layer, `size` positions at a time.

    With gradients on, the logits of a chunk are computed again in backward instead of being kept.
    """

    def piece(hidden: Tensor, actions: Tensor) -> Tensor:
        logits = logits_of(hidden)
        return logits.gather(-1, actions.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(logits, dim=-1)

    if len(hidden) == 0:
        return hidden.float().sum(-1)
    recompute = torch.is_grad_enabled()
    results = [
        checkpoint(piece, *part, use_reentrant=False) if recompute else piece(*part)
        for part in _pieces(hidden, actions, size=size)
    ]
    return torch.cat(results)


@torch.no_grad()
def reduce_states(reduce: Callable[..., Tensor], size: int, *hiddens: Tensor) -> Tensor:
    """`reduce` of chunks of `size` rows of (N, ...) tensors to (N,), without gradient: values of states from all Qs."""
    if len(hiddens[0]) == 0:
        return hiddens[0].float().sum(-1)
    return torch.cat([reduce(*piece) for piece in _pieces(*hiddens, size=size)])


@torch.no_grad()
def map_states(function: Callable[..., tuple[Tensor, ...]], size: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`function` over chunks of `size` rows, its several results joined again, without gradient."""
    columns = zip(*(function(*piece) for piece in _pieces(*tensors, size=size)), strict=True)
    return tuple(torch.cat(column) for column in columns)


def chunk_for(device: torch.device, num_tokens: int) -> int:
    """Positions whose vocabulary is looked at together: a processor is fastest where that stays in its cache."""
    return CHUNK if device.type != "cpu" else min(CHUNK, max(64, 2**18 // num_tokens))


def base_choices(logits: Tensor, actions: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the base sees, from its (N, V) logits: ids (N, 1 + K) of the taken token and of its `top` likeliest, and

    what `logprobs_and_rank` says of them.
    """
    likeliest = logits.topk(min(top, logits.shape[-1]), dim=-1).indices
    chosen = torch.cat([actions.unsqueeze(-1), likeliest], dim=-1)
    return chosen, *logprobs_and_rank(logits, chosen)


def logprobs_and_rank(logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, K) of the chosen tokens and rank (N,) of the first of them, from (N, V) logits."""
    found = logits.gather(-1, chosen)
    room = torch.empty_like(logits)
    # Into floats: booleans are summed several times more slowly.
    ranks = torch.gt(logits, found[:, :1], out=room).sum(-1).long() + 1
    highest = logits.amax(-1, keepdim=True)
    normalizer = torch.sub(logits, highest, out=room).exp_().sum(-1, keepdim=True).log_() + highest
    return found - normalizer, ranks
