"""Inf-CLIP's functions against plain definitions of them, alone and over two ranks."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from gloo import run_on_ranks  # noqa: E402

from llm2clip.losses import cal_flash_loss, cal_inf_loss, cal_ring_loss  # noqa: E402


def features(rows: int, seed: int, dim: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, dtype=torch.float64, generator=generator), dim=1)


def results(function: Any, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    leaves = [t.to(dtype).clone().requires_grad_() for t in inputs]
    loss = function(*leaves)
    (loss * torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).reshape(loss.shape)).sum().backward()
    return [loss.detach().double()] + [t.grad.double() for t in leaves]  # type: ignore[union-attr]


LABELS = {
    "none": None,
    "permutation": torch.randperm(9, generator=torch.Generator().manual_seed(3)),
    "repeated": torch.tensor([3, 3, 0, 8, 8, 1, 2, 3, 5]),
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
@pytest.mark.parametrize("keys", [9, 14])
def test_alone(labels: Tensor | None, keys: int) -> None:
    inputs = features(9, 1), features(keys, 2), torch.tensor(14.0).double()
    target = torch.arange(9) if labels is None else labels

    def plain(q: Tensor, k: Tensor, s: Tensor) -> Tensor:
        return F.cross_entropy(s * q @ k.T, target, reduction="none")

    for function, definition in (
        (cal_flash_loss, plain),
        (cal_inf_loss, lambda *args: plain(*args).mean()),
        (cal_ring_loss, lambda *args: plain(*args).mean()),
    ):
        want = results(definition, inputs, torch.float64)
        for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
            got = results(lambda q, k, s: function(q, k, labels, s, head_dim=4), inputs, dtype)  # noqa: B023
            for g, w in zip(got, want, strict=True):
                assert (g - w).norm() <= limit * (w.norm() + 1)


def test_without_scale_and_with_a_number() -> None:
    q, k = features(5, 1), features(5, 2)
    torch.testing.assert_close(cal_inf_loss(q, k), F.cross_entropy(q @ k.T, torch.arange(5)))
    torch.testing.assert_close(cal_inf_loss(q, k, scale=7.0), F.cross_entropy(7 * q @ k.T, torch.arange(5)))


def check_ranks(rank: int, world: int) -> None:
    for own_keys, labels in ((4, None), (4, torch.tensor([2, 0, 3, 1])), (6, torch.tensor([5, 5, 0, 1]))):
        inputs = features(4, 10 + rank), features(own_keys, 20 + rank), torch.tensor(9.0).double()
        target = (torch.arange(4) if labels is None else labels) + rank * own_keys

        def plain(q: Tensor, k: Tensor, s: Tensor) -> Tensor:
            every = torch.cat(torch.distributed.nn.all_gather(k))
            return F.cross_entropy(s * q @ every.T, target)  # noqa: B023

        want = results(plain, inputs, torch.float64)
        dist.all_reduce(want[3])
        for got, true in zip(
            results(lambda q, k, s: cal_inf_loss(q, k, labels, s), inputs, torch.float64),  # noqa: B023
            want,
            strict=True,
        ):
            torch.testing.assert_close(got, true)
        # the other function stays at home
        alone = F.cross_entropy(9 * inputs[0] @ inputs[1].T, target - rank * own_keys, reduction="none")
        torch.testing.assert_close(cal_flash_loss(inputs[0], inputs[1], labels, 9.0), alone)


@pytest.mark.dist
def test_two_ranks() -> None:
    run_on_ranks(2, check_ranks)


def test_signatures_and_errors() -> None:
    for function in (cal_inf_loss, cal_flash_loss, cal_ring_loss):
        parameters = inspect.signature(function).parameters
        assert list(parameters) == ["q", "k", "labels", "scale", "head_dim"]
        assert parameters["head_dim"].default == 256
        q, k = features(5, 1), features(5, 2)
        with pytest.raises(ValueError, match="belongs to row i"):
            function(q, k[:3])
        with pytest.raises(ValueError, match="one row of k"):
            function(q, k, torch.arange(4))
        with pytest.raises(TypeError, match="integer"):
            function(q, k, torch.rand(5))
