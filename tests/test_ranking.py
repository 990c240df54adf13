"""ranking_loss against its definition with whole score matrices: every variant, dtypes, errors."""

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

from llm2clip_kernels import nll_loss, ranking_loss  # noqa: E402

OTHERS = ("query_to_query", "doc_to_query", "doc_to_doc")
HARDNESS = (None, "in_batch_negatives", "hard_negatives", "all_negatives")


def variants() -> list[dict[str, Any]]:
    """Every combination of directions, partition and hardness that has a meaning."""
    found = []
    for count in range(4):
        for others in itertools.combinations(OTHERS, count):
            for partition, hardness in itertools.product(("joint", "per_direction"), HARDNESS):
                if partition == "per_direction" and set(others) - {"doc_to_query"}:
                    continue
                found.append(
                    {
                        "directions": ("query_to_doc", *others),
                        "partition_mode": partition,
                        "hardness_mode": hardness,
                        "hardness_strength": 9.0 if hardness else 0.0,
                    }
                )
    return found


def named(variant: dict[str, Any]) -> str:
    short = "+".join(
        d.replace("query", "q").replace("doc", "d").replace("_to_", "") for d in variant["directions"]
    )
    return f"{short}-{variant['partition_mode']}-{variant['hardness_mode']}"


def dense_ranking(
    q: Tensor,
    p: Tensor,
    *negatives: Tensor,
    scale: Tensor | float,
    directions: tuple[str, ...],
    partition_mode: str,
    hardness_mode: str | None,
    hardness_strength: float,
) -> Tensor:
    """Per-query terms, by the docstring's formulas."""
    n, docs = len(q), torch.cat([p, *negatives])
    owner = torch.arange(n).repeat(1 + len(negatives))
    own = torch.arange(n)[:, None] == owner
    positive = own & (torch.arange(len(docs)) < n)
    dots = q @ docs.T
    harder = {
        None: torch.zeros_like(own),
        "in_batch_negatives": ~own,
        "hard_negatives": own & ~positive,
        "all_negatives": ~positive,
    }[hardness_mode]
    sets = {
        "query_to_doc": scale * dots + harder * hardness_strength * dots.detach(),
        "query_to_query": (scale * q @ q.T).masked_fill(torch.eye(n, dtype=torch.bool), -torch.inf),
        "doc_to_query": scale * p @ q.T,
        "doc_to_doc": (scale * p @ docs.T).masked_fill(own, -torch.inf),
    }
    chosen = [sets[direction] for direction in directions]
    if partition_mode == "joint":
        total = torch.cat(chosen, 1).logsumexp(1)
    else:
        total = torch.stack([scores.logsumexp(1) for scores in chosen]).mean(0)
    return total - scale * (q * p).sum(1)


def columns(rows: int, negatives: int, dim: int = 10, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, *rest = (torch.randn(rows, dim, generator=generator) for _ in range(2 + negatives))
    return [F.normalize(t, dim=1) for t in (q, *(q + r for r in rest))]


def results(function: Any, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = [t.to(dtype).clone().requires_grad_() for t in inputs]
    scale = torch.tensor(20.0, dtype=dtype if dtype == torch.float64 else torch.float32, requires_grad=True)
    loss = function(*leaves, scale)
    (1.7 * loss).backward()
    return [loss.detach().double()] + [t.grad.double() for t in (*leaves, scale)]  # type: ignore[union-attr]


@pytest.mark.parametrize("variant", variants(), ids=named)
def test_every_variant(variant: dict[str, Any]) -> None:
    for rows, negatives in ((1, 1), (7, 0), (9, 2)):
        if rows == 1 and "query_to_query" not in variant["directions"]:
            continue
        inputs = columns(rows, negatives)

        def ours(*args: Tensor) -> Tensor:
            return ranking_loss(args[0], args[1], args[2:-1], args[-1], **variant)  # noqa: B023

        def definition(*args: Tensor) -> Tensor:
            return dense_ranking(*args[:-1], scale=args[-1], **variant).mean()  # noqa: B023

        want = results(definition, inputs, torch.float64)
        for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 0.0), (torch.bfloat16, 0.0)):
            plain = results(definition, inputs, dtype)
            true = want
            if dtype == torch.bfloat16:
                true = results(definition, [t.to(dtype) for t in inputs], torch.float64)
            for got, reference, exact in zip(results(ours, inputs, dtype), plain, true, strict=True):
                floor = limit or {torch.float32: 4e-7, torch.bfloat16: 4e-3}[dtype]
                bound = 2 * (reference - exact).norm() + floor * (exact.norm() + 1)
                assert (got - exact).norm() <= bound, (dtype, rows, negatives)


