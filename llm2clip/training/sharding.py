"""FSDP2 for the LLM stage: the frozen weights are split over the ranks, the adapters stay whole on each.

Adapters are a thousandth of the model, so what is worth splitting is what is frozen. That leaves nothing to reduce
but the adapters' gradients, once a step; checkpoints, resume on another number of ranks and the exported adapter are
those of one process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from llm2clip.models.bidirectional import decoder_layers
from llm2clip.training.world import World


def shard_frozen(model: nn.Module, world: World) -> None:
    """Split every frozen weight of a transformers decoder over all ranks, in place, and move it to their devices.

    Weights of a layer are gathered before it runs, in the forward and again in the backward pass, and let go after
    it. From now on the model's forward is a collective: all ranks must make equally many.

    Args:
        model: the decoder itself (inside peft), with adapters in its layers; on the CPU at best, so that no device
            ever holds the whole.
        world: the ranks, at least two.
    """
    trained = {p for p in model.parameters() if p.requires_grad}
    for parameter in trained:  # which fully_shard leaves where they are
        parameter.data = parameter.data.to(world.device)
    mesh = init_device_mesh(world.device.type, (world.size,))
    for _, layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    fully_shard(model, mesh=mesh, ignored_params=trained)


def average_gradients(optimizer: torch.optim.Optimizer, world: World) -> None:
    """Average the gradients of all trained parameters over the ranks, as DistributedDataParallel does."""
    gradients: list[Any] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:  # another rank may have one
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world.size
    for gradient, average in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(average.view_as(gradient))
