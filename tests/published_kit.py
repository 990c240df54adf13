"""Small checkpoints in the layouts of the published ones, and what they must compute, in plain torch.

Names and shapes are written down here once more, from the LLM2CLIP repository and the model cards, so that they do not
come from the code that reads them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

WIDTH, HEADS, DEPTH, HIDDEN, PATCH, SIDE, EMBED, LLM = 128, 2, 2, 40, 4, 16, 10, 12
GRID = SIDE // PATCH
Shapes = dict[str, tuple[int, ...]]


def filled(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Random weights; norms around one."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        state[name] = torch.randn(shape, generator=generator) * 0.15
        if len(shape) == 1 and name.endswith("weight"):
            state[name] += 1.0
    return state


def linear_shapes(name: str, out: int, inside: int) -> Shapes:
    return {f"{name}.weight": (out, inside), f"{name}.bias": (out,)}


def norm_shapes(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def adapter_shapes(prefix: str, depth: int = 4, llm: int = LLM, embed: int = EMBED) -> Shapes:
    """`text_adapter.adaptor.` on the hub, `text.text_adaptor.` in the repository's files."""
    shapes: Shapes = {}
    for i in range(depth):
        shapes |= norm_shapes(f"{prefix}{i}.ln", llm)
        shapes |= linear_shapes(f"{prefix}{i}.fn.0", 2 * llm, llm) | linear_shapes(
            f"{prefix}{i}.fn.3", llm, 2 * llm
        )
    return shapes | norm_shapes(f"{prefix}{depth}", llm) | linear_shapes(f"{prefix}{depth + 1}", embed, llm)


def clip_hub_shapes(
    width: int = WIDTH, depth: int = DEPTH, hidden: int = HIDDEN, patch: int = PATCH, rows: int = GRID**2
) -> Shapes:
    """The image side of LLM2CLIP-Openai-*: `vision_model.*`, `visual_projection` without bias, `logit_scale`."""
    shapes: Shapes = {
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "vision_model.embeddings.position_embedding.weight": (1 + rows, width),
        "logit_scale": (),
    }
    shapes |= norm_shapes("vision_model.pre_layrnorm", width) | norm_shapes(
        "vision_model.post_layernorm", width
    )
    for i in range(depth):
        block = f"vision_model.encoder.layers.{i}"
        for layer in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear_shapes(f"{block}.self_attn.{layer}", width, width)
        shapes |= norm_shapes(f"{block}.layer_norm1", width) | norm_shapes(f"{block}.layer_norm2", width)
        shapes |= linear_shapes(f"{block}.mlp.fc1", hidden, width) | linear_shapes(
            f"{block}.mlp.fc2", width, hidden
        )
    return shapes


def openai_shapes() -> Shapes:
    """OpenAI's ViT in the repository's files, as open_clip names it."""
    shapes: Shapes = {
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": (1 + GRID**2, WIDTH),
        "visual.conv1.weight": (WIDTH, 3, PATCH, PATCH),
        "visual.proj": (WIDTH, EMBED),
        "logit_scale": (),
    }
    shapes |= norm_shapes("visual.ln_pre", WIDTH) | norm_shapes("visual.ln_post", WIDTH)
    for i in range(DEPTH):
        block = f"visual.transformer.resblocks.{i}"
        shapes |= norm_shapes(f"{block}.ln_1", WIDTH) | norm_shapes(f"{block}.ln_2", WIDTH)
        shapes |= {
            f"{block}.attn.in_proj_weight": (3 * WIDTH, WIDTH),
            f"{block}.attn.in_proj_bias": (3 * WIDTH,),
        }
        shapes |= linear_shapes(f"{block}.attn.out_proj", WIDTH, WIDTH)
        shapes |= linear_shapes(f"{block}.mlp.c_fc", HIDDEN, WIDTH) | linear_shapes(
            f"{block}.mlp.c_proj", WIDTH, HIDDEN
        )
    return shapes


