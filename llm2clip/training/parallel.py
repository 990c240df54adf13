"""One module over several ranks: torch's DistributedDataParallel, or its FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from llm2clip.training.world import World


def spread(module: nn.Module, world: World, how: Literal["ddp", "fsdp"]) -> nn.Module:
    """The module to call in training on this rank; with one rank the module itself.

    `fsdp` shards the module in place: first every transformer block, which is gathered when it runs, then the rest.
    Scalars (the logit scale) cannot be sharded and stay whole on every rank; `average_scalars` joins their
    gradients. Either way gradients are averaged over the ranks.
    """
    if world.size == 1:
        return module
    if how == "ddp":
        ids = [world.device.index] if world.device.type == "cuda" else None
        # no buffer is exchanged: ranks may differ in the number of forwards of a gradient cache
        return nn.parallel.DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)
    _agree_on_start(module)
    mesh = init_device_mesh(world.device.type, (world.size,))
    scalars = set(_scalars(module))
    for block in transformer_blocks(module):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh, ignored_params=scalars)
    return module


@contextmanager
def exchange_gradients(module: nn.Module, active: bool) -> Iterator[None]:
    """Whether a backward inside the block adds up the ranks' gradients; that of a batch's last chunk does."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(active)
    if isinstance(module, nn.parallel.DistributedDataParallel) and not active:
        with module.no_sync():
            yield
    else:
        yield


def average_scalars(module: nn.Module, world: World) -> None:
    """Average the gradients that sharding left to each rank, after the backward of a batch."""
    if not isinstance(module, FSDPModule):
        return
    for parameter in _scalars(module):
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= world.size


def unscale(module: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """`scaler.unscale_`, which takes sharded gradients or whole ones, but not both at once."""
    if not scaler.is_enabled():
        return
    whole = [p for p in _scalars(module) if p.grad is not None] if isinstance(module, FSDPModule) else []
    gradients = [parameter.grad for parameter in whole]
    for parameter in whole:
        parameter.grad = None
    scaler.unscale_(optimizer)
    for parameter, gradient in zip(whole, gradients, strict=True):
        assert gradient is not None
        parameter.grad = gradient / scaler.get_scale()


@torch.no_grad()
def copy_whole(sharded: nn.Module, plain: nn.Module | None) -> None:
    """Gather every parameter and buffer of a sharded module (all ranks take part) into one of the same structure.

    Args:
        sharded: as `spread` left it.
        plain: where the tensors go; None on ranks that need none.
    """
    targets = dict(_tensors(plain)) if plain is not None else {}
    for name, tensor in _tensors(sharded):
        gathered = full_tensor(tensor.detach())
        if name in targets:
            targets[name].copy_(gathered)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank (all take part); any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(value: Tensor, target: Tensor) -> Tensor:
    """This rank's shard of `value`, which every rank holds, laid out as the sharded `target`; else `value` itself."""
    if not isinstance(target, DTensor):
        return value
    value = value.to(target.device)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def transformer_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost repeated blocks: members of lists of at least two modules of one class."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and _is_stack(child):
            yield from child.children()
        else:
            yield from transformer_blocks(child)


def _is_stack(modules: nn.Module) -> bool:
    members = list(modules.children())
    kinds = [type(member) for member in members]
    return any(kinds.count(kind) >= 2 and not kind.__module__.startswith("torch.nn") for kind in set(kinds))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _scalars(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.ndim == 0]


@torch.no_grad()
def _agree_on_start(module: nn.Module) -> None:
    # as DDP does: weights drawn on one rank hold for all
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(tensor.detach(), src=0)
