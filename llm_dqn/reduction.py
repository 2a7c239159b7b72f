"""Sums over processes: what a step has to add up travels together, since each message makes all wait for all.

Gradients are summed here, not by `DistributedDataParallel`, which sums while it computes: a process whose memory ran
out half-way could not begin again, since the others wait in the middle of its backward pass.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 64 * 2**20  # bytes copied together for one message


@torch.no_grad()
def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Adds up each tensor over all processes, in place; those of one type and device travel together."""
    for bucket in _buckets(tensors):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            dist.all_reduce(bucket[0])
            continue
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat)
        sizes = [tensor.numel() for tensor in bucket]
        for tensor, total in zip(bucket, flat.split(sizes), strict=True):
            tensor.copy_(total.view_as(tensor))


def sum_gradients(parameters: Sequence[nn.Parameter], along: Tensor) -> Tensor:
    """Adds up the gradients over all processes, in place; the sums of `along` (n,), float32, which travels with them.

    A parameter without a gradient here gets the others'; one without any on all of them keeps none, so that an
    optimizer leaves it alone.
    """
    has = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=along.dtype)
    told = torch.cat([along, has.to(along.device)])
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    sum_over_processes([told, *gradients])
    somewhere = told[len(along) :].tolist()
    for parameter, gradient, count in zip(parameters, gradients, somewhere, strict=True):
        if count > 0:
            parameter.grad = gradient
    return told[: len(along)]


@torch.no_grad()
def share_from_first(tensors: Iterable[Tensor]) -> None:
    """Gives all processes the tensors of process 0, in place."""
    for tensor in tensors:
        dist.broadcast(tensor, src=0)


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors in an order that is the same on all processes, as many together as may travel in one message."""
    buckets: list[list[Tensor]] = []
    filling: dict[tuple[torch.dtype, torch.device], int] = {}  # -> bytes in the newest bucket of a kind
    newest: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kind, size = (tensor.dtype, tensor.device), tensor.numel() * tensor.element_size()
        if kind not in newest or filling[kind] + size > BUCKET:
            newest[kind], filling[kind] = [], 0
            buckets.append(newest[kind])
        newest[kind].append(tensor)
        filling[kind] += size
    return buckets
