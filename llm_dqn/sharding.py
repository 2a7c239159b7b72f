"""FSDP2 for a trunk that does not fit beside what learning needs: torch's `fully_shard`, layer by layer.

Each process holds a share of every decoder layer, base and adapters alike, and gathers one layer at a time while it
learns. Embeddings, the last norm, the output layer and the Q- and V-heads stay whole everywhere: the first three are
frozen under LoRA, and the sums over the vocabulary read the output layer row by row.

Processes write completions of different length, and would wait for one another's shares: each holds the layers `whole`
while it writes or measures. That is when no gradients, moments and activations of learning take memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from llm_dqn import models
from llm_dqn.errors import RunError, UserError
from llm_dqn.network import QNetwork


def decoder_layers(network: QNetwork) -> nn.ModuleList:
    """The layers of the trunk. Raises UserError where all weights are tuned, or the trunk has no list of layers."""
    if not network.has_adapter:
        raise UserError(
            "train.sharding: fsdp2 needs LoRA: without it (lora: null) reference and target are copies of the model"
        )
    trunk = models.trunk(network.roles.plain("online"))
    lists = [child for child in trunk.children() if isinstance(child, nn.ModuleList)]
    if not lists:
        raise UserError(f"{type(trunk).__name__} has no list of layers to shard")
    return max(lists, key=lambda child: sum(parameter.numel() for parameter in child.parameters()))


def shard(network: QNetwork, mesh: DeviceMesh) -> None:
    """Leaves each process of `mesh` its share of every decoder layer; before an optimizer is made."""
    for layer in decoder_layers(network):
        sharded = fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        sharded.set_gradient_divide_factor(1.0)  # losses are divided by counts over all processes: gradients add up
        sharded.set_force_sum_reduction_for_comms(True)


def shard_over(network: QNetwork, device: torch.device, world: int) -> None:
    """`shard` over all processes; sees that it came to pass. Raises UserError for a single process, and as `shard`."""
    if world == 1:
        raise UserError("train.sharding: fsdp2 needs several processes (--num-processes); use none")
    shard(network, init_device_mesh(device.type, (world,)))
    left = [name for layer in decoder_layers(network) for name, p in layer.named_parameters() if not is_share(p)]
    if left:
        raise RunError(f"train.sharding: fsdp2 was asked for, and {left[0]} is whole on every process")


def is_share(tensor: Tensor | None) -> bool:
    """Whether each process has only a part of it."""
    return isinstance(tensor, DTensor)


@contextmanager
def whole(network: QNetwork) -> Iterator[None]:
    """All layers whole on every process, so that each may use the network alone; entered by all together."""
    layers = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for layer in layers:
        layer.set_reshard_after_forward(False)
        layer.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True)
            layer.reshard()


@contextmanager
def adapters_whole(network: QNetwork) -> Iterator[None]:
    """Both adapters whole in everything that is saved meanwhile, on any process; entered by all together."""
    model = network.roles.model
    adapters = {
        name: p.full_tensor() for name, p in model.named_parameters() if isinstance(p, DTensor) and "lora_" in name
    }

    def put(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        state.update({name: adapters[name] for name in state.keys() & adapters.keys()})

    handle = model.register_state_dict_post_hook(put)
    try:
        yield
    finally:
        handle.remove()


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with shares put together, on all processes."""
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in tensors.items()}


def share_of(value: Tensor, like: Tensor) -> Tensor:
    """Where `like` is a share of a tensor, this process's part of a whole one; else the whole."""
    if not isinstance(like, DTensor) or like.shape != value.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


@torch.no_grad()
def restore(state: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Fills the tensors of `state`, shares or not, from whole ones."""
    for name, tensor in state.items():
        tensor.copy_(share_of(saved[name].to(tensor.dtype), tensor))


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scales gradients, shares and whole ones, down to an L2 norm over all; the norm before, alike on every process."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    shares = torch.zeros((), device=gradients[0].device)
    whole = torch.zeros_like(shares)
    for gradient in gradients:
        if isinstance(gradient, DTensor):
            shares = shares + gradient.to_local().float().square().sum()
        else:
            whole = whole + gradient.float().square().sum()
    dist.all_reduce(shares)
    norm = (shares + whole).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(scale)
    return norm


def save(state: Mapping[str, Tensor], folder: Path) -> None:
    """Every process writes its shares, as safetensors; nothing is gathered."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(dict(state), storage_writer=writer)


def load(state: Mapping[str, Tensor], folder: Path) -> None:
    """Fills the tensors of `state`, each process its shares, however many processes wrote them."""
    dcp.load(dict(state), storage_reader=HuggingFaceStorageReader(str(folder)))
