"""EVA02 towers from files: sizes are read off the weights, names of every published kind are understood."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from llm2clip.errors import ModelError
from llm2clip.models.eva02 import ARCHITECTURES, EVA02, EVA02Config, rotary_tables
from llm2clip.models.positions import resized_state
from llm2clip.models.preprocessing import Preprocessing, read_preprocessor
from llm2clip.models.trunk import no_weights
from llm2clip.models.weights import check_names, not_allowed, read_tensors
from llm2clip.settings import VisionSettings

# EVA's own heads are 64 wide in every size with rotary embeddings
_HEAD_WIDTH = 64
_ROPE = re.compile(r"(?:blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)")
# a whole CLIP model has more than its tower
_NOT_THE_TOWER = ("text.*", "logit_scale")


def read_eva02(
    state: Mapping[str, Tensor], source: str, heads: int | None = None, eps: float | None = None
) -> tuple[dict[str, Tensor], EVA02Config]:
    """A tower's weights under the names of `EVA02`, fp32, and the sizes read off them.

    EVA-CLIP keeps the biases of queries and values apart (`q_bias`, `v_bias`), LLM2CLIP in their layers. Both store
    the rotary tables, once and again in every block: they give the number of heads, are compared with the computed
    ones, and are left out.

    Args:
        state: weights without the prefix `visual.` and without `head`.
        source: the file, for errors.
        heads: attention heads; None: as the rotary tables say, else of 64 dimensions each.
        eps: of every LayerNorm; None: EVA's 1e-6.

    Raises:
        ModelError: the weights are not those of an EVA02 tower, or its rotary table is another.
    """
    weights: dict[str, Tensor] = {}
    tables: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if found := _ROPE.fullmatch(name):
            tables[found[1]] = tensor
        else:
            weights[re.sub(r"\.([qv])_bias$", r".\1_proj.bias", name)] = tensor.float()
    sizes = _sizes(weights, source, heads, next(iter(tables.values()), None))
    if eps is not None:
        sizes = dataclasses.replace(sizes, eps=eps)
    with torch.device("meta"):
        check_names(EVA02(sizes).state_dict(), weights, source)
    computed = dict(zip(("cos", "sin"), rotary_tables(sizes), strict=True))
    for name, table in tables.items():
        wanted = computed[name]
        # stored in half precision with the rest of the weights
        if table.shape != wanted.shape or not torch.allclose(table.float(), wanted, atol=1e-2):
            raise ModelError(
                f"{source}: the stored rotary table freqs_{name} {tuple(table.shape)} is not that of EVA02-CLIP "
                f"for {sizes.grid} x {sizes.grid} patches; its positions are counted in another way"
            )
    return weights, sizes


def _sizes(
    weights: Mapping[str, Tensor], source: str, heads: int | None, table: Tensor | None
) -> EVA02Config:
    try:
        patches = weights["patch_embed.proj.weight"]
        rows = weights["pos_embed"].shape[1] - 1
        hidden = weights["blocks.0.mlp.w1.weight"].shape[0]
    except KeyError as error:
        raise ModelError(f"{source} holds no EVA02 tower: it has no {error.args[0]}") from None
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    grid = round(rows**0.5)
    if grid * grid != rows:
        raise ModelError(f"{source}: {rows} position embeddings are not those of a square grid")
    width, patch = patches.shape[0], patches.shape[-1]
    head_width = table.shape[-1] if table is not None and table.ndim == 2 else _HEAD_WIDTH
    return EVA02Config(grid * patch, patch, width, depth, heads or max(1, width // head_width), hidden)


def eva02_at_size(weights: Mapping[str, Tensor], sizes: EVA02Config, image_size: int | None = None) -> EVA02:
    """A tower with weights of `sizes`, its position embeddings interpolated to `image_size`."""
    target = dataclasses.replace(sizes, image_size=image_size or sizes.image_size)
    tower = EVA02(target)
    shapes = {name: tensor.shape for name, tensor in tower.state_dict().items()}
    tower.load_state_dict(resized_state(weights, shapes, sizes.grid, target.grid, "EVA02"))
    return tower


def build_eva02(settings: VisionSettings) -> tuple[EVA02, Preprocessing]:
    """The tower of `vision.path` (weights of the tower or of a whole CLIP model), or a new one of `vision.name`.

    Raises:
        ModelError: neither is given, the name is unknown, or the weights do not fit.
    """
    if settings.pretrained:
        if not settings.path:
            raise ModelError(no_weights("eva02"))
        inside, projection = _tower_of_file(settings.path)
        weights, found = read_eva02(inside, settings.path)
        tower = eva02_at_size(weights, found, settings.image_size)
        tower.pretrained_projection = projection
        return tower, read_preprocessor(settings.path, tower.image_size).at_size(tower.image_size)
    if settings.name not in ARCHITECTURES:
        raise ModelError(
            f"vision.kind eva02 with random weights needs vision.name: {', '.join(ARCHITECTURES)}; got "
            f"{settings.name!r}"
        )
    sizes = ARCHITECTURES[settings.name]
    if settings.image_size:
        sizes = dataclasses.replace(sizes, image_size=settings.image_size)
    return EVA02(sizes), Preprocessing(sizes.image_size)


def _tower_of_file(path: str) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor | None] | None]:
    """The tower's weights without `visual.`, and the projection behind it."""
    tensors = read_tensors(path)
    prefix = "visual." if any(name.startswith("visual.") for name in tensors) else ""
    inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if strange := not_allowed(sorted(tensors.keys() - {prefix + name for name in inside}), _NOT_THE_TOWER):
        raise ModelError(
            f"{path}: {len(strange)} weights belong neither to the tower nor to the rest of a CLIP model: "
            f"{', '.join(strange[:10])}"
        )
    weight, bias = inside.pop("head.weight", None), inside.pop("head.bias", None)
    return inside, None if weight is None else (weight.float(), None if bias is None else bias.float())
