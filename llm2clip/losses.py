"""Drop-in losses with the host libraries' own signatures (re-exported from `llm2clip_kernels.losses`)."""

from __future__ import annotations

from llm2clip_kernels.losses import (
    ClipLoss,
    CoCaLoss,
    DistillClipLoss,
    HardNegativeNLLLoss,
    LLM2CLIPLoss,
    SigLipLoss,
    cal_flash_loss,
    cal_inf_loss,
    cal_ring_loss,
)

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
