"""Losses with the host libraries' own names, signatures and gradients: swap the import, keep the trainer."""

from __future__ import annotations

from .coca import CoCaLoss
from .distill import DistillClipLoss
from .inf_cl import cal_flash_loss, cal_inf_loss, cal_ring_loss
from .llm2clip_repo import ClipLoss as LLM2CLIPLoss
from .llm2vec import HardNegativeNLLLoss
from .open_clip import ClipLoss
from .siglip import SigLipLoss

__all__ = [
    "ClipLoss",
    "CoCaLoss",
    "DistillClipLoss",
    "HardNegativeNLLLoss",
    "LLM2CLIPLoss",
    "SigLipLoss",
    "cal_flash_loss",
    "cal_inf_loss",
    "cal_ring_loss",
]
