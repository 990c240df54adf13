"""transformers' dual encoders and its Trainer with the fused losses.

| what is trained | one line |
|---|---|
| CLIP, SigLIP and their kin | `fuse_clip_loss(model)`, then `Trainer` as before |
| a model that returns two embeddings | `class MyTrainer(ContrastiveTrainerMixin, Trainer)` |
| the same, without a subclass of Trainer | `Trainer(..., compute_loss_func=ContrastiveLoss(model, arguments))` |
"""

from __future__ import annotations

import inspect
import logging
import sys
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip_kernels import l2_normalize

from .dual_encoders import (
    FAMILIES,
    Gather,
    Kind,
    argument_names,
    dual_encoders,
    family_of,
    gathers,
    objective,
    unit_embedding,
)
from .handle import Handle

log = logging.getLogger(__name__)

_FOR_BOTH_TOWERS = ("output_attentions", "output_hidden_states")


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
        loss = objective(self, side_embeds, text_embeds, gather=gather, smoothing=family.smoothing)
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
    model.__class__ = model._llm2clip_original
    del model._llm2clip_gather


def _is_fused(model: nn.Module) -> bool:
    return hasattr(type(model), "_llm2clip_original")


def fuse_clip_loss(model: nn.Module, *, gather: Gather = False) -> FusedClipLoss:
    """Lets a dual encoder of transformers return its contrastive loss without making logits, in place.

    Called with `return_loss=True`, the model returns the loss and both embeddings; the fields of the logits are None.
    Called without, or where only logits will do (`return_dict=False`, GroupViT's segmentation), it does what it did.
    Weights, configuration, files and the signature of `forward` stay as they are. Fuse before `Trainer` or
    accelerate's `prepare` sees the model.

    Args:
        model: one of `dual_encoders.FAMILIES` (CLIP, SigLIP, SigLIP 2, ALIGN, AltCLIP, BLIP, Chinese-CLIP, CLAP,
            CLIPSeg, GroupViT, MetaCLIP 2, OWL-ViT, OWLv2, TIPSv2, VisionTextDualEncoder), a model that has one of
            them in it, or a peft model of one. X-CLIP and CLVP are not among them: X-CLIP's text embeddings differ
            from video to video, and CLVP generates the speech it scores.
        gather: with True (or "ring") other ranks' pairs are negatives too, and the loss is the mean over all of
            them, with gradients for DDP's averaging. transformers' own loss knows only the rank's batch.

    Returns:
        The handle: `undo()`, `fused`; also a context manager.

    Raises:
        ValueError: there is no such model, or its forward has been replaced already.

    Example:
        >>> fuse_clip_loss(model)
        >>> Trainer(model=model, args=arguments, train_dataset=pairs).train()
    """
    found = list(dual_encoders(model))
    if not found and not any(_is_fused(module) for module in model.modules()):
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


class ContrastiveLoss:
    """A `compute_loss_func` for Trainer: the contrastive loss of the two embeddings that a model returns.

    Trainer takes what such a function returns as normalised over all micro-batches of a step, and multiplies it by the
    number of processes where it has counted labels. This class divides accordingly, so that gradients are those of the
    mean loss. A step at the end of an epoch with fewer micro-batches than the others counts less; with
    `ContrastiveTrainerMixin` it does not. Do not set `loss_is_scaled_for_ga` on that Trainer.

    Args:
        model: has `logit_scale` (a logarithm) or `temperature`, and for the sigmoid loss `logit_bias`.
        arguments: the TrainingArguments.
        embeddings: fields of the model's output; (B, D) each, of any norm.
        kind: "softmax", "sigmoid", or None for sigmoid exactly where the model has a `logit_bias`.
        gather: whether other ranks' pairs are negatives too.
    """

    def __init__(
        self,
        model: nn.Module,
        arguments: Any,
        *,
        embeddings: tuple[str, str] = ("image_embeds", "text_embeds"),
        kind: Kind | None = None,
        gather: Gather = True,
    ) -> None:
        self.model = model
        self.arguments = arguments
        self.embeddings = embeddings
        self.kind = kind
        self.gather = gather

    def __call__(self, outputs: Any, labels: Any = None, num_items_in_batch: Any = None) -> Tensor:
        """
        Args:
            outputs: what the model returned.
            labels: not used: row i of one embedding belongs to row i of the other.
            num_items_in_batch: labels that Trainer counted, None without.

        Returns:
            0-dim loss.
        """
        loss = _loss_of_outputs(self.model, outputs, self.embeddings, self.kind, self.gather)
        if torch.is_grad_enabled():
            loss = loss / self.arguments.gradient_accumulation_steps
        if num_items_in_batch is not None and self.arguments.average_tokens_across_devices:
            loss = loss / self.arguments.world_size
        return loss


