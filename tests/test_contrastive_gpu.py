"""The contrastive losses' options on a CUDA GPU: accuracy, determinism, no waiting. Skipped where there is none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.on_gpu import DTYPES, MARKS

sys.path.insert(0, str(Path(__file__).parent))
from dense_infonce import dense_infonce  # noqa: E402
from test_ranking import dense_ranking, named, variants  # noqa: E402

from llm2clip_kernels import infonce_loss, ranking_loss  # noqa: E402

pytestmark = MARKS


def features(rows: int, dtype: torch.dtype, dim: int = 96) -> Tensor:
    return F.normalize(torch.randn(rows, dim), dim=1).cuda().to(dtype)


def gradients(function: Any, *inputs: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    # what a definition makes for itself belongs on the GPU too
    with torch.device("cuda"):
        loss = function(*leaves)
        (1.7 * loss).backward()
    return [loss.detach().double()] + [t.grad.double() for t in leaves]  # type: ignore[union-attr]


def assert_as_good_as_torch(ours: Any, definition: Any, *inputs: Tensor) -> None:
    true = gradients(definition, *(t.double() for t in inputs))
    plain = gradients(definition, *inputs)
    floor = 4 * torch.finfo(inputs[0].dtype).eps
    for got, reference, exact in zip(gradients(ours, *inputs), plain, true, strict=True):
        assert (got - exact).norm() <= 2 * (reference - exact).norm() + floor * (exact.norm() + 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("same_group", ["mask", "positive"])
def test_groups(dtype: torch.dtype, same_group: str) -> None:
    for rows in (7, 65, 700):
        ids = torch.randint(-2, rows // 2 + 1, (rows,), device="cuda")
        options: dict[str, Any] = {"groups": ids, "same_group": same_group, "label_smoothing": 0.1}
        assert_as_good_as_torch(
            lambda x, y: infonce_loss(x, y, 20.0, **options),  # noqa: B023
            lambda x, y: dense_infonce(x, y, 20.0, **options),  # noqa: B023
            features(rows, dtype),
            features(rows, dtype),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", variants()[::3], ids=named)
def test_ranking(dtype: torch.dtype, variant: dict[str, Any]) -> None:
    inputs = [features(130, dtype) for _ in range(3)]
    assert_as_good_as_torch(
        lambda q, p, n: ranking_loss(q, p, [n], 20.0, **variant),
        lambda q, p, n: dense_ranking(q, p, n, scale=20.0, **variant).mean(),
        *inputs,
    )


def test_autocast_takes_half_precision_throughout() -> None:
    x, y, n = (features(130, torch.float32) for _ in range(3))
    ids = torch.randint(0, 60, (130,), device="cuda")
    half = [t.bfloat16() for t in (x, y, n)]
    want = (
        infonce_loss(half[0], half[1], 20.0, groups=ids, same_group="positive"),
        ranking_loss(half[0], half[1], half[2:], 20.0),
    )
    with torch.autocast("cuda", torch.bfloat16):
        # one tower may have left autocast's dtype
        assert torch.equal(infonce_loss(x, half[1], 20.0, groups=ids, same_group="positive"), want[0])
        assert torch.equal(ranking_loss(x, half[1], [n], 20.0), want[1])


def test_the_same_every_run_without_waiting() -> None:
    x, y = features(700, torch.bfloat16), features(700, torch.bfloat16)
    ids, weights = torch.randint(0, 300, (700,), device="cuda"), torch.rand(700, device="cuda")
    scale = torch.tensor(20.0, device="cuda")

    def both(a: Tensor, b: Tensor) -> Tensor:
        masked = infonce_loss(a, b, scale, groups=ids, weights=weights, label_smoothing=0.1)
        return masked + infonce_loss(a, b, scale, groups=ids, same_group="positive")

    first = gradients(both, x, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        leaves = [t.clone().requires_grad_() for t in (x, y)]
        (1.7 * both(*leaves)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for again, one in zip((t.grad for t in leaves), first[1:], strict=True):
        assert torch.equal(again.double(), one)  # type: ignore[union-attr]
