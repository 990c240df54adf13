"""infonce_loss with false negatives, several positives and weights, against the dense definition in fp64."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from dense_infonce import dense_infonce  # noqa: E402

from llm2clip_kernels import infonce_loss  # noqa: E402


def features(rows: int, dim: int = 12) -> Tensor:
    return F.normalize(torch.randn(rows, dim), dim=1)


def check(
    inputs: tuple[Tensor, ...], options: dict[str, Any], dtype: torch.dtype, limit: float, slack: float = 0.0
) -> None:
    """Value and gradients of our loss within `limit` of the definition's, or `slack` times plain torch's error."""

    def results(function: Any, kind: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).to(kind).clone().requires_grad_() for t in inputs[:2]]
        leaves.append(inputs[2].to(kind if kind == torch.float64 else torch.float32).clone().requires_grad_())
        given = {
            key: value.to(leaves[2].dtype) if key in ("weights", "y_weights") and value is not None else value
            for key, value in options.items()
        }
        loss = function(*leaves, **given)
        upstream = torch.linspace(0.4, 1.9, loss.numel(), dtype=torch.float64).reshape(loss.shape)
        (loss * upstream).sum().backward()
        return [loss.detach().double()] + [t.grad.double() for t in leaves]  # type: ignore[union-attr]

    want = results(dense_infonce, torch.float64)
    plain = results(dense_infonce, dtype) if slack else want
    for got, reference, true in zip(results(infonce_loss, dtype), plain, want, strict=True):
        bound = limit * (true.norm() + 1) + slack * (reference - true).norm()
        assert (got - true).norm() <= bound, (options, (got - true).norm(), bound)


PRECISION = [(torch.float64, 1e-12, 0.0), (torch.float32, 2e-6, 2.0)]


@pytest.mark.parametrize("same_group", ["mask", "positive"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_groups_of_pairs(same_group: str, smoothing: float, reduction: str) -> None:
    for rows, ids in ((1, 1), (21, 6), (65, 40)):
        inputs = features(rows), features(rows), torch.tensor(13.0)
        for weights in (None, torch.rand(rows) + 0.1):
            options = {
                "groups": torch.randint(-3, ids, (rows,)), "same_group": same_group, "weights": weights,
                "label_smoothing": smoothing, "reduction": reduction,
            }  # fmt: skip
            for dtype, limit, slack in PRECISION:
                check(inputs, options, dtype, limit, slack)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_images_with_several_captions(smoothing: float, reduction: str) -> None:
    for images, captions in ((1, 5), (7, 31), (33, 12)):
        inputs = features(images), features(captions), torch.tensor(13.0)
        options: dict[str, Any] = {
            "groups": torch.arange(images), "y_groups": torch.randint(-2, images + 2, (captions,)),
            "same_group": "positive", "label_smoothing": smoothing, "reduction": reduction,
        }  # fmt: skip
        # the definition of a mean needs one positive
        options["y_groups"][0] = 0
        for weights in (None, torch.rand(images) + 0.1):
            options |= {"weights": weights, "y_weights": None if weights is None else torch.rand(captions)}
            for dtype, limit, slack in PRECISION:
                check(inputs, options, dtype, limit, slack)


def test_masks_may_differ_between_the_sides() -> None:
    inputs = features(21), features(21), torch.tensor(13.0)
    options = {
        "groups": torch.randint(0, 9, (21,)),
        "y_groups": torch.randint(0, 9, (21,)),
        "label_smoothing": 0.2,
    }
    check(inputs, options, torch.float64, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("same_group", ["mask", "positive"])
def test_half_precision_is_at_least_as_exact_as_torch(dtype: torch.dtype, same_group: str) -> None:
    x = features(64, 96)
    inputs = x.to(dtype).float(), F.normalize(x + 0.1 * torch.randn(64, 96), dim=1), torch.tensor(30.0)
    check(inputs, {"groups": torch.randint(0, 30, (64,)), "same_group": same_group}, dtype, 1e-6, 2.0)


@pytest.mark.parametrize("scale", [0.0, -3.0, 100.0, 1e4])
def test_extreme_scales(scale: float) -> None:
    inputs = features(40), features(40), torch.tensor(scale)
    for same_group in ("mask", "positive"):
        options = {"groups": torch.randint(0, 15, (40,)), "same_group": same_group}
        check(inputs, options, torch.float32, 1e-6, 2.0)


def test_groups_of_one_change_nothing() -> None:
    """Down to the last bit: the own pair stays in the kernel, where 1 - p is known without cancelling."""
    x = features(30)
    inputs = x, F.normalize(x + 0.01 * torch.randn_like(x), dim=1), torch.tensor(100.0)
    plain = gradients_of(inputs)
    for same_group in ("mask", "positive"):
        for ids in (torch.randperm(30), torch.full((30,), -1)):
            options = {"groups": ids, "same_group": same_group}
            for got, want in zip(gradients_of(inputs, **options), plain, strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def gradients_of(inputs: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    loss = infonce_loss(*leaves, **options)  # type: ignore[misc, arg-type]
    loss.backward()
    return [loss.detach()] + [t.grad for t in leaves]  # type: ignore[misc]


def test_all_in_one_group() -> None:
    x, y, scale = features(9), features(9), torch.tensor(5.0)
    one = torch.zeros(9, dtype=torch.int64)
    # nothing is left to tell apart from
    loss, *gradients = gradients_of((x, y, scale), groups=one)
    assert loss.abs() < 1e-6 and all(g.norm() < 1e-5 for g in gradients)
    # a uniform target over equal rows is met
    same = x[:1].repeat(9, 1)
    loss, *gradients = gradients_of((same, same, scale), groups=one, same_group="positive")
    assert (loss - torch.tensor(9.0).log()).abs() < 1e-5 and all(g.norm() < 1e-5 for g in gradients)


def test_weights_get_their_gradient_and_zero_weights_leave_rows_out() -> None:
    x, y, scale = (t.double() for t in (features(12), features(12), torch.tensor(7.0)))
    weights = torch.rand(12).double().requires_grad_()
    (ours,) = torch.autograd.grad(infonce_loss(x, y, scale, weights=weights), weights)
    (true,) = torch.autograd.grad(dense_infonce(x, y, scale, weights=weights), weights)
    torch.testing.assert_close(ours, true)
    half = torch.tensor([1.0] * 6 + [0.0] * 6).double()
    terms = infonce_loss(x, y, scale, reduction="none")
    torch.testing.assert_close(infonce_loss(x, y, scale, weights=half), terms[:6].mean())


def test_bias_still_gets_a_zero_gradient() -> None:
    bias = torch.tensor(-10.0, requires_grad=True)
    ids = torch.tensor([0, 0, 1, 2, 2])
    infonce_loss(features(5), features(5), 3.0, groups=ids, logit_bias=bias).backward()
    assert bias.grad == 0


@pytest.mark.parametrize("same_group", ["mask", "positive"])
def test_autocast_rounds_nothing(same_group: str) -> None:
    x, y, ids = features(40), features(40), torch.randint(0, 15, (40,))
    options: Any = {"groups": ids, "same_group": same_group, "label_smoothing": 0.2}
    want = infonce_loss(x, y, 20.0, **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(infonce_loss(x, y, 20.0, **options), want)


def test_compiles_whole() -> None:
    def loss(x: Tensor, y: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
        masked = infonce_loss(x, y, scale, groups=ids, label_smoothing=0.1)
        return masked + infonce_loss(x, y, scale, groups=ids, same_group="positive", weights=ids + 1.0)

    inputs = features(9), features(9), torch.tensor(5.0), torch.randint(0, 4, (9,))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for args in (inputs, (features(11), features(11), torch.tensor(5.0), torch.randint(0, 4, (11,)))):
        torch.testing.assert_close(compiled(*args), loss(*args))


def test_bad_input() -> None:
    x, y, ids = features(6), features(6), torch.arange(6)
    for bad in (ids.float(), ids[:4], [0] * 6):
        with pytest.raises((TypeError, ValueError), match="groups"):
            infonce_loss(x, y, 1.0, groups=bad)  # type: ignore[arg-type]
    for bad in (torch.ones(4), [1.0] * 6, torch.ones(6, dtype=torch.bool)):
        with pytest.raises((TypeError, ValueError), match="weights"):
            infonce_loss(x, y, 1.0, weights=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="same_group"):
        infonce_loss(x, y, 1.0, groups=ids, same_group="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs groups"):
        infonce_loss(x, y, 1.0, y_groups=ids)
    with pytest.raises(ValueError, match="different sizes"):
        infonce_loss(x, y[:3], 1.0, groups=ids, y_groups=ids[:3])
    with pytest.raises(ValueError, match="y_weights"):
        infonce_loss(x, y, 1.0, y_weights=torch.ones(6))
    with pytest.raises(ValueError, match="gather"):
        infonce_loss(x, y, 1.0, gather="tree")  # type: ignore[arg-type]
