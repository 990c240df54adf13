"""infonce_loss over uneven gloo ranks, gathered and in a ring, against one process with the whole batch."""

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
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
from dense_infonce import dense_infonce  # noqa: E402
from gloo import run_on_ranks  # noqa: E402

from llm2clip_kernels import infonce_loss  # noqa: E402
from llm2clip_kernels.similarity_lse import similarity_lse  # noqa: E402

SIZES = [3, 5, 2]
CAPTIONS = [4, 1, 6]
pytestmark = pytest.mark.dist


def random_rows(rows: int, seed: int, dim: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, dtype=torch.float64, generator=generator), dim=1)


def random_ids(rows: int, seed: int) -> Tensor:
    return torch.randint(-1, 4, (rows,), generator=torch.Generator().manual_seed(seed))


def slices(sizes: list[int], rank: int) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def compare(rank: int, world: int, transport: Any, convention: str, two_sets: bool, **options: Any) -> None:
    """One setting: loss and gradients of this rank against the definition on everybody's rows."""
    sizes, others = SIZES[:world], (CAPTIONS if two_sets else SIZES)[:world]
    mine, my_others = slices(sizes, rank), slices(others, rank)
    x, y = random_rows(sum(sizes), 1), random_rows(sum(others), 2)
    scale = torch.tensor(9.0, dtype=torch.float64)
    whole = leaves(x, y, scale)
    oracle = dense_infonce(*whole, **options)  # type: ignore[misc, arg-type]
    upstream = torch.linspace(0.5, 2.0, oracle.numel(), dtype=torch.float64).reshape(oracle.shape)
    (oracle * upstream).sum().backward()

    def own(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value[my_others if name.startswith("y_") else mine]

    kind = torch.float32 if transport == "ring" and convention == "sum" else torch.float64
    limits = {"rtol": 1e-9, "atol": 1e-12} if kind == torch.float64 else {"rtol": 1e-4, "atol": 2e-6}
    part = leaves(x[mine].to(kind), y[my_others].to(kind), scale.to(kind))
    loss = infonce_loss(
        *part, **{name: own(name, value) for name, value in options.items()}, gather=transport,
        grad_reduction=convention,
    )  # type: ignore[misc, arg-type]  # fmt: skip
    if options["reduction"] == "none":
        taken = [torch.arange(sum(sizes))[mine]]
        if two_sets:
            taken.append(sum(sizes) + torch.arange(sum(others))[my_others])
        indices = torch.cat(taken)
        torch.testing.assert_close(loss.double(), oracle[indices], **limits)
        upstream = upstream[indices]
    else:
        torch.testing.assert_close(loss.double(), oracle, **limits)
    (loss * upstream).sum().backward()
    factor = world if convention == "ddp_mean" else 1
    shared = part[2].grad.clone()  # type: ignore[union-attr]
    dist.all_reduce(shared)
    for got, want in (
        (part[0].grad, whole[0].grad[mine]),  # type: ignore[index]
        (part[1].grad, whole[1].grad[my_others]),  # type: ignore[index]
        (shared, whole[2].grad),
    ):
        torch.testing.assert_close(got.double() / factor, want, **limits)  # type: ignore[operator]


def check_every_setting(rank: int, world: int) -> None:
    rows, captions = sum(SIZES[:world]), sum(CAPTIONS[:world])
    weights = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) + 0.1
    ids = random_ids(rows, 3)
    settings: list[dict[str, Any]] = [
        {"two_sets": False},
        {"two_sets": False, "label_smoothing": 0.2, "weights": weights},
        {"two_sets": False, "groups": ids},
        {"two_sets": False, "groups": ids, "label_smoothing": 0.2},
        {"two_sets": False, "groups": ids, "same_group": "positive", "label_smoothing": 0.2},
        {"two_sets": False, "groups": ids, "same_group": "positive", "weights": weights},
    ]
    caption_ids = random_ids(captions, 4)
    # the definition needs one positive, the rank boundary is the interesting place for it
    caption_ids[-1] = ids[0] = 0
    sets = {"two_sets": True, "groups": ids, "y_groups": caption_ids, "same_group": "positive"}
    settings += [sets, sets | {"label_smoothing": 0.3, "weights": weights, "y_weights": caption_ids + 2.0}]
    for index, setting in enumerate(settings):
        for number, (transport, reduction) in enumerate(
            itertools.product((True, "ring"), ("mean", "sum", "none"))
        ):
            convention = ("sum", "ddp_mean")[(index + number) % 2]
            # the ring in fp32 too: there the C++ kernel computes, in fp64 plain torch
            compare(rank, world, transport, convention, **setting, reduction=reduction)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_uneven_ranks_equal_one_process(world: int) -> None:
    run_on_ranks(world, check_every_setting)


