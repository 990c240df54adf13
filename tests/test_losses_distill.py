"""DistillClipLoss, CoCaLoss and distill_loss against plain definitions, alone and over ranks."""

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

from llm2clip.losses import ClipLoss, CoCaLoss, DistillClipLoss  # noqa: E402
from llm2clip_kernels import distill_loss, native  # noqa: E402

SIZES = [3, 5, 2]
TEACHER_SCALE = 11.0


def features(rows: int, seed: int, dim: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, dtype=torch.float64, generator=generator), dim=1)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def teacher(rows: int) -> tuple[Tensor, Tensor]:
    return features(rows, 3, dim=4), features(rows, 4, dim=4)


def cross_entropy(of_teacher: Tensor, of_student: Tensor) -> Tensor:
    return -(of_teacher.softmax(1) * of_student.log_softmax(1)).sum(1)


def plain(x: Tensor, y: Tensor, scale: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Per-pair losses of one process with the whole batch."""
    student, taught = scale * x @ y.T, TEACHER_SCALE * p @ q.T
    target = torch.arange(len(x))
    contrastive = F.cross_entropy(student, target, reduction="none") + F.cross_entropy(
        student.T, target, reduction="none"
    )
    return 0.5 * contrastive, 0.5 * (cross_entropy(taught, student) + cross_entropy(taught.T, student.T))


def gathered(t: Tensor, with_grad: bool, keep_own: bool) -> Tensor:
    """Everybody's rows; what other ranks' rows are to this rank's gradient is the point of the flags."""
    if with_grad:
        return torch.cat(torch.distributed.nn.all_gather(t))
    every = [torch.zeros_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(every, t.detach())
    if keep_own:
        every[dist.get_rank()] = t
    return torch.cat(every)


def plain_over_ranks(
    image: Tensor, text: Tensor, scale: Tensor, p: Tensor, q: Tensor, local: bool, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """open_clip's definition of both losses, for ranks with equally many rows."""
    pairs = []
    for a, b, factor in ((image, text, scale), (p, q, TEACHER_SCALE)):
        every_a, every_b = (gathered(t, with_grad, keep_own=not local) for t in (a, b))
        if local:
            pairs.append((factor * a @ every_b.T, factor * b @ every_a.T))
        else:
            pairs.append((factor * every_a @ every_b.T, factor * every_b @ every_a.T))
    (per_image, per_text), (taught_image, taught_text) = pairs
    target = torch.arange(len(per_image)) + (len(image) * dist.get_rank() if local else 0)
    contrastive = 0.5 * (F.cross_entropy(per_image, target) + F.cross_entropy(per_text, target))
    by_image, by_text = cross_entropy(taught_image, per_image), cross_entropy(taught_text, per_text)
    return contrastive, 0.5 * (by_image.mean() + by_text.mean())


def check_flags(rank: int, world: int) -> None:
    mine = slice(4 * rank, 4 * rank + 4)
    image, text = features(4 * world, 1), features(4 * world, 2)
    p, q = teacher(4 * world)
    whole = leaves(image, text)
    sum(DistillClipLoss()(*whole, 7.0, p, q, TEACHER_SCALE)).backward()  # type: ignore[union-attr]
    true = whole[0].grad[mine]  # type: ignore[index]
    for local in (False, True):
        for with_grad in (False, True):
            results = []
            for is_ours in (False, True):
                inputs = leaves(image[mine], text[mine], torch.tensor(7.0).double())
                if is_ours:
                    module = DistillClipLoss(local, with_grad, rank=rank, world_size=world)
                    losses = module(*inputs, p[mine], q[mine], TEACHER_SCALE)
                else:
                    losses = plain_over_ranks(*inputs, p[mine], q[mine], local, with_grad)
                (1.3 * losses[0] + 0.4 * losses[1]).backward()
                scale_grad = inputs[2].grad
                dist.all_reduce(scale_grad)
                results.append(
                    [losses[0].detach(), losses[1].detach(), inputs[0].grad, inputs[1].grad, scale_grad]
                )
            for want, got in zip(*results, strict=True):
                assert torch.allclose(want, got, atol=1e-12), (local, with_grad)
            # the table of ClipLoss, for the sum of both: after DDP's division by the number of ranks
            inputs = leaves(image[mine], text[mine])
            module = DistillClipLoss(local, with_grad, rank=rank, world_size=world)
            sum(module(*inputs, 7.0, p[mine], q[mine], TEACHER_SCALE)).backward()  # type: ignore[union-attr]
            after_ddp = inputs[0].grad / world  # type: ignore[operator]
            if with_grad:
                assert torch.allclose(after_ddp, true)
            elif not local:
                assert torch.allclose(after_ddp, true / world)
            else:
                assert not torch.allclose(after_ddp, true / world, rtol=1e-2)


@pytest.mark.dist
def test_flags_over_two_ranks() -> None:
    run_on_ranks(2, check_flags)


def check_against_one_process(rank: int, world: int) -> None:
    members = SIZES[:world]
    total, start = sum(members), sum(members[:rank])
    mine = slice(start, start + members[rank])
    x, y, scale = features(total, 1), features(total, 2), torch.tensor(9.0).double()
    p, q = teacher(total)
    uneven = torch.linspace(0.5, 2.0, total, dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        weight = uneven if reduction == "none" else torch.ones(total, dtype=torch.float64)
        weight = weight / total if reduction == "mean" else weight
        full = leaves(x, y, scale)
        oracle = [(weight * t).sum() for t in plain(*full, p, q)]  # type: ignore[call-arg, arg-type, misc]
        (1.5 * oracle[0] - 0.7 * oracle[1]).backward()
        for convention, factor in (("sum", 1), ("ddp_mean", world)):
            a, b, s = leaves(x[mine], y[mine], scale)
            losses = distill_loss(
                a, b, s, p[mine], q[mine], TEACHER_SCALE, reduction=reduction, gather=True,
                grad_reduction=convention,
            )  # type: ignore[arg-type]  # fmt: skip
            if reduction == "none":
                assert losses[0].shape == losses[1].shape == (members[rank],)
                losses = tuple((t * weight[mine]).sum() for t in losses)  # type: ignore[assignment]
            else:
                assert torch.allclose(losses[0], oracle[0]) and torch.allclose(losses[1], oracle[1])
            (1.5 * losses[0] - 0.7 * losses[1]).backward()
            shared = s.grad.clone()  # type: ignore[union-attr]
            dist.all_reduce(shared)
            for got, want in (
                (a.grad, full[0].grad[mine]),
                (b.grad, full[1].grad[mine]),
                (shared, full[2].grad),
            ):  # type: ignore[index]
                assert torch.allclose(got / factor, want, atol=1e-12), (convention, reduction)  # type: ignore[operator, arg-type]


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2, 3])
def test_uneven_ranks_equal_one_process(world: int) -> None:
    run_on_ranks(world, check_against_one_process)


def check_subgroup(rank: int, world: int) -> None:
    group = dist.new_group([0, 2])
    if rank == 1:
        return
    x, y, (p, q) = features(4, 1), features(4, 2), teacher(4)
    mine = slice(0, 2) if rank == 0 else slice(2, 4)
    a, b = leaves(x[mine], y[mine])
    sum(distill_loss(a, b, 5.0, p[mine], q[mine], 8.0, group=group, grad_reduction="sum")).backward()  # type: ignore[union-attr]
    full = leaves(x, y)
    sum(distill_loss(*full, 5.0, p, q, 8.0)).backward()  # type: ignore[union-attr, misc, arg-type]
    assert torch.allclose(a.grad, full[0].grad[mine]) and torch.allclose(b.grad, full[1].grad[mine])  # type: ignore[arg-type, index]


def check_far_apart_sums(rank: int, world: int) -> None:
    """Ranks whose sums of the teacher's columns differ by hundreds of nats."""
    x = torch.eye(4, dtype=torch.float64)
    mine = slice(2 * rank, 2 * rank + 2)
    losses = distill_loss(*leaves(x[mine]), x[mine], 900.0, x[mine], x[mine], 800.0, gather=True)  # type: ignore[arg-type, misc]
    assert all(loss.isfinite() and loss.abs() < 1e-12 for loss in losses)


def exact_features(rows: int, seed: int) -> Tensor:
    """Features whose products, 10000 and a few quarters, are exact in fp32."""
    generator = torch.Generator().manual_seed(seed)
    return F.pad(torch.randint(-2, 3, (rows, 3), generator=generator) / 2, (0, 1), value=100.0)


def check_large_logits_in_fp32(rank: int, world: int) -> None:
    """An fp32 log-sum-exp or average of such logits is off by 5e-4; losses over ranks are not."""
    x, y, p, q = (exact_features(10, seed) for seed in (1, 2, 3, 4))
    mine = [slice(0, 6), slice(6, 10)][rank]
    want = distill_loss(x.double(), y.double(), 1.0, p.double(), q.double(), 0.5, reduction="none")
    got = distill_loss(
        x[mine], y[mine], 1.0, p[mine], q[mine], 0.5, reduction="none", gather=True, grad_reduction="sum"
    )
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g.double(), w[mine], atol=1e-5, rtol=0), (g - w[mine]).abs().max()


@pytest.mark.dist
@pytest.mark.skipif(not native.available(), reason="the native library is not built")
def test_large_logits_over_two_ranks() -> None:
    run_on_ranks(2, check_large_logits_in_fp32)


@pytest.mark.dist
def test_a_group_that_is_not_everybody() -> None:
    run_on_ranks(3, check_subgroup)


@pytest.mark.dist
def test_merging_sums_far_apart() -> None:
    run_on_ranks(2, check_far_apart_sums)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_distill_loss_alone(reduction: Any) -> None:
    x, y, (p, q) = features(9, 1), features(9, 2), teacher(9)
    want = plain(x, y, torch.tensor(13.0).double(), p, q)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        a, b, c, d = (t.to(dtype) for t in (x, y, p, q))
        got = distill_loss(a, b, 13.0, c, d, TEACHER_SCALE, reduction=reduction)
        for g, w in zip(got, want, strict=True):
            assert g.dtype == dtype
            true = {"mean": w.mean(), "sum": w.sum(), "none": w}[reduction]
            assert torch.allclose(g.double(), true, atol=limit, rtol=limit)


def test_distill_loss_bad_input() -> None:
    x, p = features(4, 1), features(4, 3, dim=3)
    with pytest.raises(ValueError, match="pair up"):
        distill_loss(x, x[:3], 1.0, p, p[:3], 1.0)
    with pytest.raises(ValueError, match="x's rows"):
        distill_loss(x, x, 1.0, p[:3], p, 1.0)
    with pytest.raises(ValueError, match="q must have y's rows"):
        distill_loss(x, x, 1.0, p, p[:3], 1.0)
    with pytest.raises(ValueError, match="reduction"):
        distill_loss(x, x, 1.0, p, p, 1.0, reduction="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grad_reduction"):
        distill_loss(x, x, 1.0, p, p, 1.0, grad_reduction="mean")  # type: ignore[arg-type]


def test_distill_clip_loss_alone() -> None:
    image, text, (p, q) = features(9, 1), features(9, 2), teacher(9)
    scale = torch.tensor(14.3, requires_grad=True)
    out = DistillClipLoss()(
        image_features=image,
        text_features=text,
        logit_scale=scale,
        dist_image_features=p,
        dist_text_features=q,
        dist_logit_scale=torch.tensor(TEACHER_SCALE),
        output_dict=True,
    )
    want = [t.mean() for t in plain(image, text, torch.tensor(14.3).double(), p, q)]
    assert list(out) == ["contrastive_loss", "distill_loss"]
    assert torch.allclose(out["contrastive_loss"], want[0]) and torch.allclose(out["distill_loss"], want[1])
    both = DistillClipLoss()(image, text, scale, p, q, TEACHER_SCALE)
    assert isinstance(both, tuple) and torch.equal(both[1], out["distill_loss"])
    assert torch.allclose(both[0], ClipLoss()(image, text, scale))
    inspected = DistillClipLoss().dist_loss(TEACHER_SCALE * p @ q.T, 14.3 * image @ text.T)
    by_text = DistillClipLoss().dist_loss(TEACHER_SCALE * q @ p.T, 14.3 * text @ image.T)
    assert torch.allclose(0.5 * (inspected + by_text), want[1])


def coca_inputs(rows: int = 6) -> list[Tensor]:
    logits = torch.randn(rows, 5, 11)
    labels = torch.randint(0, 11, (rows, 5))
    labels[0, 2:] = 0
    return [features(rows, 1).float(), features(rows, 2).float(), logits, labels, torch.tensor(12.0)]


@pytest.mark.parametrize("pad_id", [0, 7])
def test_coca_loss(pad_id: int) -> None:
    inputs = coca_inputs()
    image, text, logits, labels, scale = inputs
    leaf = logits.clone().requires_grad_()
    clip, caption = CoCaLoss(2.0, 0.5, pad_id=pad_id)(image, text, leaf, labels, scale)
    target = torch.arange(6)
    per_image = scale * image @ text.T
    want_clip = 0.25 * (F.cross_entropy(per_image, target) + F.cross_entropy(per_image.T, target))
    kept = labels.flatten() != pad_id
    assert kept.any() and not kept.all()
    want_caption = 2.0 * F.cross_entropy(logits.flatten(0, 1)[kept], labels.flatten()[kept])
    assert torch.allclose(clip, want_clip, atol=1e-6) and torch.allclose(caption, want_caption, atol=1e-6)
    (clip + caption).backward()
    assert leaf.grad is not None and (leaf.grad.flatten(0, 1)[~kept] == 0).all()
    named = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=0.5, pad_id=pad_id)(
        image_features=image,
        text_features=text,
        logits=logits,
        labels=labels,
        logit_scale=scale,
        output_dict=True,
    )
    assert list(named) == ["contrastive_loss", "caption_loss"]
    assert torch.equal(named["contrastive_loss"], clip) and torch.equal(named["caption_loss"], caption)
    nothing, same = CoCaLoss(2.0, 0, pad_id=pad_id)(image * torch.nan, text, logits, labels, scale)
    assert nothing == 0 and torch.equal(same, caption)


