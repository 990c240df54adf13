"""Drop-in losses with the host libraries' own signatures (re-exported from `llm2clip_kernels.losses`)."""

from __future__ import annotations

from llm2clip_kernels.losses import ClipLoss, HardNegativeNLLLoss

__all__ = ["ClipLoss", "HardNegativeNLLLoss"]
