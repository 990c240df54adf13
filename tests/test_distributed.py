"""Losses over gloo process groups against one process with the whole batch, in fp64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from gloo import run_on_ranks  # noqa: E402

from llm2clip_kernels import infonce_loss, nll_loss  # noqa: E402

SIZES = [3, 5, 2]
pytestmark = pytest.mark.dist


def whole_batch(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y, negatives = (
        F.normalize(torch.randn(rows, 6, dtype=torch.float64, generator=generator), dim=1) for _ in range(3)
    )
    return x, y, negatives, torch.tensor(9.0, dtype=torch.float64)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def symmetric(x: Tensor, y: Tensor, scale: Tensor, smoothing: float, weight: Tensor) -> Tensor:
    logits, target = scale * x @ y.T, torch.arange(len(x))
    rows = F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none")
    columns = F.cross_entropy(logits.T, target, label_smoothing=smoothing, reduction="none")
    return (0.5 * (rows + columns) * weight).sum()


def check_against_one_process(rank: int, world: int) -> None:
    members = SIZES[:world]
    total, start = sum(members), sum(members[:rank])
    mine = slice(start, start + members[rank])
    x, y, negatives, scale = whole_batch(total)
    uneven_weight = torch.linspace(0.5, 2.0, total, dtype=torch.float64)
    for smoothing in (0.0, 0.2):
        for reduction in ("mean", "sum", "none"):
            weight = uneven_weight if reduction == "none" else torch.ones(total, dtype=torch.float64)
            weight = weight / total if reduction == "mean" else weight
            full = leaves(x, y, scale)
            oracle = symmetric(*full, smoothing, weight)  # type: ignore[call-arg, arg-type, misc]
            (1.5 * oracle).backward()
            for convention, factor in (("sum", 1), ("ddp_mean", world)):
                a, b, s = leaves(x[mine], y[mine], scale)
                loss = infonce_loss(
                    a, b, s, label_smoothing=smoothing, reduction=reduction, gather=True,
                    grad_reduction=convention,
                )  # type: ignore[arg-type]  # fmt: skip
                if reduction == "none":
                    (1.5 * loss * weight[mine]).sum().backward()
                else:
                    assert torch.allclose(loss, oracle)
                    (1.5 * loss).backward()
                shared = s.grad.clone()  # type: ignore[union-attr]
                dist.all_reduce(shared)
                for got, want in (
                    (a.grad, full[0].grad[mine]),
                    (b.grad, full[1].grad[mine]),
                    (shared, full[2].grad),
                ):  # type: ignore[index]
                    assert torch.allclose(got / factor, want, atol=1e-12), (convention, reduction)  # type: ignore[operator, arg-type]

    full = leaves(x, y, negatives, scale)
    oracle = F.cross_entropy(full[3] * full[0] @ torch.cat(full[1:3]).T, torch.arange(total))
    oracle.backward()
    part = leaves(x[mine], y[mine], negatives[mine], scale)
    loss = nll_loss(*part, gather=True, grad_reduction="sum")  # type: ignore[misc, arg-type]
    loss.backward()
    assert torch.allclose(loss, oracle)
    for got, want in zip(part[:3], full[:3], strict=True):
        assert torch.allclose(got.grad, want.grad[mine], atol=1e-12)  # type: ignore[arg-type, index]

    # the last rank alone has hard negatives, and ids leave some of everybody's rows out
    ids = torch.arange(total) % 3 - 1
    few, few_ids = negatives[:2], torch.tensor([1, -1])
    full = leaves(x, y, few, scale)
    oracle = nll_loss(*full, groups=ids, negative_groups=few_ids)  # type: ignore[misc, arg-type]
    oracle.backward()
    kept = slice(0, 2 if rank == world - 1 else 0)
    part = leaves(x[mine], y[mine], few[kept], scale)
    loss = nll_loss(*part, groups=ids[mine], negative_groups=few_ids[kept], gather=True, grad_reduction="sum")  # type: ignore[misc, arg-type]
    loss.backward()
    assert torch.allclose(loss, oracle) and not torch.allclose(loss, nll_loss(x, y, few, scale))
    for got, want, rows in zip(part[:3], full[:3], (mine, mine, kept), strict=True):
        assert torch.allclose(got.grad, want.grad[rows], atol=1e-12)  # type: ignore[arg-type, index]
    nobody = negatives[:0]
    assert torch.allclose(nll_loss(x[mine], y[mine], nobody, scale, gather=True), nll_loss(x, y, None, scale))  # type: ignore[misc, arg-type]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_uneven_ranks_equal_one_process(world: int) -> None:
    run_on_ranks(world, check_against_one_process)


def check_subgroup(rank: int, world: int) -> None:
    group = dist.new_group([0, 2])
    if rank == 1:
        return
    x, y, _, scale = whole_batch(4)
    mine = slice(0, 2) if rank == 0 else slice(2, 4)
    a, b = leaves(x[mine], y[mine])
    loss = infonce_loss(a, b, scale, group=group, grad_reduction="sum")
    loss.backward()
    full = leaves(x, y)
    infonce_loss(full[0], full[1], scale).backward()
    assert torch.allclose(a.grad, full[0].grad[mine]) and torch.allclose(b.grad, full[1].grad[mine])  # type: ignore[arg-type, index]


def test_a_group_that_is_not_everybody() -> None:
    run_on_ranks(3, check_subgroup)


def check_far_apart_sums(rank: int, world: int) -> None:
    """Ranks whose column sums differ by hundreds of nats: merging must not overflow or lose the larger."""
    x = torch.eye(4, dtype=torch.float64)
    mine = slice(2 * rank, 2 * rank + 2)
    (a,) = leaves(x[mine])
    loss = infonce_loss(a, x[mine], 900.0, gather=True)
    assert loss.isfinite() and loss.abs() < 1e-12


def test_merging_sums_far_apart() -> None:
    run_on_ranks(2, check_far_apart_sums)