def check_coca(rank: int, world: int) -> None:
    torch.manual_seed(rank)
    logits, labels = torch.randn(4, 3, 5).double(), torch.randint(1, 5, (4, 3))
    mine = slice(4 * rank, 4 * rank + 4)
    scale = torch.tensor(7.0).double()
    for local, with_grad in ((False, False), (True, True)):
        ours, clip = (leaves(features(4 * world, 1)[mine], features(4 * world, 2)[mine]) for _ in range(2))
        flags: dict[str, Any] = {
            "local_loss": local,
            "gather_with_grad": with_grad,
            "rank": rank,
            "world_size": world,
        }
        losses = CoCaLoss(1.0, 3.0, **flags)(*ours, logits, labels, scale)
        plain_loss = 3.0 * ClipLoss(**flags)(*clip, scale)
        assert torch.allclose(losses[0], plain_loss)
        assert torch.allclose(losses[1], F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
        losses[0].backward()
        plain_loss.backward()
        for got, want in zip(ours, clip, strict=True):
            assert torch.allclose(got.grad, want.grad)  # type: ignore[arg-type]


@pytest.mark.dist
def test_coca_over_two_ranks() -> None:
    run_on_ranks(2, check_coca)


def test_signatures_and_errors() -> None:
    constructor = ["local_loss", "gather_with_grad", "cache_labels", "rank", "world_size", "use_horovod"]
    assert list(inspect.signature(DistillClipLoss).parameters) == constructor
    assert list(inspect.signature(CoCaLoss).parameters) == [
        "caption_loss_weight", "clip_loss_weight", "pad_id", *constructor,
    ]  # fmt: skip
    assert list(inspect.signature(DistillClipLoss().forward).parameters) == [
        "image_features", "text_features", "logit_scale", "dist_image_features", "dist_text_features",
        "dist_logit_scale", "output_dict",
    ]  # fmt: skip
    assert list(inspect.signature(CoCaLoss(1.0, 1.0).forward).parameters) == [
        "image_features", "text_features", "logits", "labels", "logit_scale", "output_dict",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="Horovod"):
        DistillClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="DistillClipLoss.*torchrun"):
        x, p = features(3, 1), features(3, 3)
        DistillClipLoss(rank=0, world_size=2)(x, x, 1.0, p, p, 1.0)