def siglip_shapes(width: int = WIDTH) -> Shapes:
    """SigLIP's ViT in the repository's files, as timm names it; its feature is not projected."""
    t = "visual.trunk"
    shapes: Shapes = {
        f"{t}.pos_embed": (1, GRID**2, width),
        f"{t}.patch_embed.proj.weight": (width, 3, PATCH, PATCH),
        f"{t}.patch_embed.proj.bias": (width,),
        f"{t}.attn_pool.latent": (1, 1, width),
        "logit_scale": (),
    }
    for i in range(DEPTH):
        block = f"{t}.blocks.{i}"
        shapes |= norm_shapes(f"{block}.norm1", width) | norm_shapes(f"{block}.norm2", width)
        shapes |= linear_shapes(f"{block}.attn.qkv", 3 * width, width)
        shapes |= linear_shapes(f"{block}.attn.proj", width, width)
        shapes |= linear_shapes(f"{block}.mlp.fc1", HIDDEN, width) | linear_shapes(
            f"{block}.mlp.fc2", width, HIDDEN
        )
    shapes |= norm_shapes(f"{t}.norm", width) | norm_shapes(f"{t}.attn_pool.norm", width)
    shapes |= linear_shapes(f"{t}.attn_pool.q", width, width) | linear_shapes(
        f"{t}.attn_pool.kv", 2 * width, width
    )
    shapes |= linear_shapes(f"{t}.attn_pool.proj", width, width)
    shapes |= linear_shapes(f"{t}.attn_pool.mlp.fc1", HIDDEN, width)
    return shapes | linear_shapes(f"{t}.attn_pool.mlp.fc2", width, HIDDEN)


def plain_adapter(
    state: dict[str, Tensor], prefix: str, x: Tensor, *, depth: int = 4, normalize: bool = True
) -> Tensor:
    """L2-normalise, residual blocks, LayerNorm, Linear."""
    if normalize:
        x = x / x.norm(dim=-1, keepdim=True)
    for i in range(depth):
        h = _norm(x, state, f"{prefix}{i}.ln")
        h = _linear(h, state, f"{prefix}{i}.fn.0")
        h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
        x = x + _linear(h, state, f"{prefix}{i}.fn.3")
    return _linear(_norm(x, state, f"{prefix}{depth}"), state, f"{prefix}{depth + 1}")


def plain_openai(state: dict[str, Tensor], pixels: Tensor, *, quick: bool = True) -> Tensor:
    """OpenAI's ViT with its projection."""
    v = "visual."

    def act(x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x) if quick else 0.5 * x * (1 + torch.erf(x / 2**0.5))

    x = _patches(pixels, state[f"{v}conv1.weight"], None)
    x = (
        torch.cat([state[f"{v}class_embedding"].expand(len(x), 1, -1), x], 1)
        + state[f"{v}positional_embedding"]
    )
    x = _norm(x, state, f"{v}ln_pre")
    for i in range(DEPTH):
        b = f"{v}transformer.resblocks.{i}"
        joined = (
            _norm(x, state, f"{b}.ln_1") @ state[f"{b}.attn.in_proj_weight"].T
            + state[f"{b}.attn.in_proj_bias"]
        )
        x = x + _linear(_attend(*joined.chunk(3, -1), HEADS), state, f"{b}.attn.out_proj")
        x = x + _mlp(_norm(x, state, f"{b}.ln_2"), state, f"{b}.mlp.c_fc", f"{b}.mlp.c_proj", act)
    return _norm(x[:, 0], state, f"{v}ln_post") @ state[f"{v}proj"]


def plain_siglip(state: dict[str, Tensor], pixels: Tensor, heads: int) -> Tensor:
    """SigLIP's ViT with attention pooling, GELU in its exact form as in timm."""
    t = "visual.trunk"

    def act(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))

    x = _patches(pixels, state[f"{t}.patch_embed.proj.weight"], state[f"{t}.patch_embed.proj.bias"])
    x = x + state[f"{t}.pos_embed"]
    for i in range(DEPTH):
        b = f"{t}.blocks.{i}"
        q, k, w = _linear(_norm(x, state, f"{b}.norm1", 1e-6), state, f"{b}.attn.qkv").chunk(3, -1)
        x = x + _linear(_attend(q, k, w, heads), state, f"{b}.attn.proj")
        x = x + _mlp(_norm(x, state, f"{b}.norm2", 1e-6), state, f"{b}.mlp.fc1", f"{b}.mlp.fc2", act)
    x = _norm(x, state, f"{t}.norm", 1e-6)
    p = f"{t}.attn_pool"
    q = _linear(state[f"{p}.latent"].expand(len(x), 1, -1), state, f"{p}.q")
    k, w = _linear(x, state, f"{p}.kv").chunk(2, -1)
    x = _linear(_attend(q, k, w, heads), state, f"{p}.proj")
    x = x + _mlp(_norm(x, state, f"{p}.norm", 1e-6), state, f"{p}.mlp.fc1", f"{p}.mlp.fc2", act)
    return x[:, 0]


def _patches(pixels: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(pixels, weight, bias, stride=PATCH).flatten(2).transpose(1, 2)


def _norm(x: Tensor, state: dict[str, Tensor], name: str, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def _linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _mlp(
    x: Tensor, state: dict[str, Tensor], first: str, last: str, act: Callable[[Tensor], Tensor]
) -> Tensor:
    return _linear(act(_linear(x, state, first)), state, last)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)
