"""infonce_loss and nll_loss on one process against torch's cross-entropy in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_kernels import infonce_loss, nll_loss
from llm2clip_kernels.similarity_lse import op


def pair(rows: int = 21, dim: int = 12, noise: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    x = F.normalize(torch.randn(rows, dim), dim=1)
    y = F.normalize(x + noise * torch.randn(rows, dim), dim=1)
    return x, y, torch.tensor(13.0)


def plain(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | float = 0.0,
    smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    logits = scale * x @ y.T + bias
    target = torch.arange(len(x))
    options: Any = {"label_smoothing": smoothing, "reduction": reduction}
    return 0.5 * (F.cross_entropy(logits, target, **options) + F.cross_entropy(logits.T, target, **options))


def gradients(function: Any, inputs: Any, dtype: torch.dtype, weight: Tensor | float = 1.7) -> list[Tensor]:
    leaves = [t.detach().clone().to(dtype).requires_grad_() for t in inputs]
    loss = function(*leaves)
    (loss * weight).sum().backward()
    return [loss.detach().double()] + [t.grad.double() for t in leaves]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_against_cross_entropy(smoothing: float, reduction: Any) -> None:
    inputs = pair()
    weight = torch.rand(21) if reduction == "none" else 1.7
    want = gradients(
        lambda *a: plain(*a, smoothing=smoothing, reduction=reduction), inputs, torch.float64, weight
    )
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        got = gradients(
            lambda *a: infonce_loss(*a, label_smoothing=smoothing, reduction=reduction), inputs, dtype, weight
        )
        for g, w in zip(got, want, strict=True):
            assert (g - w).norm() <= limit * (w.norm() + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_learned_pairs_keep_their_small_gradients(dtype: torch.dtype) -> None:
    """Near convergence 1 - p cancels: loss and gradient are tiny and must not drown in rounding."""
    x, y, _ = pair(noise=0.02)
    inputs = x.to(dtype), y.to(dtype), torch.tensor(100.0)
    want = gradients(plain, inputs, torch.float64)
    cast = [t.to(dtype) for t in inputs]
    reference = gradients(plain, cast, dtype)
    a, b, s = (t.clone().requires_grad_() for t in inputs)
    loss = infonce_loss(a, b, s)
    (loss * 1.7).backward()
    got = [loss, a.grad, b.grad, s.grad]
    # the last bit of p = 1, and what scale times a unit vector makes of it
    resolution = [6e-8, 6e-6, 6e-6, 6e-8]
    for g, r, w, bit in zip(got, reference, want, resolution, strict=True):
        floor = {torch.float32: 1e-8, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype] * w.norm()
        assert (g.double() - w).norm() <= 2 * (r - w).norm() + floor + bit  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_small_batches_are_plain_torch(
    smoothing: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same terms and gradients, to rounding, without the op."""
    inputs = [F.normalize(torch.randn(12, 8), dim=1).to(dtype) for _ in "xy"]
    results = []
    for limit in (0, 12 * 12):
        monkeypatch.setattr(op, "_SMALL_PAIRS", limit)
        x, y, scale = (t.clone().requires_grad_() for t in (*inputs, torch.tensor(9.0)))
        called: list[int] = []
        real = op._forward
        with monkeypatch.context() as patch:
            patch.setattr(
                op, "_forward", lambda *a, real=real, called=called: (called.append(1), real(*a))[1]
            )
            terms = infonce_loss(x, y, scale, label_smoothing=smoothing, reduction="none")
        assert len(called) == (limit == 0)
        (terms * torch.linspace(1, 2, 12).to(terms)).sum().backward()
        results.append([terms.detach(), x.grad, y.grad, scale.grad])
    for plain, ours in zip(*results, strict=True):
        assert plain is not None and ours is not None
        if dtype == torch.bfloat16:
            # parts of a gradient are rounded before they are added, and where they cancel the rounding shows
            assert (plain - ours).norm() <= 1e-2 * plain.norm()
        else:
            assert torch.allclose(plain, ours, rtol=1e-5, atol=1e-5)


