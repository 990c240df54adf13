"""SigLipLoss against a plain definition of open_clip's, value and gradient, alone and over ranks."""

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

from llm2clip.losses import SigLipLoss  # noqa: E402

WAYS = ("bidir", "shift", "reduce", "gather")


def features(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 6, dtype=torch.float64, generator=generator), dim=1)


def inputs(image: Tensor, text: Tensor) -> list[Tensor]:
    scalars = torch.tensor(8.0, dtype=torch.float64), torch.tensor([-5.0], dtype=torch.float64)
    return [t.detach().clone().requires_grad_() for t in (image, text, *scalars)]


def plain(image: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, first: int = 0) -> Tensor:
    """open_clip's: this rank's images against everybody's texts, over this rank's number of images."""
    labels = -torch.ones(len(image), len(texts), dtype=image.dtype)
    labels[torch.arange(len(image)), first + torch.arange(len(image))] = 1
    return -F.logsigmoid(labels * (scale * image @ texts.T + bias)).sum() / len(image)


def check_every_way(rank: int, world: int) -> None:
    mine = slice(4 * rank, 4 * rank + 4)
    image, text = features(4 * world, 1), features(4 * world, 2)
    whole = inputs(image, text)
    plain(*whole).backward()
    original = inputs(image[mine], text[mine])
    texts = torch.cat(torch.distributed.nn.all_gather(original[1]))
    want = plain(original[0], texts, original[2], original[3], 4 * rank)
    (1.3 * want).backward()
    for way in (None, *WAYS):
        ours = inputs(image[mine], text[mine])
        loss = SigLipLoss(rank=rank, world_size=world, dist_impl=way)(*ours)
        (1.3 * loss).backward()
        assert torch.allclose(loss, want, rtol=1e-12), way
        for got, true in zip(ours, original, strict=True):
            assert got.grad.shape == true.grad.shape, way  # type: ignore[union-attr]
            assert torch.allclose(got.grad, true.grad, atol=1e-12), way  # type: ignore[arg-type]
        # averaged over the ranks as DDP does, they are those of the whole batch
        for got, true in zip(ours[:2], whole[:2], strict=True):
            assert torch.allclose(got.grad / 1.3 / world, true.grad[mine], atol=1e-12)  # type: ignore[operator, index]
        for got, true in zip(ours[2:], whole[2:], strict=True):
            dist.all_reduce(got.grad)
            assert torch.allclose(got.grad / 1.3 / world, true.grad, atol=1e-12)  # type: ignore[operator, arg-type]


def check_against_open_clip(rank: int, world: int) -> None:
    from open_clip.loss import SigLipLoss as Original

    mine = slice(4 * rank, 4 * rank + 4)
    image, text = features(4 * world, 1), features(4 * world, 2)
    for way in WAYS:
        results = []
        for kind in (Original, SigLipLoss):
            leaves = inputs(image[mine], text[mine])
            loss = kind(rank=rank, world_size=world, dist_impl=way)(*leaves)
            loss.backward()
            results.append([loss.detach(), *(t.grad for t in leaves)])
        for want, got in zip(*results, strict=True):
            assert torch.allclose(want, got, atol=1e-12), way  # type: ignore[arg-type]


@pytest.mark.dist
def test_against_the_installed_open_clip() -> None:
    pytest.importorskip("open_clip.loss", reason="open_clip is not installed", exc_type=ImportError)
    run_on_ranks(3, check_against_open_clip)


def check_uneven(rank: int, world: int) -> None:
    """Every rank's mean over its own images, as with even ranks; the texts' gradients come from all of them."""
    sizes = [3, 1, 4][:world]
    starts = [sum(sizes[:r]) for r in range(world + 1)]
    image, text = features(starts[-1], 1), features(starts[-1], 2)
    whole = inputs(image, text)
    parts = [
        plain(whole[0][starts[r] : starts[r + 1]], whole[1], whole[2], whole[3], starts[r])
        for r in range(world)
    ]
    torch.stack(parts).sum().backward()
    mine = slice(starts[rank], starts[rank + 1])
    for way in WAYS:
        ours = inputs(image[mine], text[mine])
        loss = SigLipLoss(rank=rank, world_size=world, dist_impl=way)(*ours)
        loss.backward()
        assert torch.allclose(loss, parts[rank])
        for got, true in zip(ours[:2], whole[:2], strict=True):
            assert torch.allclose(got.grad, true.grad[mine], atol=1e-12), way  # type: ignore[arg-type, index]


def check_ranks(rank: int, world: int) -> None:
    check_every_way(rank, world)
    check_uneven(rank, world)


@pytest.mark.dist
def test_every_way_of_moving_the_texts() -> None:
    run_on_ranks(3, check_ranks)


def test_alone() -> None:
    image, text, scale, bias = inputs(features(9, 1), features(9, 2))
    want = plain(image, text, scale, bias)
    wanted = torch.autograd.grad(want, (image, text, scale, bias))
    out = SigLipLoss(chunk_size=4)(
        image_features=image, text_features=text, logit_scale=scale, logit_bias=bias, output_dict=True
    )
    assert list(out) == ["contrastive_loss"] and torch.allclose(out["contrastive_loss"], want)
    got = torch.autograd.grad(out["contrastive_loss"], (image, text, scale, bias))
    for g, w in zip(got, wanted, strict=True):
        assert torch.allclose(g, w, atol=1e-12)
    assert torch.allclose(SigLipLoss()(image, text, 8.0, -5.0), want)
    assert torch.allclose(SigLipLoss()(image, text, scale, None), plain(image, text, scale, torch.zeros(1)))


def test_what_inspection_shows() -> None:
    loss, image, text = SigLipLoss(), features(3, 1), features(3, 2)
    labels = loss.get_ground_truth(torch.device("cpu"), torch.float32, 3)
    assert torch.equal(labels, 2 * torch.eye(3) - 1)
    assert torch.equal(loss.get_ground_truth("cpu", torch.float32, 3, negative_only=True), -torch.ones(3, 3))  # type: ignore[arg-type]
    logits = loss.get_logits(image, text, 2.0, torch.tensor([-1.0]))
    assert torch.allclose(logits, 2 * image @ text.T - 1)
    want = -F.logsigmoid(labels * logits).sum() / 3
    assert torch.allclose(loss(image, text, 2.0, -1.0), want)
    assert torch.allclose(loss.get_logits(image, text, 2.0), 2 * image @ text.T)


def test_signature_and_errors() -> None:
    assert list(inspect.signature(SigLipLoss).parameters) == [
        "cache_labels", "rank", "world_size", "dist_impl", "chunk_size",
    ]  # fmt: skip
    forward: Any = inspect.signature(SigLipLoss().forward).parameters
    assert list(forward) == ["image_features", "text_features", "logit_scale", "logit_bias", "output_dict"]
    assert forward["logit_bias"].default is inspect.Parameter.empty
    assert SigLipLoss().dist_impl == "bidir"
    with pytest.raises(ValueError, match="bidir, shift, reduce or gather, got 'ring'"):
        SigLipLoss(dist_impl="ring")
    with pytest.raises(ValueError, match="torchrun"):
        SigLipLoss(rank=0, world_size=2)(features(3, 1), features(3, 2), 1.0, 0.0)
    with pytest.raises(ValueError, match="pair up"):
        SigLipLoss()(features(3, 1), features(2, 2), 1.0, 0.0)
