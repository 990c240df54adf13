"""Losses and similarity ops under torch.autocast: no bits lost on the CPU, mixed dtypes taken as eager code does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llm2clip_kernels import infonce_loss, similarity_rank
from llm2clip_kernels.autocast import follows_autocast, full_precision
from llm2clip_kernels.losses import ClipLoss, HardNegativeNLLLoss, SigLipLoss
from tests.test_poisoned_memory import OPS, leaves, unit

# a projection and an attention follow autocast as torch's own do
UNCHANGED = [name for name in OPS if name not in ("lora", "attention")]


@pytest.mark.parametrize("name", UNCHANGED)
@pytest.mark.parametrize("kind", ["auto", "chunked"])
def test_the_cpu_loses_no_bits(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM2CLIP_BACKEND", kind)
    start = leaves()
    results: list[list[Tensor]] = []
    for enabled in (False, True):
        inputs = [t.clone().requires_grad_() for t in start]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            result = OPS[name](*inputs)
        if result.requires_grad:
            result.backward()
        results.append([result.detach(), *(t.grad for t in inputs if t.grad is not None)])
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: ClipLoss()(x, y, 10.0),
        lambda x, y: ClipLoss()(image_features=x, text_features=y, logit_scale=10.0),
        lambda x, y: SigLipLoss()(x, y, 10.0, -5.0),
        lambda x, y: HardNegativeNLLLoss()(x, y, y.flip(0)),
        lambda x, y: infonce_loss(x, y, 10.0),
        lambda x, y: similarity_rank(x, y)[0],
    ],
)
def test_features_of_two_dtypes(loss: Any) -> None:
    """One tower ends in a matmul, the other in a norm: eager code takes both under autocast, and so do we."""
    x, y = unit(20, 8), unit(20, 8)
    want = loss(x, y.bfloat16().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(x, y.bfloat16())
    # a loss that normalises rounds what it normalised to the dtype it came in
    assert torch.allclose(got.float(), want.float(), rtol=1e-3, atol=1e-6)
    with pytest.raises(TypeError, match="one dtype"):
        loss(x, y.bfloat16())


def test_what_is_cast() -> None:
    """Features are, wherever they stand; scales, weights, ids and fp64 are not."""
    seen: list[Any] = []

    @follows_autocast
    def spy(x: Tensor, others: list[Tensor], *, weights: Tensor, ids: Tensor, exact: Tensor) -> None:
        seen.extend([x.dtype, others[0].dtype, weights.dtype, ids.dtype, exact.dtype])
        seen.append(torch.is_autocast_enabled("cpu"))

    arguments: dict[str, Any] = {
        "weights": torch.ones(3), "ids": torch.zeros(3, 2).long(), "exact": torch.ones(3, 2).double()
    }  # fmt: skip
    spy(torch.ones(3, 2), [torch.ones(3, 2).half()], **arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        spy(torch.ones(3, 2), [torch.ones(3, 2).half()], **arguments)
        with full_precision(torch.device("cpu")):
            assert not torch.is_autocast_enabled("cpu")
    same = [torch.float32, torch.int64, torch.float64, False]
    assert seen == [torch.float32, torch.float16, *same, torch.float32, torch.float32, *same]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_gpu_computes_in_the_autocast_dtype() -> None:
    x, y = unit(300, 64).cuda(), unit(300, 64).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        got = infonce_loss(x, y, 10.0)
    assert got.dtype == torch.float32
    assert torch.equal(got, infonce_loss(x.bfloat16(), y.bfloat16(), 10.0))
