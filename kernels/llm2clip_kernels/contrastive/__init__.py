"""Contrastive losses: algebra over `similarity_lse`, O(N·D) in memory, over any process group."""

from __future__ import annotations

from .common import GradReduction, Reduction, zero_of
from .distillation import distill_loss, distill_terms
from .infonce import infonce_loss, symmetric_terms
from .nll import nll_loss
from .ranking import ranking_loss
from .sigmoid import sigmoid_loss

__all__ = [
    "GradReduction",
    "Reduction",
    "distill_loss",
    "distill_terms",
    "infonce_loss",
    "nll_loss",
    "ranking_loss",
    "sigmoid_loss",
    "symmetric_terms",
    "zero_of",
]