def test_bias_gets_a_zero_gradient() -> None:
    x, y, scale = pair()
    for value in (3.0, float("-inf")):
        bias = torch.tensor([value], requires_grad=True)
        loss = infonce_loss(x, y, scale, logit_bias=bias)
        assert torch.equal(loss, infonce_loss(x, y, scale))
        loss.backward()
        assert bias.grad is not None and torch.equal(bias.grad, torch.zeros(1))
    assert torch.allclose(loss, plain(x, y, scale, bias=3.0), atol=1e-5)


def test_permuting_pairs_or_swapping_towers_changes_nothing() -> None:
    x, y, scale = (t.double() for t in pair())
    loss = infonce_loss(x, y, scale)
    order = torch.randperm(21)
    assert torch.allclose(infonce_loss(x[order], y[order], scale), loss)
    assert torch.allclose(infonce_loss(y, x, scale), loss)
    assert infonce_loss(x[:1], y[:1], scale).abs() < 1e-12


@pytest.mark.parametrize("count", [None, 5, 40])
def test_nll_with_hard_negatives(count: int | None) -> None:
    x, y, scale = pair()
    others = [] if count is None else [F.normalize(torch.randn(count, 12), dim=1)]

    def definition(a: Tensor, b: Tensor, s: Tensor, *negatives: Tensor) -> Tensor:
        return F.cross_entropy(s * a @ torch.cat([b, *negatives]).T, torch.arange(21))

    want = gradients(definition, (x, y, scale, *others), torch.float64)
    got = gradients(
        lambda a, b, s, *n: nll_loss(a, b, n[0] if n else None, s), (x, y, scale, *others), torch.float32
    )
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() <= 2e-6 * (w.norm() + 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_nll_leaves_false_negatives_out(dtype: torch.dtype) -> None:
    """Positives and hard negatives of a query's own id are in no sum; -1 equals nothing."""
    x, y, scale = pair()
    negatives = F.normalize(torch.randn(7, 12), dim=1)
    ids = torch.arange(21) % 9 - 1
    negative_ids = torch.tensor([-1, 3, 3, 50, 0, -1, 7])
    own = torch.eye(21, dtype=torch.bool)
    same = (ids[:, None] == torch.cat([ids, negative_ids])) & (ids[:, None] >= 0)
    same[:, :21] &= ~own
    assert same[:, :21].any() and same[:, 21:].any()

    def definition(a: Tensor, b: Tensor, s: Tensor, n: Tensor) -> Tensor:
        logits = (s * a @ torch.cat([b, n]).T).masked_fill(same, float("-inf"))
        return F.cross_entropy(logits, torch.arange(21))

    want = gradients(definition, (x, y, scale, negatives), torch.float64)
    got = gradients(
        lambda a, b, s, n: nll_loss(a, b, n, s, groups=ids, negative_groups=negative_ids),
        (x, y, scale, negatives),
        dtype,
    )
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() <= (2e-6 if dtype == torch.float32 else 1e-12) * (w.norm() + 1)
    with pytest.raises(ValueError, match="negative_groups needs"):
        nll_loss(x, y, negatives, scale, negative_groups=negative_ids)
    with pytest.raises(ValueError, match="one id for each of 7 rows"):
        nll_loss(x, y, negatives, scale, groups=ids, negative_groups=negative_ids[:3])


def test_compiles_whole() -> None:
    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return infonce_loss(F.normalize(x, dim=1), F.normalize(y, dim=1), scale, label_smoothing=0.1)

    inputs = torch.randn(9, 4), torch.randn(9, 4), torch.tensor(5.0)
    eager = gradients(loss, inputs, torch.float32)
    compiled = gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"), inputs, torch.float32)
    for g, w in zip(compiled, eager, strict=True):
        assert torch.allclose(g, w, atol=1e-6)


def test_bad_input() -> None:
    x, y, scale = pair()
    with pytest.raises(ValueError, match="pair up"):
        infonce_loss(x, y[:4], scale)
    with pytest.raises(ValueError, match="label_smoothing"):
        infonce_loss(x, y, scale, label_smoothing=1.5)
    with pytest.raises(ValueError, match="reduction"):
        infonce_loss(x, y, scale, reduction="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grad_reduction"):
        infonce_loss(x, y, scale, grad_reduction="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one positive"):
        nll_loss(x, y[:4], None, scale)
