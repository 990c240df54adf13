"""sigmoid_loss over gloo process groups, gathered and in a ring, against one process with the whole batch."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from gloo import run_on_ranks  # noqa: E402

from llm2clip_kernels import sigmoid_loss  # noqa: E402
from llm2clip_kernels.contrastive import sigmoid_ring  # noqa: E402
from llm2clip_kernels.sigmoid_loss import sigmoid_loss_reference  # noqa: E402

SIZES = [3, 5, 2]
OTHER_SIZES = [4, 1, 6]
pytestmark = pytest.mark.dist


def features(rows: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 6, dtype=torch.float64, generator=generator), dim=1).to(dtype)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def scalars(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.tensor(9.0, dtype=dtype), torch.tensor([-4.0], dtype=dtype)


def share(sizes: list[int], rank: int) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def check_one(
    rank: int,
    world: int,
    group: Any,
    ring: bool,
    grouped: bool,
    reduction: Any,
    convention: Any,
    dtype: torch.dtype,
) -> None:
    """rank and world are those of the group."""
    x_sizes = SIZES[:world]
    y_sizes = OTHER_SIZES[:world] if grouped else x_sizes
    mine, yours = share(x_sizes, rank), share(y_sizes, rank)
    x, y = features(sum(x_sizes), 1, dtype), features(sum(y_sizes), 2, dtype)
    generator = torch.Generator().manual_seed(3)
    x_ids, y_ids = (torch.randint(-1, 3, (len(t),), generator=generator) for t in (x, y))
    weight = torch.linspace(0.5, 2.0, len(x), dtype=torch.float64)

    full = leaves(x.double(), y.double(), *scalars())
    rows = sigmoid_loss_reference(*full, *((x_ids, y_ids) if grouped else ()))
    oracle = {"mean": rows.sum() / len(x), "sum": rows.sum(), "none": (rows * weight).sum()}[reduction]
    (1.3 * oracle).backward()

    part = leaves(x[mine], y[yours], *scalars(torch.float32 if dtype == torch.bfloat16 else dtype))
    options: Any = {"x_groups": x_ids[mine], "y_groups": y_ids[yours]} if grouped else {}
    options |= {"group": group, "gather": "ring" if ring else True, "grad_reduction": convention}
    loss = sigmoid_loss(part[0], part[1], part[2], part[3], reduction=reduction, **options)
    (1.3 * loss * (weight[mine] if reduction == "none" else 1.0)).sum().backward()
    limit = 2e-2 if dtype == torch.bfloat16 else 1e-11
    want = rows[mine] if reduction == "none" else oracle
    assert (loss.double() - want).norm() <= limit * want.norm()
    shared = [t.grad.clone() for t in part[2:]]  # type: ignore[union-attr]
    for t in shared:
        dist.all_reduce(t, group=group)
    factor = world if convention == "ddp_mean" else 1
    got = [part[0].grad, part[1].grad, *shared]
    wanted = [full[0].grad[mine], full[1].grad[yours], full[2].grad, full[3].grad]  # type: ignore[index]
    for g, w in zip(got, wanted, strict=True):
        error = (g.double() / factor - w).norm()  # type: ignore[union-attr, operator]
        assert error <= limit * (w.norm() + 1e-3), (world, options, reduction, error)  # type: ignore[union-attr]


def check_against_one_process(rank: int, world: int) -> None:
    # everybody, one rank, two ranks out of order in the default group
    for members in (None, [1], [2, 0]):
        group = None if members is None else dist.new_group(members)
        members = [0, 1, 2] if members is None else sorted(members)
        if rank not in members:
            continue
        place = members.index(rank), len(members), group
        for ring, grouped, reduction, convention in itertools.product(
            (False, True), (False, True), ("mean", "sum", "none"), ("sum", "ddp_mean")
        ):
            check_one(*place, ring, grouped, reduction, convention, torch.float64)
        for ring in (False, True):
            check_one(*place, ring, False, "mean", "ddp_mean", torch.bfloat16)


def test_groups_of_one_two_and_three_uneven_ranks_equal_one_process() -> None:
    run_on_ranks(3, check_against_one_process)


def check_ring_holds_two_parts(rank: int, world: int) -> None:
    """Nothing is computed on more than one rank's y, gradients of frozen inputs do not travel, nor without grad."""
    seen: list[int] = []
    sent: list[Tensor] = []
    real_compute, real_pass = sigmoid_ring.compute, sigmoid_ring.Links.pass_on

    def compute(x: Tensor, y: Tensor, *args: Any) -> Any:
        seen.append(len(y))
        return real_compute(x, y, *args)

    def pass_on(self: Any, mine: Tensor, rows: int) -> Any:
        sent.append(mine)
        return real_pass(self, mine, rows)

    sigmoid_ring.compute, sigmoid_ring.Links.pass_on = compute, pass_on  # type: ignore[assignment, method-assign]
    x, y = features(4, rank, torch.bfloat16), features(4, 10 + rank, torch.bfloat16)
    for need_y, hops in ((False, world - 1), (True, 2 * world - 1)):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_(need_y)
        sigmoid_loss(a, b, 10.0, -10.0, gather="ring").backward()
        assert seen == [4] * world and len(sent) == hops
        # y travels as it is, its gradient in fp32: summed in bf16 it would lose what each rank kept
        assert [t.dtype for t in sent].count(torch.bfloat16) == world - 1
        assert (b.grad is not None) == need_y and a.grad is not None
        seen.clear()
        sent.clear()
    with torch.no_grad():
        loss = sigmoid_loss(x, y, 10.0, -10.0, gather="ring")
    assert not loss.requires_grad and len(sent) == world - 1


def test_the_ring_holds_two_parts_and_sends_what_is_needed() -> None:
    run_on_ranks(3, check_ring_holds_two_parts)
