"""What every loss over pairs says to inputs that do not fit: one clear error, whichever way it computes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.losses import (
    ClipLoss,
    CoCaLoss,
    DistillClipLoss,
    HardNegativeNLLLoss,
    LLM2CLIPLoss,
    SigLipLoss,
    cal_flash_loss,
    cal_inf_loss,
)
from llm2clip_kernels import distill_loss, infonce_loss, nll_loss, ranking_loss, sigmoid_loss
from llm2clip_kernels.similarity_lse import op as lse_op


def unit(rows: int, dim: int = 8) -> Tensor:
    return F.normalize(torch.randn(rows, dim), dim=1)


X, Y = unit(5), unit(5)
CAPTIONS = torch.randn(5, 4, 9), torch.randint(0, 9, (5, 4))
Loss = Callable[[Any, Any], Any]
LOSSES: dict[str, Loss] = {
    "infonce_loss": lambda x, y: infonce_loss(x, y, 10.0),
    "sigmoid_loss": lambda x, y: sigmoid_loss(x, y, 10.0, -5.0),
    "nll_loss": lambda x, y: nll_loss(x, y, None, 10.0),
    "ranking_loss": lambda x, y: ranking_loss(x, y),
    "distill_loss": lambda x, y: distill_loss(x, y, 10.0, X, Y, 8.0),
    "ClipLoss": lambda x, y: ClipLoss()(x, y, 10.0),
    "SigLipLoss": lambda x, y: SigLipLoss()(x, y, 10.0, -5.0),
    "DistillClipLoss": lambda x, y: DistillClipLoss()(x, y, 10.0, X, Y, 8.0),
    "CoCaLoss": lambda x, y: CoCaLoss(1.0, 1.0)(x, y, *CAPTIONS, 10.0),
    "LLM2CLIPLoss": lambda x, y: LLM2CLIPLoss()(x, y, 10.0),
    "HardNegativeNLLLoss": lambda x, y: HardNegativeNLLLoss()(x, y),
    "cal_flash_loss": lambda x, y: cal_flash_loss(x, y),
    "cal_inf_loss": lambda x, y: cal_inf_loss(x, y),
}
BAD: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "fewer images": (unit(3), Y, ValueError, "3.*5|one row of|one positive"),
    "fewer texts": (X, unit(3), ValueError, "5.*3"),
    "one row as a vector": (X[0], Y[0], ValueError, "2-D"),
    "a batch of batches": (X[None], Y[None], ValueError, "2-D"),
    "another width": (X, unit(5, 6), ValueError, "one D"),
    "another dtype": (X, Y.half(), TypeError, "one dtype"),
    "integers": (X.long(), Y.long(), TypeError, "int64"),
    "complex numbers": (X.cfloat(), Y.cfloat(), TypeError, "complex64"),
    "nothing": (X[:0], Y[:0], ValueError, "empty"),
    "no width": (X[:, :0], Y[:, :0], ValueError, "empty"),
    "another device": (X, Y.to("meta"), ValueError, "one device"),
    "no tensor": (X.tolist(), Y, TypeError, "tensor"),
}


@pytest.mark.parametrize("small", [False, True], ids=["kernels", "plain"])
@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", LOSSES)
def test_features(name: str, case: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lse_op, "_SMALL_PAIRS", 2**30 if small else 0)
    x, y, error, message = BAD[case]
    if case == "fewer images" and name.startswith("cal_"):
        # Inf-CLIP's functions take more keys than queries
        assert LOSSES[name](x, y).isfinite().all()
        return
    with pytest.raises(error, match=message) as caught:
        LOSSES[name](x, y)
    # a name the caller knows, and no trace of the kernels within
    assert re.match(r"[\w.]+: ", str(caught.value)), str(caught.value)


@pytest.mark.parametrize("small", [False, True], ids=["kernels", "plain"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_scale_that_is_none(name: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lse_op, "_SMALL_PAIRS", 2**30 if small else 0)
    with_scale: dict[str, Callable[[Any], Any]] = {
        "infonce_loss": lambda s: infonce_loss(X, Y, s),
        "sigmoid_loss": lambda s: sigmoid_loss(X, Y, s, -5.0),
        "nll_loss": lambda s: nll_loss(X, Y, None, s),
        "ranking_loss": lambda s: ranking_loss(X, Y, scale=s),
        "distill_loss": lambda s: distill_loss(X, Y, s, X, Y, 8.0),
        "ClipLoss": lambda s: ClipLoss()(X, Y, s),
        "SigLipLoss": lambda s: SigLipLoss()(X, Y, s, -5.0),
        "DistillClipLoss": lambda s: DistillClipLoss()(X, Y, s, X, Y, 8.0),
        "CoCaLoss": lambda s: CoCaLoss(1.0, 1.0)(X, Y, *CAPTIONS, s),
        "LLM2CLIPLoss": lambda s: LLM2CLIPLoss()(X, Y, s),
        "HardNegativeNLLLoss": lambda s: HardNegativeNLLLoss(scale=s)(X, Y),
        "cal_flash_loss": lambda s: cal_flash_loss(X, Y, scale=s),
        "cal_inf_loss": lambda s: cal_inf_loss(X, Y, scale=s),
    }
    for scale, error, message in (
        (torch.ones(2), ValueError, "1-element"),
        ("20", TypeError, "number"),
        (torch.tensor(1j), TypeError, "real"),
        (True, TypeError, "number"),
    ):
        with pytest.raises(error, match=message):
            with_scale[name](scale)


@pytest.mark.parametrize("loss", [nll_loss, ranking_loss, distill_loss], ids=lambda loss: loss.__name__)
def test_losses_without_a_ring_say_so(loss: Any) -> None:
    inputs = {"nll_loss": (X, Y, None, 10.0), "ranking_loss": (X, Y), "distill_loss": (X, Y, 10.0, X, Y, 8.0)}
    with pytest.raises(ValueError, match="gather='ring' is for infonce_loss and sigmoid_loss"):
        loss(*inputs[loss.__name__], gather="ring")
