"""transformers' dual encoders, CLIP and the models that copy its loss: `fuse_clip_loss` gives them one without logits.

Each model computes B×B logits in its own `forward`, and a loss of them. What it makes them of is the same everywhere:
the pooled features of `get_text_features` and `get_image_features`, normalised, and a scale.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn

from llm2clip_kernels import infonce_loss, l2_normalize, nll_loss, sigmoid_loss

from .handle import Handle

log = logging.getLogger(__name__)

Gather = bool | Literal["ring"]
Kind = Literal["softmax", "sigmoid"]

_FOR_BOTH_TOWERS = ("output_attentions", "output_hidden_states")


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


def scale_of(model: Any) -> Tensor:
    """The multiplier of a model's similarities, 0-dim: exp of its `logit_scale`, or 1 / its `temperature`."""
    scale: Tensor = model.logit_scale.exp() if hasattr(model, "logit_scale") else 1.0 / model.temperature
    return scale


def pair_loss(
    first: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    kind: Kind | None = None,
    gather: Gather,
    smoothing: float = 0.0,
) -> Tensor:
    """The mean contrastive loss of pairs.

    Args:
        first: (B, D) of images (or of what is in their place), unit norm.
        text: (B, D), unit norm, row i belongs to row i of `first`.
        scale: multiplier of the similarities, 0-dim.
        bias: added to every logit, or None.
        kind: None: "sigmoid" where there is a bias, "softmax" where there is none.
        gather: whether other ranks' rows are negatives too.
        smoothing: label smoothing of the softmax.

    Returns:
        0-dim mean over all pairs, the same on every rank, with gradients for DDP's averaging.
    """
    if (kind or ("softmax" if bias is None else "sigmoid")) == "sigmoid":
        return sigmoid_loss(first, text, scale, 0.0 if bias is None else bias, gather=gather)
    return infonce_loss(first, text, scale, label_smoothing=smoothing, logit_bias=bias, gather=gather)


def own_loss(model: Any, first: Tensor, text: Tensor, *, gather: Gather, smoothing: float) -> Tensor:
    """The loss that a dual encoder's own forward would return; arguments as in `pair_loss`."""
    first = first.to(text.device)
    if hasattr(model, "logit_scale_t"):
        # CLAP scores texts against audio twice, with two scales, and never audio against texts
        if gather == "ring":
            raise ValueError("gather='ring' is not for CLAP's loss; use gather=True")
        scales = model.logit_scale_t.exp(), model.logit_scale_a.exp()
        losses = [nll_loss(text, first, None, scale, gather=gather) for scale in scales]
        return 0.5 * (losses[0] + losses[1])
    bias = getattr(model, "logit_bias", None)
    return pair_loss(first, text, scale_of(model), bias, gather=gather, smoothing=smoothing)


def _blank(original: Any) -> nn.Module:
    kind = _fused_class(original)
    model: nn.Module = kind.__new__(kind)
    return model


@cache
def _fused_class(original: Any) -> Any:
    """A subclass under the same name, so that configurations and model cards name the model as before."""
    family = family_of(original)
    assert family is not None
    names = argument_names(original.forward)
    for_text = argument_names(original.get_text_features)
    for_side = argument_names(getattr(original, f"get_{family.side}_features"))
    output = getattr(sys.modules[original.forward.__module__], family.output)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        text = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        # a segmentation is made of the scores of all pairs; a tuple's fields are told by their place
        if (
            not given.pop("return_loss", None)
            or text is None
            or given.get(family.pixels) is None
            or given.get("output_segmentation", getattr(self.config, "output_segmentation", False))
            or given.pop("return_dict", self.config.return_dict) is False
        ):
            return original.forward(self, *args, **kwargs)
        for_both = {k: v for k, v in given.items() if k not in names or k in _FOR_BOTH_TOWERS}
        text_inputs = for_both | {k: v for k, v in given.items() if k in for_text}
        side_inputs = for_both | {k: v for k, v in given.items() if k in for_side and k not in for_text}
        # in the original's order, in which dropout draws its numbers
        side_output = getattr(self, f"get_{family.side}_features")(**side_inputs)
        text_output = self.get_text_features(**text_inputs)
        side_embeds, text_embeds = unit_embedding(side_output), unit_embedding(text_output)
        embeds = {"text_embeds": text_embeds, f"{family.side}_embeds": side_embeds}
        towers = {"text_model_output": text_output, family.tower: side_output}
        gather = gathers(self._llm2clip_gather)
        loss = own_loss(self, side_embeds, text_embeds, gather=gather, smoothing=family.smoothing)
        return output(loss=loss, **embeds, **towers)

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        # the class cannot be found under its name, the original's can
        _, _, *state = original.__reduce_ex__(self, protocol)
        return (_blank, (original,), *state)

    # Trainer and peft read the parameters of forward
    forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
    kind: Any = type(
        original.__name__,
        (original,),
        {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "__reduce_ex__": reduce,
            "_llm2clip_original": original,
            "forward": forward,
        },
    )
    return kind


