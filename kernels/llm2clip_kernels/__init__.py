"""Contrastive kernels without the N×N matrix: torch and Triton only, usable from any trainer."""

from __future__ import annotations

from .adapter import adapter, adapter_block
from .backend import build_info
from .contrastive import distill_loss, infonce_loss, nll_loss, ranking_loss, sigmoid_loss
from .l2_normalize import l2_normalize
from .lora_linear import lora_add, lora_linear
from .packed_attention import packed_attention
from .segment_mean import segment_mean
from .similarity_distill import similarity_distill
from .similarity_lse import similarity_lse
from .similarity_rank import (
    retrieval_metrics,
    similarity_rank,
    similarity_rank_counts,
    similarity_rank_stream,
)
from .similarity_topk import SimilarityTopK, similarity_topk, similarity_topk_stream

__all__ = [
    "SimilarityTopK",
    "adapter",
    "adapter_block",
    "build_info",
    "distill_loss",
    "infonce_loss",
    "l2_normalize",
    "lora_add",
    "lora_linear",
    "nll_loss",
    "packed_attention",
    "ranking_loss",
    "retrieval_metrics",
    "segment_mean",
    "sigmoid_loss",
    "similarity_distill",
    "similarity_lse",
    "similarity_rank",
    "similarity_rank_counts",
    "similarity_rank_stream",
    "similarity_topk",
    "similarity_topk_stream",
]
