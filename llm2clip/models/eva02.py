"""EVA02 vision transformers as in EVA02-CLIP B/16 and L/14 (arXiv 2303.11331, 2303.15389).

Parameters have the names and shapes of the published `visual.*` weights of LLM2CLIP and EVA-CLIP, without their `head`,
which is the projection of the whole model. What these towers have that other ViTs have not: rotary embeddings over rows
and columns beside a learned position embedding, SwiGLU, and a norm inside attention and inside the MLP (sub-LN).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llm2clip.errors import ModelError
from llm2clip.models.patch_dropout import keep_rotations, keep_tokens, kept_patches
from llm2clip.models.trunk import VisionTrunk

_THETA = 10_000.0
# positions are counted as if every image had been one of 16 x 16 patches, the grid of pre-training
_ROPE_GRID = 16


@dataclass(frozen=True)
class EVA02Config:
    """Sizes of an EVA02 tower.

    Attributes:
        image_size: side of the square input in pixels.
        patch_size: side of a patch in pixels.
        width: width of the states and of the feature.
        depth: blocks.
        heads: attention heads.
        hidden: hidden width of the SwiGLU.
        eps: of every LayerNorm.
    """

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 2048
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if min(value for name, value in asdict(self).items() if name != "eps") < 1:
            raise ModelError(f"EVA02 sizes must be positive, got {self}")
        if self.width % (4 * self.heads):
            raise ModelError(
                f"EVA02 needs a width that its heads divide by a multiple of 4, got {self.width} / {self.heads}"
            )
        if self.image_size % self.patch_size:
            raise ModelError(
                f"image size {self.image_size} is not a multiple of the patch size {self.patch_size}"
            )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


ARCHITECTURES = {
    "eva02-b-16": EVA02Config(),
    "eva02-l-14": EVA02Config(patch_size=14, width=1024, depth=24, heads=16, hidden=2730),
    "eva02-l-14-336": EVA02Config(336, patch_size=14, width=1024, depth=24, heads=16, hidden=2730),
}


def rotary_tables(config: EVA02Config) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every patch, (grid², width / heads) fp32; the first half turns with the row, the second
    with the column, and neighbours in a half are a pair."""
    half = config.width // config.heads // 2
    frequencies = _THETA ** -(torch.arange(0, half, 2).float() / half)
    places = torch.arange(config.grid).float() / config.grid * _ROPE_GRID
    angles = torch.outer(places, frequencies).repeat_interleave(2, dim=1)  # (grid, half)
    rows = angles[:, None].expand(-1, config.grid, -1)
    columns = angles[None].expand(config.grid, -1, -1)
    both = torch.cat([rows, columns], dim=-1).reshape(config.grid**2, 2 * half)
    return both.cos(), both.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of neighbours in x (B, H, N, Dh) by the angles of their patch; fp32 where tables are fp32."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cos + turned * sin


class Attention(nn.Module):
    """Self-attention with rotary embeddings on the patches and a norm before the output layer."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.inner_attn_ln = nn.LayerNorm(width, eps=eps)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, 1 + N, width), tables (N, Dh) or (B, 1, N, Dh) -> (B, 1 + N, width)."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        # the class token has no place
        q, k = (torch.cat([t[:, :, :1], rotate(t[:, :, 1:], cos, sin).to(t.dtype)], dim=2) for t in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(self.inner_attn_ln(mixed))


class SwiGLU(nn.Module):
    """w3(LN(silu(w1 x) * w2 x))."""

    def __init__(self, width: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(width, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, eps=eps)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


class Block(nn.Module):
    """x + attention(LN(x)), then x + SwiGLU(LN(x))."""

    def __init__(self, config: EVA02Config) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.eps)
        self.attn = Attention(config.width, config.heads, config.eps)
        self.norm2 = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = SwiGLU(config.width, config.hidden, config.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, 1 + N, width) -> the same shape."""
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Patches (B, 3, S, S) to states (B, N, width), in rows from the top."""

    def __init__(self, config: EVA02Config) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, N, width)."""
        return self.proj(pixel_values).flatten(2).transpose(1, 2)


class EVA02(VisionTrunk):
    """The normed class token (B, width) of an EVA02 vision transformer.

    Args:
        config: sizes.
    """

    kind = "eva02"

    def __init__(self, config: EVA02Config) -> None:
        super().__init__()
        self.sizes = config
        self.dim, self.image_size = config.width, config.image_size
        self.grad_checkpointing = False
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, config.width))
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        cos, sin = rotary_tables(config)
        self.rope_cos = nn.Buffer(cos, persistent=False)
        self.rope_sin = nn.Buffer(sin, persistent=False)
        self._reset()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) -> (B, width)."""
        patches = self.patch_embed(pixel_values)
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1) + self.pos_embed
        cos: Tensor = self.rope_cos
        sin: Tensor = self.rope_sin
        if self.training and self.patch_dropout:
            kept = kept_patches(x.shape[0], patches.shape[1], self.patch_dropout, x.device)
            x = keep_tokens(x, kept, 1)
            cos, sin = keep_rotations(cos, kept), keep_rotations(sin, kept)
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin)
        return self.norm(x[:, 0])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EVA02:
        super()._apply(fn, recurse)
        if self.rope_cos.dtype in (torch.float16, torch.bfloat16):
            # angles of half precision would move the patches
            for name, table in zip(("rope_cos", "rope_sin"), rotary_tables(self.sizes), strict=True):
                self._buffers[name] = table.to(self.rope_cos.device)
        return self

    def config(self) -> dict[str, Any]:
        """The sizes."""
        return {"config": asdict(self.sizes)}

    def resized(self, image_size: int) -> EVA02:
        """The tower for images of another size, its position embeddings interpolated."""
        from llm2clip.models.eva02_files import eva02_at_size

        return eva02_at_size(self.state_dict(), self.sizes, image_size)

    def set_patch_dropout(self, rate: float) -> None:
        """Leave out a share of the patches in training."""
        self.patch_dropout = rate

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute each block in the backward."""
        self.grad_checkpointing = enabled

    def _reset(self) -> None:
        """EVA's initial values: width 0.02, output layers smaller with depth."""
        for tensor in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(tensor, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            for index, block in enumerate(self.blocks):
                assert isinstance(block, Block)
                for weight in (block.attn.proj.weight, block.mlp.w3.weight):
                    weight.div_(math.sqrt(2.0 * (index + 1)))
