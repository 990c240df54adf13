"""Drop-in losses against plain definitions of the originals, value and gradient, alone and over two ranks."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from gloo import run_on_ranks  # noqa: E402

from llm2clip.losses import ClipLoss, HardNegativeNLLLoss  # noqa: E402


def features(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 6, dtype=torch.float64, generator=generator), dim=1)


def gathered(t: Tensor, with_grad: bool, keep_own: bool) -> Tensor:
    """Everybody's rows; what other ranks' rows are to this rank's gradient is the point of the flags."""
    if with_grad:
        return torch.cat(torch.distributed.nn.all_gather(t))
    every = [torch.zeros_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(every, t.detach())
    if keep_own:
        every[dist.get_rank()] = t
    return torch.cat(every)


def plain_clip(image: Tensor, text: Tensor, scale: Tensor, local: bool, with_grad: bool) -> Tensor:
    every_image = gathered(image, with_grad, keep_own=not local)
    every_text = gathered(text, with_grad, keep_own=not local)
    if local:
        per_image, per_text = scale * image @ every_text.T, scale * text @ every_image.T
        target = torch.arange(len(image)) + len(image) * dist.get_rank()
    else:
        per_image = scale * every_image @ every_text.T
        per_text, target = per_image.T, torch.arange(len(every_image))
    return 0.5 * (F.cross_entropy(per_image, target) + F.cross_entropy(per_text, target))


def check_flags(rank: int, world: int) -> None:
    image, text = features(4 * world, 1)[4 * rank :][:4], features(4 * world, 2)[4 * rank :][:4]
    whole = [t.clone().requires_grad_() for t in (features(4 * world, 1), features(4 * world, 2))]
    ClipLoss()(whole[0], whole[1], 7.0).backward()
    true = whole[0].grad[4 * rank :][:4]  # type: ignore[index]
    for local in (False, True):
        for with_grad in (False, True):
            results = []
            for ours in (False, True):
                inputs = [
                    t.detach().clone().requires_grad_() for t in (image, text, torch.tensor(7.0).double())
                ]
                if ours:
                    loss = ClipLoss(local, with_grad, rank=rank, world_size=world)(*inputs)
                else:
                    loss = plain_clip(*inputs, local, with_grad)
                (1.3 * loss).backward()
                scale_grad = inputs[2].grad
                dist.all_reduce(scale_grad)
                results.append([loss.detach(), inputs[0].grad, inputs[1].grad, scale_grad])
            for want, got in zip(*results, strict=True):
                assert torch.allclose(want, got, atol=1e-12), (local, with_grad)
            # the table of the docstring: after DDP's division by the number of ranks
            after_ddp = results[1][1] / 1.3 / world
            if with_grad:
                assert torch.allclose(after_ddp, true)
            elif not local:
                assert torch.allclose(after_ddp, true / world)
            else:
                assert not torch.allclose(after_ddp, true / world, rtol=1e-2)


@pytest.mark.dist
def test_clip_loss_flags_over_two_ranks() -> None:
    run_on_ranks(2, check_flags)


def test_clip_loss_alone() -> None:
    image, text = features(9, 1), features(9, 2)
    bias = torch.tensor(-10.0, requires_grad=True)
    out = ClipLoss()(
        image_features=image,
        text_features=text,
        logit_scale=torch.tensor(14.3),
        logit_bias=bias,
        output_dict=True,
    )
    assert list(out) == ["contrastive_loss"]
    logits = torch.tensor(14.3).double() * image @ text.T
    target = torch.arange(9)
    want = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
    assert torch.allclose(out["contrastive_loss"], want)
    assert torch.allclose(ClipLoss()(image, text, 14.3), want)
    out["contrastive_loss"].backward()
    assert bias.grad is not None and bias.grad == 0
    per_image, per_text = ClipLoss().get_logits(image, text, 2.0, torch.tensor(1.0))
    assert torch.allclose(per_image, 2 * image @ text.T + 1) and torch.equal(per_text, per_image.T)
    labels = ClipLoss(local_loss=True, rank=2, world_size=3).get_ground_truth(torch.device("cpu"), 4)
    assert labels.tolist() == [8, 9, 10, 11]


def test_clip_loss_signature_and_errors() -> None:
    assert list(inspect.signature(ClipLoss).parameters) == [
        "local_loss", "gather_with_grad", "cache_labels", "rank", "world_size", "use_horovod",
    ]  # fmt: skip
    assert list(inspect.signature(ClipLoss().forward).parameters) == [
        "image_features", "text_features", "logit_scale", "logit_bias", "output_dict",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="Horovod"):
        ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="torchrun"):
        ClipLoss(rank=0, world_size=2)(features(3, 1), features(3, 2), 1.0)


def plain_hard_negative(q: Tensor, pos: Tensor, neg: Tensor | None, scale: float = 20.0) -> Tensor:
    docs = pos if neg is None else torch.cat([pos, neg])
    scores = scale * F.normalize(q, dim=-1) @ F.normalize(docs, dim=-1).T
    return F.cross_entropy(scores, torch.arange(len(q)))


def check_hard_negatives(rank: int, world: int) -> None:
    # uneven: rank 0 has three queries and five negatives, rank 1 has two and one
    queries, negatives = [slice(0, 3), slice(3, 5)][rank], [slice(0, 5), slice(5, 6)][rank]
    full = [3 * features(n, k) for n, k in ((5, 1), (5, 2), (6, 3))]
    whole = [t.clone().requires_grad_() for t in full]
    want = plain_hard_negative(*whole)  # type: ignore[arg-type]
    want.backward()
    parts = [t[p].clone().requires_grad_() for t, p in zip(full, (queries, queries, negatives), strict=True)]
    loss = HardNegativeNLLLoss()(*parts)
    loss.backward()
    assert torch.allclose(loss, want)
    for got, true, part in zip(parts, whole, (queries, queries, negatives), strict=True):
        assert torch.allclose(got.grad / world, true.grad[part], atol=1e-12)  # type: ignore[operator, index]


@pytest.mark.dist
def test_hard_negatives_over_two_ranks() -> None:
    run_on_ranks(2, check_hard_negatives)


def test_hard_negatives_alone() -> None:
    q, pos, neg = 3 * features(5, 1), features(5, 2), features(7, 3)
    loss = HardNegativeNLLLoss(scale=30.0)
    assert torch.allclose(loss(q, pos, neg), plain_hard_negative(q, pos, neg, 30.0))
    assert torch.allclose(loss(q, pos), plain_hard_negative(q, pos, None, 30.0))
    assert torch.allclose(loss(q, pos, neg[:0]), loss(q, pos))
    dot = HardNegativeNLLLoss(2.0, similarity_fct=lambda a, b: a @ b.T)
    want = F.cross_entropy(2 * q @ torch.cat([pos, neg]).T, torch.arange(5))
    assert torch.allclose(dot(q, pos, neg), want)
