"""FSDP2 for a trunk that does not fit on one device: `torch.distributed.fsdp.fully_shard`, layer by layer.

Each process holds a share of every decoder layer, base and adapters alike, and gathers one layer at a time while it
computes. Embeddings, the last norm, the output layer and the Q- and V-heads stay whole everywhere: the first three are
frozen under LoRA, and the sums over the vocabulary read the output layer row by row.

What is proven, on two CPU processes: loss, gradients, target sync and checkpoint. `DQNTrainer` does not use this, since
processes that write completions take different numbers of steps and would wait for one another's shares for ever; a
learner whose completions come from elsewhere (`rollout.collectors`) has no such steps.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from llm_dqn import models
from llm_dqn.errors import UserError
from llm_dqn.network import QNetwork


def decoder_layers(network: QNetwork) -> nn.ModuleList:
    """The layers of the trunk. Raises UserError where all weights are tuned, or the trunk has no list of layers."""
    if not network.has_adapter:
        raise UserError("sharding needs LoRA: without it reference and target are whole copies of the model")
    trunk = models.trunk(network.roles.plain("online"))
    lists = [child for child in trunk.children() if isinstance(child, nn.ModuleList)]
    if not lists:
        raise UserError(f"{type(trunk).__name__} has no list of layers to shard")
    return max(lists, key=lambda child: sum(parameter.numel() for parameter in child.parameters()))


def shard(network: QNetwork, mesh: DeviceMesh) -> None:
    """Leaves each process of `mesh` its share of every decoder layer; before an optimizer is made."""
    for layer in decoder_layers(network):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def average_whole_gradients(network: QNetwork) -> None:
    """Averages over processes the gradients that `fully_shard` does not: those of the parts that stay whole."""
    for parameter in network.parameters():
        if parameter.grad is not None and not isinstance(parameter, DTensor):
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


@torch.no_grad()
def gradient_norm(network: QNetwork) -> Tensor:
    """L2 norm over all parameters, shares and whole ones, the same on every process."""
    shares, whole = torch.zeros(()), torch.zeros(())
    for parameter in network.parameters():
        if isinstance(parameter.grad, DTensor):
            shares = shares + parameter.grad.to_local().float().square().sum()
        elif parameter.grad is not None:
            whole = whole + parameter.grad.float().square().sum()
    dist.all_reduce(shares)
    return (shares + whole).sqrt()


def save(state: Mapping[str, Tensor], folder: Path) -> None:
    """Every process writes its shares, as safetensors; nothing is gathered."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(dict(state), storage_writer=writer)


def load(state: Mapping[str, Tensor], folder: Path) -> None:
    """Fills the tensors of `state`, each process its shares, however many processes wrote them."""
    dcp.load(dict(state), storage_reader=HuggingFaceStorageReader(str(folder)))