def check_subgroup(rank: int, world: int) -> None:
    group = dist.new_group([0, 2])
    if rank == 1:
        return
    x, y = random_rows(5, 1), random_rows(5, 2)
    mine = slice(0, 2) if rank == 0 else slice(2, 5)
    ids = torch.tensor([0, 1, 1, 2, 0])
    whole = leaves(x, y)
    infonce_loss(whole[0], whole[1], 9.0, groups=ids).backward()
    for transport in (True, "ring"):
        a, b = leaves(x[mine], y[mine])
        infonce_loss(
            a, b, 9.0, groups=ids[mine], group=group, gather=transport, grad_reduction="sum"
        ).backward()
        torch.testing.assert_close(a.grad, whole[0].grad[mine])  # type: ignore[index]
        torch.testing.assert_close(b.grad, whole[1].grad[mine])  # type: ignore[index]


def check_frozen_sides(rank: int, world: int) -> None:
    """One tower is frozen: the other's gradient is the same, and nothing of dy travels for it."""
    x, y, ids = random_rows(6, 1), random_rows(6, 2), random_ids(6, 3)
    mine = slice(2, 6) if rank else slice(0, 2)
    whole = leaves(x, y)
    options: dict[str, Any] = {"groups": ids, "same_group": "positive", "label_smoothing": 0.1}
    dense_infonce(*whole, torch.tensor(9.0).double(), **options).backward()  # type: ignore[call-arg, arg-type]
    for transport in (True, "ring"):
        for side in (0, 1):
            part = [x[mine].clone(), y[mine].clone()]
            part[side].requires_grad_()
            own = options | {"groups": ids[mine]}
            infonce_loss(*part, 9.0, **own, gather=transport, grad_reduction="sum").backward()
            torch.testing.assert_close(part[side].grad, whole[side].grad[mine])  # type: ignore[index]
            assert part[1 - side].grad is None


def test_a_frozen_tower() -> None:
    run_on_ranks(2, check_frozen_sides)


def test_a_group_that_is_not_everybody() -> None:
    run_on_ranks(3, check_subgroup)


def check_large_scale(rank: int, world: int) -> None:
    """Scale 1e4, exact dot products, rivals on the other rank: log 3 must survive beside 10,000.

    In fp32 alone 1e4 + log 3 is wrong by up to 5e-4, and so would be every exp(S - lse).
    """
    signs = torch.randint(0, 2, (8, 16), generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = (0.25 * signs.float()).repeat(3, 1)
    mine = slice(12 * rank, 12 * rank + 12)
    whole = leaves(x.double(), x.double())
    true = infonce_loss(whole[0], whole[1], 1e4, reduction="none")
    torch.testing.assert_close(true, torch.full_like(true, 3.0).log())
    upstream = torch.linspace(0.5, 2.0, 24)
    (true * upstream).sum().backward()
    for transport in (True, "ring"):
        a, b = leaves(x[mine], x[mine])
        terms = infonce_loss(a, b, 1e4, reduction="none", gather=transport, grad_reduction="sum")
        (terms * upstream[mine]).sum().backward()
        torch.testing.assert_close(terms.double(), true[mine], rtol=0, atol=1e-6)
        for got, want in ((a.grad, whole[0].grad), (b.grad, whole[1].grad)):
            torch.testing.assert_close(got.double(), want[mine], rtol=0, atol=1e-2)  # type: ignore[union-attr, index]


def test_ranks_keep_what_rounding_takes() -> None:
    run_on_ranks(2, check_large_scale)


class Largest(TorchDispatchMode):
    """Remembers the most numbers any tensor made under it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for t in made if isinstance(made, tuple | list) else (made,):
            if isinstance(t, Tensor):
                self.numbers = max(self.numbers, t.untyped_storage().nbytes() // max(t.element_size(), 1))
        return made


def check_memory(rank: int, world: int) -> None:
    rows, dim = 48, 16
    x, y = random_rows(rows, rank, dim).float(), random_rows(rows, 9 + rank, dim).float()
    largest = {}
    for transport in (True, "ring"):
        a, b = leaves(x, y)
        with Largest() as seen:
            infonce_loss(
                a, b, 9.0, groups=torch.arange(rows), same_group="positive", label_smoothing=0.1,
                gather=transport, method="recompute",
            ).backward()  # type: ignore[arg-type]  # fmt: skip
        largest[transport] = seen.numbers
    # the gathered y is what the ring avoids; its own largest is a shard or its gradient
    assert largest[True] >= world * rows * dim
    assert largest["ring"] <= rows * dim, largest


def test_the_ring_never_holds_more_than_a_shard() -> None:
    run_on_ranks(3, check_memory)


def test_merged_sums_in_one_process() -> None:
    """The ring with one rank is `similarity_lse` itself."""
    run_on_ranks(1, check_one)


def check_one(rank: int, world: int) -> None:
    from llm2clip_kernels.contrastive.ring import ring_lse

    x, y = random_rows(7, 1), random_rows(4, 2)
    parts = ring_lse(
        x, y, torch.tensor(3.0).double(), counts=[4], paired=False, x_ids=None, every_y_ids=None, masked=False,
        sums=False, group=None,
    )  # fmt: skip
    row, col = similarity_lse(x, y, 3.0)
    torch.testing.assert_close(parts[0], row)
    torch.testing.assert_close(parts[2], col)
