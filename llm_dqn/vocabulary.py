"""Sums over a whole vocabulary without an (N, V) tensor: a few positions and a few tokens at a time.

log sum_a exp(logit_a) needs all V logits of a position, and so does its gradient sum_a pi(a) W_a, but neither needs
them at once. One sweep over the rows of the output layer keeps a running maximum, a running sum and, where the layer is
not trained, the running gradient by the hidden state: two products where recomputation in backward would take three.
The running maximum is that of Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867.

N positions, H hidden size, V tokens that may be chosen. Sums are float32 whatever the products are computed in.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

POSITIONS = 512  # swept together: enough to keep the arithmetic units busy
# Logits held at a time: on a processor what its cache holds, elsewhere what keeps launches few.
HELD_ON_CPU, HELD_ELSEWHERE = 2**19, 2**25
FEWEST_TOKENS = 256  # a product of fewer rows is slow
KEPT = 2**24  # numbers that one update keeps from forward to backward at most; beyond them it computes again


@dataclass(frozen=True)
class OutputRows:
    """The output layer's rows of tokens that may be chosen, as plain tensors: logits = postprocess(h W^T + b)."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    postprocess: Callable[[Tensor], Tensor] | None = None  # elementwise; None where the logits stay as they are
    dtype: torch.dtype = torch.float32  # of the products

    def raw(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        """(N, H) -> (N, stop - start) float32, before `postprocess`."""
        bias = None if self.bias is None else self.bias[start:stop].to(self.dtype)
        return nn.functional.linear(hidden.to(self.dtype), self.weight[start:stop].to(self.dtype), bias).float()

    def taken(self, hidden: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) logits of one token a position, from its row alone, and their gradients by the hidden state, (N, H)."""
        rows = self.weight[actions].to(self.dtype)
        logits, slope = self.bent(self.raw_of(hidden, actions, rows))
        return logits, rows.float() if slope is None else slope.unsqueeze(-1) * rows.float()

    def raw_of(self, hidden: Tensor, actions: Tensor, rows: Tensor) -> Tensor:
        """(N,) float32 of one token a position, before `postprocess`; `rows` (N, H) are those of the tokens."""
        raw = torch.linalg.vecdot(hidden.to(self.dtype), rows).float()
        return raw if self.bias is None else raw + self.bias[actions].float()

    def bent(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `postprocess` makes of raw logits, and its derivative at them; None where that is one."""
        if self.postprocess is None:
            return raw, None
        with torch.enable_grad():
            leaf = raw.requires_grad_()
            logits = self.postprocess(leaf)
            (slope,) = torch.autograd.grad(logits.sum(), leaf)
        return logits.detach(), slope


def taken_logprobs(hidden: Tensor, actions: Tensor, rows: OutputRows) -> Tensor:
    """Log softmax(logits)[action] by an output layer that is not trained, (N, H), (N,) -> (N,)."""
    return _TakenLogprobs.apply(hidden, actions, rows)


def adapted_logprobs(hidden: Tensor, low: Tensor, actions: Tensor, rows: OutputRows, up: Tensor) -> Tensor:
    """Log softmax(h W^T + low up^T)[action] by an output layer with a trained term of low rank beside it.

    (N, H), (N, r) float32, (N,), and `up` (V, r) float32 -> (N,).
    """
    keep = torch.is_grad_enabled() and (low.requires_grad or up.requires_grad)
    return _AdaptedLogprobs.apply(hidden, low, up, actions, rows, keep)


def log_normalizer(hidden: Tensor, rows: OutputRows | None, weight: Tensor | None = None, scale: float = 1) -> Tensor:
    """Log sum_a exp(logit_a + scale w_a . h), (N, H) -> (N,), without gradient; `rows` or `weight` may be left out."""
    parts = _parts(hidden.detach())
    return torch.cat([_sweep(part, _Tiles(part, rows, weight, scale), False)[0].log() for part in parts])


@torch.no_grad()
def log_mean_exp(hidden: Tensor, rows: OutputRows, weight: Tensor, scale: float) -> Tensor:
    """Log sum_a softmax(logits)_a exp(scale w_a . h), (N, H) -> (N,), without gradient, in one sweep over both layers.

    Exactly 0 for a `weight` of zeros.
    """
    results = []
    for part in _parts(hidden):
        prior, acting, states = _RunningSum(part), _RunningSum(part), part.float()
        for tile in _Tiles(part, rows, weight, scale):
            logits, _ = rows.bent(rows.raw(part, tile.start, tile.stop))
            acting.add(torch.addmm(logits, states, weight[tile].T, alpha=scale))
            prior.add(logits)
        results.append(acting.log() - prior.log())
    return torch.cat(results)


def linear_taken(
    hidden: Tensor, weight: Tensor, actions: Tensor, chosen: Tensor, rows: OutputRows | None, scale: float
) -> tuple[Tensor, Tensor]:
    """w_a . h of the taken tokens (N,), and log sum_a exp(logit_a + scale w_a . h) at the positions `chosen` (M,).

    A trained layer (V, H) beside one that is not. Its gradient is made once for both, as it is as large as the layer.
    """
    keep = torch.is_grad_enabled() and weight.requires_grad
    return _LinearTaken.apply(hidden, weight, actions, chosen, rows, scale, keep)


def _parts(positions: Tensor) -> tuple[Tensor, ...]:
    """Positions that are swept together, evenly: a sweep for the last four would read the whole layer for them."""
    return positions.tensor_split(max(1, round(len(positions) / POSITIONS)))


_Shares = tuple[Tensor, Tensor]  # exp(logits - highest) (N, tile), and the highest logit up to that tile (N, 1)


class _RunningSum:
    """log sum exp of logits that come a tile at a time, (N,)."""

    def __init__(self, hidden: Tensor) -> None:
        self.highest = torch.full((len(hidden), 1), float("-inf"), device=hidden.device)
        self.total = torch.zeros_like(self.highest)

    def add(self, logits: Tensor) -> Tensor:
        """Takes (N, tile) logits and leaves exp(logits - highest) in them; by what earlier terms shrink, (N, 1)."""
        higher = torch.maximum(self.highest, logits.amax(1, keepdim=True))
        shrink = (self.highest - higher).exp_()
        shares = logits.sub_(higher).exp_()
        self.total.mul_(shrink).add_(shares.sum(1, keepdim=True))
        self.highest = higher
        return shrink

    def log(self) -> Tensor:
        return (self.total.log() + self.highest).squeeze(1)


class _Tiles:
    """Which tokens are looked at together, and their rows."""

    def __init__(self, hidden: Tensor, rows: OutputRows | None, weight: Tensor | None, scale: float) -> None:
        self.rows, self.weight, self.scale = rows, weight, scale
        first = rows.weight if weight is None and rows is not None else weight
        assert first is not None
        self.count = len(first)
        held = HELD_ON_CPU if hidden.device.type == "cpu" else HELD_ELSEWHERE
        self.size = max(FEWEST_TOKENS, held // max(1, len(hidden)))

    def __iter__(self) -> Iterator[slice]:
        return (slice(start, min(start + self.size, self.count)) for start in range(0, self.count, self.size))

    def at(self, hidden: Tensor, tile: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """(logits (N, tile), rows (tile, H) that turn a gradient of raw logits into one of the hidden state, slope)."""
        if self.weight is None:
            assert self.rows is not None
            logits, slope = self.rows.bent(self.rows.raw(hidden, tile.start, tile.stop))
            return logits, self.rows.weight[tile], slope
        together = self.together(tile)
        return hidden.float() @ together.T, together, None

    def together(self, tile: slice) -> Tensor:
        """(tile, H) rows of both layers in one, for one product."""
        assert self.weight is not None
        if self.rows is None:
            return self.weight[tile] * self.scale
        return torch.add(self.rows.weight[tile].float(), self.weight[tile], alpha=self.scale)

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return torch.float32 if self.weight is not None or self.rows is None else self.rows.dtype


@torch.no_grad()
def _sweep(
    hidden: Tensor, tiles: _Tiles, with_gradient: bool, kept: list[_Shares] | None = None
) -> tuple[_RunningSum, Tensor | None]:
    """N sums and, where asked, gradients of their logarithms by the hidden state, (N, H); `kept` takes the shares."""
    running = _RunningSum(hidden)
    gradient = torch.zeros(hidden.shape, device=hidden.device) if with_gradient else None
    for tile in tiles:
        shares, rows, slope = tiles.at(hidden, tile)
        shrink = running.add(shares)
        if kept is not None:
            kept.append((shares, running.highest))
        if gradient is not None:
            shares = shares if slope is None else shares.mul_(slope)
            gradient.mul_(shrink)
            if tiles.dtype == torch.float32:
                gradient.addmm_(shares, rows.float())
            else:
                gradient.add_(shares.to(tiles.dtype) @ rows.to(tiles.dtype))
    return running, None if gradient is None else gradient.div_(running.total)


class _TakenLogprobs(torch.autograd.Function):
    """Its gradient by a position's hidden state is a vector that the forward pass finds on its way."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, actions: Tensor, rows: OutputRows) -> Tensor:
        logprobs, gradients = [], []
        for part, taken in zip(_parts(hidden), _parts(actions), strict=True):
            running, pull = _sweep(part, _Tiles(part, rows, None, 1.0), ctx.needs_input_grad[0])
            logits, push = rows.taken(part, taken)
            logprobs.append(logits - running.log())
            gradients.append(None if pull is None else push - pull)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(gradients))  # type: ignore[arg-type]
            ctx.dtype = hidden.dtype
        return torch.cat(logprobs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (grad.unsqueeze(-1) * gradient).to(ctx.dtype), None, None


class _LinearTaken(torch.autograd.Function):
    """Goes over the tokens again in backward: the gradient of a layer needs each position's part in the loss.

    What the sweep of forward found is kept for that as long as it is small.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        actions: Tensor,
        chosen: Tensor,
        rows: OutputRows | None,
        scale: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        states = hidden.float()
        ctx.kept, sums, room = [], [], KEPT
        for places in _parts(chosen):
            part = states[places]
            room -= len(places) * len(weight)
            kept: list[_Shares] | None = [] if keep and room >= 0 else None
            sums.append(_sweep(part, _Tiles(part, rows, weight, scale), False, kept)[0])
            ctx.kept.append(kept or [])
        highest, total = torch.cat([one.highest for one in sums]), torch.cat([one.total for one in sums])
        ctx.save_for_backward(hidden, weight, actions, chosen, highest, total)
        ctx.rows, ctx.scale = rows, scale
        return torch.linalg.vecdot(states, weight[actions]), (total.log() + highest).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_taken: Tensor, grad_normalizer: Tensor
    ) -> tuple[Tensor | None, Tensor, None, None, None, None, None]:
        hidden, weight, actions, chosen, highest, total = ctx.saved_tensors
        states = hidden.float()
        by_hidden = grad_taken.unsqueeze(-1) * weight[actions] if ctx.needs_input_grad[0] else None
        by_weight = torch.empty_like(weight) if len(chosen) else torch.zeros_like(weight)
        shares = grad_normalizer.unsqueeze(1) / total
        pieces = zip(_parts(chosen), _parts(highest), _parts(shares), ctx.kept, strict=True)
        for number, (places, top, share, kept) in enumerate(pieces):
            part = states[places]
            tiles = _Tiles(part, ctx.rows, weight, ctx.scale)
            pull = None if by_hidden is None else torch.zeros_like(part)
            for tile in tiles if len(places) else ():
                if kept:
                    probs, so_far = kept.pop(0)
                    probs.mul_((so_far - top).exp_().mul_(share))
                    rows = None
                else:
                    logits, rows, _ = tiles.at(part, tile)
                    probs = logits.sub_(top).exp_().mul_(share)
                if pull is not None:
                    pull.addmm_(probs, tiles.together(tile) if rows is None else rows)
                out = by_weight[tile]
                torch.addmm(out, probs.T, part, beta=min(number, 1), alpha=ctx.scale, out=out)
            if by_hidden is not None:
                by_hidden.index_add_(0, places, pull)
        by_weight.index_add_(0, actions, grad_taken.unsqueeze(-1) * states)
        return None if by_hidden is None else by_hidden.to(hidden.dtype), by_weight, None, None, None, None, None


class _AdaptedLogprobs(torch.autograd.Function):
    """Goes over the tokens again in backward, as `_LinearTaken` does, and keeps as much.

    The layer's own rows are multiplied a third time only where the hidden state wants a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, low: Tensor, up: Tensor, actions: Tensor, rows: OutputRows, keep: bool
    ) -> Tensor:
        ctx.kept, sums, room = [], [], KEPT
        for part, thin in zip(_parts(hidden), _parts(low), strict=True):
            room -= len(part) * len(up)
            kept: list[_Shares] | None = [] if keep and room >= 0 and rows.postprocess is None else None
            running = _RunningSum(part)
            for tile in _Tiles(part, rows, None, 1.0):
                logits, _ = rows.bent(_with_low_rank(rows, part, thin, up, tile))
                running.add(logits)
                if kept is not None:
                    kept.append((logits, running.highest))
            sums.append(running)
            ctx.kept.append(kept or [])
        highest, total = torch.cat([one.highest for one in sums]), torch.cat([one.total for one in sums])
        logits, ctx.slope = rows.bent(
            rows.raw_of(hidden, actions, rows.weight[actions].to(rows.dtype)) + torch.linalg.vecdot(low, up[actions])
        )
        ctx.save_for_backward(hidden, low, up, actions, highest, total)
        ctx.rows = rows
        return logits - (total.log() + highest).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None, None]:
        hidden, low, up, actions, highest, total = ctx.saved_tensors
        rows: OutputRows = ctx.rows
        raised = (grad if ctx.slope is None else grad * ctx.slope).unsqueeze(1)
        by_low = raised * up[actions]
        by_up = torch.zeros_like(up).index_add_(0, actions, raised * low)
        by_hidden = raised * rows.weight[actions].float() if ctx.needs_input_grad[0] else None
        inputs = (hidden, low, highest, grad.unsqueeze(1) / total, by_low, hidden if by_hidden is None else by_hidden)
        for *pieces, kept in zip(*(_parts(one) for one in inputs), ctx.kept, strict=True):
            part, thin, top, share, pull_low, pull = pieces
            for tile in _Tiles(part, rows, None, 1.0):
                if kept:
                    probs, so_far = kept.pop(0)
                    probs.mul_((so_far - top).exp_().mul_(share))
                else:
                    logits, slope = rows.bent(_with_low_rank(rows, part, thin, up, tile))
                    probs = logits.sub_(top).exp_().mul_(share)
                    probs = probs if slope is None else probs.mul_(slope)
                pull_low.addmm_(probs, up[tile], alpha=-1)
                by_up[tile].addmm_(probs.T, thin, alpha=-1)
                if by_hidden is not None:
                    pull.sub_(probs.to(rows.dtype) @ rows.weight[tile].to(rows.dtype))
        return None if by_hidden is None else by_hidden.to(hidden.dtype), by_low, by_up, None, None, None


def _with_low_rank(rows: OutputRows, hidden: Tensor, low: Tensor, up: Tensor, tile: slice) -> Tensor:
    """(N, tile) float32 logits of both terms, before `postprocess`."""
    return rows.raw(hidden, tile.start, tile.stop).addmm_(low, up[tile].T)
