"""Contrastive kernels without the N×N matrix: torch and Triton only, usable from any trainer."""

from __future__ import annotations

from .backend import build_info
from .contrastive import infonce_loss, nll_loss
from .packed_attention import packed_attention
from .similarity_lse import similarity_lse

__all__ = ["build_info", "infonce_loss", "nll_loss", "packed_attention", "similarity_lse"]