class FusedClipLoss(Handle):
    """What `fuse_clip_loss` changed; `undo()` or leaving a `with` block changes it back.

    Attributes:
        fused: class names of the models that got the fused loss.
    """

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__(*(partial(_unfuse, model) for model in models))
        self.fused = [type(model).__name__ for model in models]

    def __enter__(self) -> FusedClipLoss:
        return self


def _unfuse(model: Any) -> None:
    if "_llm2clip_original" not in type(model).__dict__:
        raise ValueError(
            f"the class of this {type(model).__name__} was changed again after fuse_clip_loss (FSDP does so); undo "
            "that first"
        )
    model.__class__ = model._llm2clip_original
    del model._llm2clip_gather


def is_fused(model: nn.Module) -> bool:
    """Whether a dual encoder has the fused loss."""
    return hasattr(type(model), "_llm2clip_original")


def fuse_clip_loss(model: nn.Module, *, gather: Gather = False) -> FusedClipLoss:
    """Lets a dual encoder of transformers return its contrastive loss without making logits, in place.

    Called with `return_loss=True`, the model returns the loss and both embeddings; the fields of the logits are None.
    Called without, or where only logits will do (`return_dict=False`, GroupViT's segmentation), it does what it did.
    Weights, configuration, files and the signature of `forward` stay as they are. Fuse before `Trainer` or
    accelerate's `prepare` sees the model.

    Args:
        model: one of `FAMILIES` (CLIP, SigLIP, SigLIP 2, ALIGN, AltCLIP, BLIP, Chinese-CLIP, CLAP,
            CLIPSeg, GroupViT, MetaCLIP 2, OWL-ViT, OWLv2, TIPSv2, VisionTextDualEncoder), a model that has one of
            them in it, or a peft model of one. X-CLIP and CLVP are not among them: X-CLIP's text embeddings differ
            from video to video, and CLVP generates the speech it scores.
        gather: with True (or "ring") other ranks' pairs are negatives too, and the loss is the mean over all of
            them, with gradients for DDP's averaging. transformers' own loss knows only the rank's batch.

    Returns:
        The handle: `undo()`, `fused`; also a context manager.

    Raises:
        ValueError: there is no such model, or its forward has been replaced already.

    Examples:
        >>> fuse_clip_loss(model)
        >>> Trainer(model=model, args=arguments, train_dataset=pairs).train()
    """
    found = list(dual_encoders(model))
    if not found and not any(is_fused(module) for module in model.modules()):
        known = ", ".join(FAMILIES)
        raise ValueError(f"fuse_clip_loss: {type(model).__name__} has none of these in it: {known}")
    for module in found:
        if "forward" in module.__dict__:
            raise ValueError(
                f"fuse_clip_loss: the forward of this {type(module).__name__} has been replaced (accelerate does so "
                "for mixed precision); fuse the model before it is prepared"
            )
    for module in found:
        kind: Any = type(module)
        module.__class__ = _fused_class(kind)
        module._llm2clip_gather = gather  # type: ignore[assignment]
    log.info("fuse_clip_loss: %s", ", ".join(type(module).__name__ for module in found) or "fused already")
    return FusedClipLoss(found)