def gradients_of(module: Any, inputs: list[Tensor], floats: tuple[int, ...]) -> list[Tensor]:
    used = [t.clone().requires_grad_() if i in floats else t for i, t in enumerate(inputs)]
    losses = module(*used)
    (1.3 * losses[0] + 0.4 * losses[1]).backward()
    return [losses[0].detach(), losses[1].detach(), *(used[i].grad for i in floats)]  # type: ignore[list-item]


def test_as_the_installed_open_clip() -> None:
    open_clip_loss = pytest.importorskip("open_clip.loss", reason="open_clip is not installed")
    p, q = teacher(6)
    distill = [features(6, 1), features(6, 2), torch.tensor(9.0).double(), p, q, torch.tensor(8.0).double()]
    coca = coca_inputs()
    cases: list[tuple[type, type, tuple[Any, ...], list[Tensor], tuple[int, ...]]] = [
        (DistillClipLoss, open_clip_loss.DistillClipLoss, (), distill, (0, 1, 2)),
        (CoCaLoss, open_clip_loss.CoCaLoss, (2.0, 0.5, 7), coca, (0, 1, 2, 4)),
    ]
    for our_class, their_class, args, inputs, floats in cases:
        theirs = inspect.signature(their_class).parameters
        assert list(inspect.signature(our_class).parameters)[: len(theirs)] == list(theirs)
        assert list(inspect.signature(our_class.forward).parameters) == list(
            inspect.signature(their_class.forward).parameters
        )
        got = gradients_of(our_class(*args), inputs, floats)
        want = gradients_of(their_class(*args), inputs, floats)
        for g, w in zip(got, want, strict=True):
            assert torch.allclose(g, w.to(g.dtype), atol=1e-6)
        named = our_class(*args)(*inputs, output_dict=True)
        assert list(named) == list(their_class(*args)(*inputs, output_dict=True))
