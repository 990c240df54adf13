"""Position embeddings of vision transformers for another image size, interpolated once.

A learned embedding has one row per patch of a square grid, after rows for class and register tokens, which have no
place and are kept as they are. Rotary embeddings are computed from the grid and need nothing of this.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from llm2clip.errors import ModelError

# class token, distillation token, registers: more rows than this before the grid are no prefix
_MAX_PREFIX = 16


def resize_grid(embedding: Tensor, old: int, new: int, prefix: int = 0) -> Tensor:
    """Interpolate position embeddings to another grid, bicubic with antialiasing, in fp32.

    Args:
        embedding: (..., prefix + old², D), any float dtype; leading dimensions of size 1.
        old: patches along one side of the present grid.
        new: patches along one side of the grid to make.
        prefix: rows before the grid (class token, registers), which are kept.

    Returns:
        (..., prefix + new², D) in the dtype of `embedding`; `embedding` itself where the grid stays.
    """
    if new == old:
        return embedding
    *lead, rows, dim = embedding.shape
    if rows != prefix + old * old:
        raise ValueError(
            f"{rows} position embeddings are not {prefix} tokens and a grid of {old} x {old} patches"
        )
    table = embedding.reshape(rows, dim)
    grid = table[prefix:].float().reshape(1, old, old, dim).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False, antialias=True)
    patches = grid.permute(0, 2, 3, 1).reshape(new * new, dim).to(embedding.dtype)
    return torch.cat([table[:prefix], patches]).reshape(*lead, prefix + new * new, dim)


def resized_state(
    state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], old: int, new: int, what: str
) -> dict[str, Tensor]:
    """Weights of a vision transformer for another image size.

    Whatever has one row per patch is found by its shape, so that no family needs a rule of its own.

    Args:
        state: the weights, by name.
        shapes: shapes by name that the model has at the other size.
        old: patches along one side before.
        new: patches along one side after.
        what: name of the model, for errors.

    Raises:
        ModelError: a weight depends on the image size in another way (relative position biases).
    """
    resized = dict(state)
    for name, tensor in state.items():
        wanted = shapes.get(name)
        if wanted is None or wanted == tensor.shape:
            continue
        prefix = tensor.shape[-2] - old * old if tensor.ndim >= 2 else -1
        fits = (
            0 <= prefix <= _MAX_PREFIX
            and tensor.shape[:-2].numel() == 1
            and wanted == (*tensor.shape[:-2], prefix + new * new, tensor.shape[-1])
        )
        if not fits:
            raise ModelError(
                f"{what} cannot change its image size: {name} is {tuple(tensor.shape)} and would have to be "
                f"{tuple(wanted)}, which is not one row per patch. Use the size it was trained with."
            )
        resized[name] = resize_grid(tensor, old, new, prefix)
    return resized