def test_one_direction_is_nll() -> None:
    q, p, n = columns(8, 1)
    torch.testing.assert_close(ranking_loss(q, p, [n], 20.0), nll_loss(q, p, n, 20.0))


def check_ranks(rank: int, world: int) -> None:
    sizes = [3, 5, 2][:world]
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    inputs = [t.double() for t in columns(sum(sizes), 2)]
    for index, variant in enumerate(variants()[:: 2 if world == 2 else 5]):
        whole = [t.clone().requires_grad_() for t in inputs]
        terms = dense_ranking(*whole, scale=20.0, **variant)
        convention, factor = (("sum", 1), ("ddp_mean", world))[index % 2]
        part = [t[mine].clone().requires_grad_() for t in inputs]
        arguments = part[0], part[1], part[2:], 20.0
        loss = ranking_loss(*arguments, **variant, gather=True, grad_reduction=convention)  # type: ignore[arg-type]
        torch.testing.assert_close(loss, terms.mean())
        each = ranking_loss(*arguments, **variant, gather=True, reduction="none")
        torch.testing.assert_close(each, terms[mine])
        terms.mean().backward()
        loss.backward()
        for got, want in zip(part, whole, strict=True):
            torch.testing.assert_close(got.grad / factor, want.grad[mine], rtol=1e-9, atol=1e-12)  # type: ignore[operator, index]
    dist.barrier()


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3])
def test_uneven_ranks_equal_one_process(world: int) -> None:
    run_on_ranks(world, check_ranks)


def test_compiles_whole() -> None:
    options: Any = {
        "directions": ("query_to_doc", *OTHERS),
        "hardness_mode": "in_batch_negatives",
        "hardness_strength": 5.0,
    }

    def loss(q: Tensor, p: Tensor, n: Tensor) -> Tensor:
        return ranking_loss(q, p, [n], 20.0, **options)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for rows in (6, 9):
        torch.testing.assert_close(compiled(*columns(rows, 1)), loss(*columns(rows, 1)))


def test_only_what_needs_a_gradient_gets_one() -> None:
    q, p, n = columns(6, 1)
    q.requires_grad_()
    loss = ranking_loss(q, p, [n], directions=("query_to_doc", *OTHERS))  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(loss, q)
    full = [t.detach().clone().requires_grad_() for t in (q, p, n)]
    again = ranking_loss(full[0], full[1], full[2:], directions=("query_to_doc", *OTHERS))  # type: ignore[arg-type]
    torch.testing.assert_close(grad, torch.autograd.grad(again, full[0])[0])


@pytest.mark.parametrize(
    "options, match",
    [
        ({"directions": ("doc_to_query",)}, "query_to_doc"),
        ({"directions": ("query_to_doc", "doc_to_image")}, "doc_to_image"),
        ({"partition_mode": "apart"}, "partition_mode"),
        ({"directions": ("query_to_doc", "doc_to_doc"), "partition_mode": "per_direction"}, "use 'joint'"),
        ({"hardness_mode": "some"}, "hardness_mode"),
        ({"hardness_mode": "all_negatives", "hardness_strength": -1.0}, "hardness_strength"),
        ({"hardness_mode": "all_negatives", "scale": -1.0}, "above 0"),
        ({"gather": "ring"}, "ring"),
        ({"reduction": "max"}, "reduction"),
    ],
)
def test_bad_options(options: dict[str, Any], match: str) -> None:
    q, p = columns(4, 0)
    with pytest.raises(ValueError, match=match):
        ranking_loss(q, p, None, **options)


def test_bad_columns() -> None:
    q, p, n = columns(4, 1)
    with pytest.raises(ValueError, match="one row per query"):
        ranking_loss(q, p, [n[:3]])
    with pytest.raises(ValueError, match="one D"):
        ranking_loss(q, p[:, :5])
