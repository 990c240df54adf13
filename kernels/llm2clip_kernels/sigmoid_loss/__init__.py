"""The sigmoid loss over all pairs of two feature matrices, with its gradients from the same sweep."""

from __future__ import annotations

from .op import sigmoid_terms
from .reference import sigmoid_loss_reference

__all__ = ["sigmoid_loss_reference", "sigmoid_terms"]
