"""LLM2CLIP's own loss against a plain definition: value, gradients and accuracies, alone and over two ranks."""

from __future__ import annotations

import inspect
import itertools
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

from llm2clip.losses import LLM2CLIPLoss  # noqa: E402


def features(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 6, dtype=torch.float64, generator=generator), dim=1)


def pairs(rows: int) -> tuple[Tensor, Tensor]:
    """Images and texts, some of which find each other and some do not."""
    image = features(rows, 1)
    return image, F.normalize(image + 0.8 * features(rows, 2), dim=1)


def smoothed(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy with label smoothing written out as timm has it."""
    log_probability = F.log_softmax(logits, dim=-1)
    right = -log_probability.gather(1, target[:, None])[:, 0]
    return ((1 - smoothing) * right - smoothing * log_probability.mean(-1)).mean()


def gathered(t: Tensor, with_grad: bool, keep_own: bool) -> Tensor:
    if with_grad:
        return torch.cat(torch.distributed.nn.all_gather(t))
    every = [torch.zeros_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(every, t.detach())
    if keep_own:
        every[dist.get_rank()] = t
    return torch.cat(every)


def plain(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    smoothing: float,
    local: bool = False,
    with_grad: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss as LLM2CLIP's trainer defines it, with whole logits."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    target = torch.arange(len(image))
    if world == 1:
        per_image = scale * image @ text.T
        per_text = per_image.T
    else:
        every_image, every_text = (gathered(t, with_grad, not local) for t in (image, text))
        if local:
            per_image, per_text = scale * image @ every_text.T, scale * text @ every_image.T
            target = target + len(image) * dist.get_rank()
        else:
            per_image = scale * every_image @ every_text.T
            per_text, target = per_image.T, torch.arange(len(every_image))
    loss = 0.5 * (smoothed(per_image, target, smoothing) + smoothed(per_text, target, smoothing))
    found = [(logits.argmax(-1) == target).float().mean() for logits in (per_image, per_text)]
    return loss, {"i2t": found[0], "t2i": found[1]}


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_alone(smoothing: float) -> None:
    results = []
    for ours in (False, True):
        inputs = [t.clone().requires_grad_() for t in (*pairs(23), torch.tensor(7.0).double())]
        if ours:
            loss, found = LLM2CLIPLoss(smoothing=smoothing)(*inputs)
        else:
            loss, found = plain(*inputs, smoothing)  # type: ignore[call-arg]
        (1.3 * loss).backward()
        results.append([loss.detach(), *(t.grad for t in inputs), found["i2t"], found["t2i"]])
    for want, got in zip(*results, strict=True):
        assert torch.allclose(want, got.to(want.dtype), atol=1e-12)  # type: ignore[union-attr]
    assert 0 < results[0][-1] < 1, "the case must have hits and misses"  # type: ignore[operator]


def test_smoothing_is_torchs() -> None:
    logits, target = torch.randn(5, 9), torch.tensor([3, 0, 8, 8, 1])
    assert torch.allclose(smoothed(logits, target, 0.2), F.cross_entropy(logits, target, label_smoothing=0.2))


def check_flags(rank: int, world: int) -> None:
    image, text = (t[4 * rank :][:4] for t in pairs(4 * world))
    for local, with_grad, smoothing in itertools.product((False, True), (False, True), (0.0, 0.2)):
        results = []
        for ours in (False, True):
            inputs = [t.detach().clone().requires_grad_() for t in (image, text, torch.tensor(7.0).double())]
            if ours:
                module = LLM2CLIPLoss(local, with_grad, rank=rank, world_size=world, smoothing=smoothing)
                loss, found = module(*inputs)
            else:
                loss, found = plain(*inputs, smoothing, local, with_grad)  # type: ignore[call-arg, arg-type, misc]
            (1.3 * loss).backward()
            scale_grad = inputs[2].grad
            dist.all_reduce(scale_grad)
            results.append(
                [loss.detach(), inputs[0].grad, inputs[1].grad, scale_grad, found["i2t"], found["t2i"]]
            )
        for want, got in zip(*results, strict=True):
            assert torch.allclose(want, got.to(want.dtype), atol=1e-12), (local, with_grad, smoothing)  # type: ignore[union-attr]


@pytest.mark.dist
def test_flags_over_two_ranks() -> None:
    run_on_ranks(2, check_flags)


def check_uneven(rank: int, world: int) -> None:
    """Unequal batches, which the original cannot have: the mean over all pairs, and all pairs' accuracy."""
    sizes = [5, 2, 4][:world]
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    image, text = pairs(sum(sizes))
    logits, target = 7.0 * image @ text.T, torch.arange(sum(sizes))
    want = 0.5 * (smoothed(logits, target, 0.1) + smoothed(logits.T, target, 0.1))
    loss, found = LLM2CLIPLoss(False, True, rank=rank, world_size=world, smoothing=0.1)(
        image[mine], text[mine], 7.0
    )
    assert torch.allclose(loss, want)
    assert torch.allclose(found["i2t"], (logits.argmax(1) == target).float().mean())
    assert torch.allclose(found["t2i"], (logits.argmax(0) == target).float().mean())


@pytest.mark.dist
def test_unequal_batches_over_three_ranks() -> None:
    run_on_ranks(3, check_uneven)


def test_signature_ties_and_errors() -> None:
    assert list(inspect.signature(LLM2CLIPLoss).parameters) == [
        "local_loss", "gather_with_grad", "cache_labels", "rank", "world_size", "use_horovod", "smoothing",
    ]  # fmt: skip
    forward = inspect.signature(LLM2CLIPLoss().forward).parameters
    assert list(forward) == ["image_features", "text_features", "logit_scale"]
    assert forward["logit_scale"].default == 1.0
    assert not list(LLM2CLIPLoss().parameters())
    same = torch.ones(8, 3)
    assert LLM2CLIPLoss()(same, same)[1]["i2t"].item() == pytest.approx(1 / 8)
    for bad, message in (({"smoothing": 1.5}, "smoothing"), ({"use_horovod": True}, "Horovod")):
        with pytest.raises(ValueError, match=message):
            LLM2CLIPLoss(**bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pair up"):
        LLM2CLIPLoss()(same, same[:4])
    with pytest.raises(ValueError, match="torchrun"):
        LLM2CLIPLoss(rank=0, world_size=2)(same, same)
