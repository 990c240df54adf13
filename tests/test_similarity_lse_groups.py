"""similarity_lse with pairs left out by group, against the whole matrix in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_kernels.similarity_lse import op as op_module
from llm2clip_kernels.similarity_lse import similarity_lse_reference, similarity_lse_with_positives


def features(rows: int, dim: int) -> Tensor:
    return F.normalize(torch.randn(rows, dim), dim=1)


def ids(rows: int, kinds: int) -> Tensor:
    # far apart and negative: neither their size nor their order may matter
    names = torch.tensor([-3, -1, 0, 2**40, 7, 2**33 + 7, 12, 13, 99])
    return names[torch.randint(0, kinds + 2, (rows,))]


def run(function: Any, inputs: list[Tensor], groups: tuple[Tensor, Tensor], diagonal: int) -> list[Tensor]:
    x, y, scale = (t.detach().clone().requires_grad_() for t in inputs)
    row, col = function(x, y, scale, groups, diagonal)[:2]
    # rows and columns with nothing left take no part
    total = (row * torch.linspace(1, 2, len(row)).to(row))[row.detach().isfinite()].sum()
    total = total - 2 * (col * torch.linspace(3, 1, len(col)).to(col))[col.detach().isfinite()].sum()
    total.backward()
    assert x.grad is not None and y.grad is not None and scale.grad is not None
    return [t.detach() for t in (row, col, x.grad, y.grad, scale.grad)]


def plain(x: Tensor, y: Tensor, scale: Tensor, groups: tuple[Tensor, Tensor], diagonal: int) -> Any:
    return similarity_lse_reference(x, y, scale, *groups, diagonal=diagonal)


@pytest.mark.parametrize("diagonal", [-1, 0, 5])
@pytest.mark.parametrize("scale", [0.0, 20.0, 1e4])
@pytest.mark.parametrize("kind", ["recompute", "cached", "chunked", "plain"])
@pytest.mark.parametrize("shape", [(1, 6, 3), (70, 75, 20), (130, 1100, 12)], ids=str)
def test_equals_the_masked_matrix(
    shape: tuple[int, int, int], kind: str, scale: float, diagonal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    m, n, d = shape
    if kind == "chunked":
        monkeypatch.setattr(op_module.backend, "choose", lambda *_: "chunked")
    monkeypatch.setattr(op_module, "_SMALL_PAIRS", 2**30 if kind == "plain" else 0)
    method: Any = {"chunked": "recompute", "plain": "auto"}.get(kind, kind)

    def ours(x: Tensor, y: Tensor, factor: Tensor, groups: tuple[Tensor, Tensor], diagonal: int) -> Any:
        return similarity_lse_with_positives(
            x, y, factor, diagonal=diagonal, method=method, x_groups=groups[0], y_groups=groups[1]
        )

    inputs = [features(m, d), features(n, d), torch.tensor(scale)]
    groups = ids(m, 4), ids(n, 4)
    got = run(ours, inputs, groups, diagonal)
    want = run(plain, [t.double() for t in inputs], groups, diagonal)
    torch_error = run(plain, inputs, groups, diagonal)
    for name, g, w, t in zip(("row", "col", "dx", "dy", "dscale"), got, want, torch_error, strict=True):
        assert torch.equal(g.isinf(), w.isinf()), name
        g, w, t = (v[w.isfinite()].double() for v in (g, w, t))
        size = w.abs().max().clamp_min(1.0) if w.numel() else torch.tensor(1.0)
        size = size + (5 * (m + n) if name == "dscale" else 0)
        limit = 2 * (t - w).norm() + 4e-7 * size * max(1, w.numel()) ** 0.5
        assert (g - w).norm() <= limit, (name, (g - w).norm(), limit)


@pytest.mark.parametrize("method", ["recompute", "cached", "auto"])
def test_a_row_with_nothing_left(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log-sum-exp is -inf, it gets no gradient, and it harms nobody."""
    monkeypatch.setattr(op_module, "_SMALL_PAIRS", 2**30)
    x, y = features(5, 4).requires_grad_(), features(6, 4)
    y_groups = torch.full((6,), 3)
    row, col, _, _ = similarity_lse_with_positives(
        x, y, 10.0, method=method, x_groups=torch.tensor([1, 3, 1, 1, 2]), y_groups=y_groups
    )
    assert col is not None and row.isinf().tolist() == [False, True, False, False, False]
    torch.logaddexp(row, torch.zeros_like(row)).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad[1].eq(0).all()
    assert x.grad[[0, 2, 3, 4]].ne(0).any(dim=1).all()


@pytest.mark.parametrize("columns", [1, 6, 16, 40])
def test_a_row_with_nothing_left_keeps_the_scale_finite(columns: int) -> None:
    """Also in the lanes of a vector register past the row's end."""
    scale = torch.tensor(10.0, requires_grad=True)
    ids = torch.zeros(columns, dtype=torch.int64)
    row, _, _, _ = similarity_lse_with_positives(
        features(1, 4), features(columns, 4), scale, directions="rows", x_groups=ids[:1], y_groups=ids
    )
    torch.logaddexp(row, torch.zeros_like(row)).sum().backward()
    assert scale.grad is not None and scale.grad == 0


def test_a_left_out_row_may_hold_anything() -> None:
    x, y = features(4, 4), features(4, 4)
    clean, _, _, _ = similarity_lse_with_positives(x[:3], y, 10.0)
    y = torch.cat([y, torch.full((1, 4), float("nan"))])
    row, _, _, _ = similarity_lse_with_positives(
        x[:3], y, 10.0, x_groups=torch.zeros(3).long(), y_groups=torch.tensor([-1, -1, -1, -1, 0])
    )
    assert torch.allclose(row, clean, atol=1e-6)


def test_gradcheck_and_opcheck() -> None:
    inputs = [features(4, 3).double(), features(6, 3).double(), torch.tensor(2.0).double()]
    for t in inputs:
        t.requires_grad_()
    groups = torch.tensor([0, 1, 1, -1]), torch.tensor([1, 0, 1, -1, 2, 1])

    def terms(x: Tensor, y: Tensor, s: Tensor) -> Any:
        return similarity_lse_with_positives(x, y, s, diagonal=1, x_groups=groups[0], y_groups=groups[1])[:3]

    assert torch.autograd.gradcheck(terms, inputs)
    single = [t.detach().float().requires_grad_() for t in inputs]
    torch.library.opcheck(op_module._forward, (*single, True, 1, False, *groups))


def test_ids_of_any_integer_type_and_layout() -> None:
    x, y = features(4, 3), features(8, 3)
    mine, others = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 1, 1, 2, 2, 9, 9])
    want = similarity_lse_with_positives(x, y, 5.0, x_groups=mine, y_groups=others)
    strided = torch.stack([others, others], dim=1)[:, 0]
    got = similarity_lse_with_positives(x, y, 5.0, x_groups=mine.int(), y_groups=strided.short())
    assert torch.equal(got[0], want[0])


@pytest.mark.parametrize(
    ("groups", "error", "words"),
    [
        ((torch.zeros(4).long(), None), ValueError, "only one of the two"),
        ((torch.zeros(4), torch.zeros(5)), TypeError, "integer"),
        ((torch.zeros(4).long(), torch.zeros(4).long()), ValueError, "5 rows"),
        (([0, 0, 0, 0], torch.zeros(5).long()), TypeError, "list"),
    ],
)
def test_bad_groups(groups: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        similarity_lse_with_positives(
            features(4, 3), features(5, 3), 1.0, x_groups=groups[0], y_groups=groups[1]
        )
