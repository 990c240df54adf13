"""transformers' dual encoders (CLIP and the models that copy its loss): where their features and scales are.

Each model computes B×B logits and `image_text_contrastive_loss` of them in its own `forward`. What it makes them of is
the same everywhere: the pooled features of `get_text_features` and `get_image_features`, normalised, and a
temperature. That is all this file knows.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn

from llm2clip_kernels import infonce_loss, l2_normalize, nll_loss, sigmoid_loss

Gather = bool | Literal["ring"]
Kind = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Family:
    """A model class of transformers.

    Attributes:
        output: name of its output class, in the module of the model.
        side: what is paired with text; the features come from `get_<side>_features`.
        tower: name of the other tower's field in the output.
        pixels: the input without which that side has nothing to show.
        smoothing: label smoothing of the model's own loss.
    """

    output: str
    side: str = "image"
    tower: str = "vision_model_output"
    pixels: str = "pixel_values"
    smoothing: float = 0.0


FAMILIES: Mapping[str, Family] = {
    "AlignModel": Family("AlignOutput", smoothing=0.1),
    "AltCLIPModel": Family("AltCLIPOutput"),
    "BlipModel": Family("BlipOutput"),
    "CLIPModel": Family("CLIPOutput"),
    "CLIPSegModel": Family("CLIPSegOutput"),
    "ChineseCLIPModel": Family("ChineseCLIPOutput"),
    "ClapModel": Family("ClapOutput", "audio", "audio_model_output", "input_features"),
    "GroupViTModel": Family("GroupViTModelOutput"),
    "MetaClip2Model": Family("MetaClip2Output"),
    "OwlViTModel": Family("OwlViTOutput"),
    "Owlv2Model": Family("Owlv2Output"),
    "Siglip2Model": Family("Siglip2Output"),
    "SiglipModel": Family("SiglipOutput"),
    "Tipsv2Model": Family("Tipsv2Output"),
    "VisionTextDualEncoderModel": Family("CLIPOutput"),
}


def family_of(kind: type[nn.Module]) -> Family | None:
    """The family whose `forward` runs for a class, None for any other forward (also an overridden one)."""
    forward: Any = kind.forward
    if not getattr(forward, "__module__", "").startswith("transformers.models."):
        return None
    return FAMILIES.get(forward.__qualname__.split(".")[0])


def dual_encoders(model: nn.Module) -> Iterator[nn.Module]:
    """The dual encoders in a model: itself, or what peft, DDP or a detection head have wrapped."""
    return (module for module in model.modules() if family_of(type(module)) is not None)


def argument_names(function: Any) -> tuple[str, ...]:
    """Names of a function's own parameters, without `self` and `**kwargs`."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds and p.name != "self")


def unit_embedding(features: Any) -> Tensor:
    """(B, D) of what `get_*_features` returned, which is an output object in transformers 5, normalised."""
    return l2_normalize(features if isinstance(features, Tensor) else features.pooler_output)


def gathers(gather: Gather) -> Gather:
    """`gather`, where there is a process group to gather over."""
    return gather if dist.is_available() and dist.is_initialized() else False


def _scale(model: Any) -> Tensor:
    if hasattr(model, "logit_scale"):
        scale: Tensor = model.logit_scale.exp()
        return scale
    if hasattr(model, "temperature"):
        temperature: Tensor = 1.0 / model.temperature
        return temperature
    raise ValueError(
        f"{type(model).__name__} has neither logit_scale (a logarithm) nor temperature; give the model one of "
        "them, or override contrastive_loss"
    )


def objective(
    model: Any,
    first: Tensor,
    text: Tensor,
    *,
    gather: Gather,
    kind: Kind | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """The loss that a model's own forward would return, without logits.

    Args:
        model: has `logit_scale` (a logarithm) or `temperature`; with a `logit_bias` the loss is SigLIP's; with
            `logit_scale_a` and `logit_scale_t` it is CLAP's.
        first: (B, D) of images (or of what is in their place), unit norm.
        text: (B, D), unit norm, row i belongs to row i of `first`.
        gather: whether other ranks' rows are negatives too; the model's own loss has those of its rank alone.
        kind: None: as the model says.
        smoothing: label smoothing of the softmax.

    Returns:
        0-dim mean over all pairs, the same on every rank, with gradients for DDP's averaging.
    """
    first = first.to(text.device)
    if hasattr(model, "logit_scale_t") and hasattr(model, "logit_scale_a"):
        # CLAP scores texts against audio twice, with two scales, and never audio against texts
        if gather == "ring":
            raise ValueError("gather='ring' is not for CLAP's loss; use gather=True")
        scales = model.logit_scale_t.exp(), model.logit_scale_a.exp()
        losses = [nll_loss(text, first, None, scale, gather=gather) for scale in scales]
        return 0.5 * (losses[0] + losses[1])
    bias = getattr(model, "logit_bias", None)
    if kind == "sigmoid" or (kind is None and bias is not None):
        return sigmoid_loss(first, text, _scale(model), 0.0 if bias is None else bias, gather=gather)
    return infonce_loss(first, text, _scale(model), label_smoothing=smoothing, gather=gather)