def _loss_of_outputs(
    model: nn.Module, outputs: Any, embeddings: tuple[str, str], kind: Kind | None, gather: Gather
) -> Tensor:
    missing = [name for name in embeddings if outputs.get(name) is None]
    if missing:
        raise ValueError(
            f"the contrastive loss needs the model's outputs {embeddings}, but {missing} are not in "
            f"{list(outputs)}; name the two embeddings it returns"
        )
    first, text = (l2_normalize(outputs[name]) for name in embeddings)
    return objective(model, first, text, gather=gathers(gather), kind=kind)


class ContrastiveTrainerMixin:
    """Before `Trainer` among the bases: trains and evaluates with the contrastive loss over all ranks' pairs.

    Dual encoders of transformers are fused (`fuse_clip_loss`). Other models return their embeddings in the fields of
    `embeddings` and hold `logit_scale` (a logarithm) or `temperature`, with a `logit_bias` for the sigmoid loss.

    The loss is the mean over the pairs of all ranks in one micro-batch. Micro-batches of a step are averaged, whatever
    their number; they are no negatives of each other, for which `llm2clip train` has its gradient cache.

    Attributes:
        embeddings: fields of the model's output; (B, D) each, of any norm.
        kind: "softmax", "sigmoid", or None for sigmoid exactly where the model has a `logit_bias`.
        gather: whether other ranks' pairs are negatives too: True, False or "ring".

    Example:
        >>> class ContrastiveTrainer(ContrastiveTrainerMixin, Trainer):
        ...     embeddings = ("query", "document")
    """

    embeddings: tuple[str, str] = ("image_embeds", "text_embeds")
    kind: Kind | None = None
    gather: Gather = True
    # a mean over the batch: Trainer averages it over the micro-batches of a step
    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        trainer.can_return_loss = True
        # older releases divide by the micro-batches of a step only if the model takes no count of labels
        trainer.model_accepts_loss_kwargs = False
        model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
        if family_of(type(model)) is not None:
            fuse_clip_loss(model, gather=self.gather)
        self._fused = _is_fused(model)

    def contrastive_loss(self, model: nn.Module, outputs: Any) -> Tensor:
        """The loss of one micro-batch; override it for another one.

        Args:
            model: the model itself, without what distributed training wraps around it.
            outputs: what it returned.

        Returns:
            0-dim mean over all ranks' pairs, with gradients for DDP's averaging.
        """
        return _loss_of_outputs(model, outputs, self.embeddings, self.kind, self.gather)

    def compute_loss(
        self: Any,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Trainer's hook; `num_items_in_batch` counts tokens, which this loss has none of."""
        if self._fused:
            outputs = model(**{**inputs, "return_loss": True})
            loss = outputs["loss"]
        else:
            outputs = model(**inputs)
            loss = self.contrastive_loss(self.accelerator.unwrap_model(model), outputs)
        return (loss, outputs) if return_outputs else loss


__all__ = ["ContrastiveLoss", "ContrastiveTrainerMixin", "FusedClipLoss", "fuse_clip_loss"]
