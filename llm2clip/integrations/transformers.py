"""transformers' dual encoders and its Trainer with the fused losses.

| what is trained | one line |
|---|---|
| CLIP, SigLIP and their kin | `fuse_clip_loss(model)`, then `Trainer` as before |
| a model that returns two embeddings | `class MyTrainer(ContrastiveTrainerMixin, Trainer)` |
| the same, without a subclass of Trainer | `Trainer(..., compute_loss_func=ContrastiveLoss(model, arguments))` |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llm2clip_kernels import l2_normalize

from .dual_encoders import (
    FusedClipLoss,
    Gather,
    Kind,
    family_of,
    fuse_clip_loss,
    gathers,
    is_fused,
    pair_loss,
    scale_of,
)


def _add_scale(module: Any, args: Any, outputs: Any) -> Any:
    """Forward hook: what the loss needs of the parameters comes out of forward.

    DDP takes a parameter that no output depends on for unused, and fails when it gets a gradient after all; FSDP has
    only its own part of it outside.
    """
    if isinstance(outputs, dict) and outputs.get("logit_scale") is None:
        if hasattr(module, "logit_scale") or hasattr(module, "temperature"):
            outputs["logit_scale"] = scale_of(module)
        if getattr(module, "logit_bias", None) is not None:
            outputs["logit_bias"] = module.logit_bias
    return outputs


def _base_of(model: Any) -> nn.Module:
    """The model that peft has put its layers into, or the model itself."""
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base


class ContrastiveLoss:
    """A `compute_loss_func` for Trainer: the contrastive loss of the two embeddings that a model returns.

    Trainer takes what such a function returns as normalised over all micro-batches of a step, and multiplies it by the
    number of processes where it has counted labels. This class divides accordingly, so that gradients are those of the
    mean loss. A step at the end of an epoch with fewer micro-batches than the others counts less; with
    `ContrastiveTrainerMixin` it does not. Do not set `loss_is_scaled_for_ga` on that Trainer.

    Args:
        model: the model given to Trainer, not wrapped yet. It returns a dict with two embeddings, and either has
            `logit_scale` (a logarithm) or `temperature` and maybe `logit_bias`, or returns `logit_scale` (the
            multiplier) and maybe `logit_bias`. A forward hook puts the former into its output.
        arguments: the TrainingArguments.
        embeddings: names of the embeddings in the output; (B, D) each, of any norm.
        kind: "softmax", "sigmoid", or None for sigmoid exactly where there is a `logit_bias`.
        gather: whether other ranks' pairs are negatives too: True, False or "ring".
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
        self.arguments = arguments
        self.embeddings = embeddings
        self.kind = kind
        self.gather = gather
        _base_of(model).register_forward_hook(_add_scale)

    def __call__(self, outputs: Any, labels: Any = None, num_items_in_batch: Any = None) -> Tensor:
        """
        Args:
            outputs: what the model returned.
            labels: not used: row i of one embedding belongs to row i of the other.
            num_items_in_batch: labels that Trainer counted, None without.

        Returns:
            0-dim loss.
        """
        loss = _loss_of_outputs(outputs, self.embeddings, self.kind, self.gather)
        if torch.is_grad_enabled():
            loss = loss / self.arguments.gradient_accumulation_steps
        if num_items_in_batch is not None and self.arguments.average_tokens_across_devices:
            loss = loss / self.arguments.world_size
        return loss


def _loss_of_outputs(outputs: Any, embeddings: tuple[str, str], kind: Kind | None, gather: Gather) -> Tensor:
    if not isinstance(outputs, dict):
        raise ValueError(
            f"the contrastive loss needs a model that returns a dict with {embeddings}, got {type(outputs).__name__}"
        )
    missing = [name for name in embeddings if outputs.get(name) is None]
    if missing:
        raise ValueError(
            f"the contrastive loss needs the model's outputs {embeddings}, but {missing} are not in "
            f"{list(outputs)}; name the two embeddings it returns"
        )
    scale = outputs.get("logit_scale")
    if scale is None:
        raise ValueError(
            "the contrastive loss needs a scale: give the model a logit_scale (a logarithm) or a temperature, or let "
            "it return logit_scale (the multiplier)"
        )
    first, text = (l2_normalize(outputs[name]) for name in embeddings)
    return pair_loss(first, text, scale, outputs.get("logit_bias"), kind=kind, gather=gathers(gather))


class ContrastiveTrainerMixin:
    """Before `Trainer` among the bases: trains and evaluates with the contrastive loss over all ranks' pairs.

    Dual encoders of transformers are fused (`fuse_clip_loss`). Other models return a dict with their embeddings under
    the names in `embeddings`, and hold or return the scale as in `ContrastiveLoss`.

    The loss is the mean over the pairs of all ranks in one micro-batch. Micro-batches of a step are averaged, whatever
    their number; they are no negatives of each other, for which `llm2clip train` has its gradient cache.

    Attributes:
        embeddings: names of the embeddings in the model's output; (B, D) each, of any norm.
        kind: "softmax", "sigmoid", or None for sigmoid exactly where there is a `logit_bias`.
        gather: whether other ranks' pairs are negatives too: True, False or "ring".

    Examples:
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
        model = _base_of(trainer.model)
        if family_of(type(model)) is not None:
            fuse_clip_loss(model, gather=self.gather)
        self._fused = is_fused(model)
        if not self._fused:
            model.register_forward_hook(_add_scale)

    def contrastive_loss(self, outputs: Any) -> Tensor:
        """The loss of one micro-batch of a model that is not fused; override it for another one.

        Args:
            outputs: what the model returned, and `logit_scale` (and `logit_bias`) if it did not.

        Returns:
            0-dim mean over all ranks' pairs, with gradients for DDP's averaging.
        """
        return _loss_of_outputs(outputs, self.embeddings, self.kind, self.gather)

    def compute_loss(
        self,
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
            loss = self.contrastive_loss(outputs)
        return (loss, outputs) if return_outputs else loss


__all__ = ["ContrastiveLoss", "ContrastiveTrainerMixin", "FusedClipLoss", "fuse_clip_loss"]
