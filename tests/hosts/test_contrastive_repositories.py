"""LLM2CLIP's, Inf-CLIP's and LLM2Vec's own losses, their files loaded as they are, beside ours in their places.

LLM2CLIP and Inf-CLIP are no packages: their tests run where their folders (`LLM2CLIP/llm2clip` and `Inf-CLIP`) are on
PYTHONPATH. `inf_cl`'s kernels need a GPU; its ring, which has the same values, does not.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llm2clip import losses
from tests.gloo import run_on_ranks
from tests.hosts.host_files import host_file, host_package

EVA_CLIP = "LLM2CLIP's folder llm2clip is not on PYTHONPATH"
INF_CLIP = "Inf-CLIP's folder is not on PYTHONPATH"
INF_CL = "inf-cl is not installed"
LLM2VEC = "llm2vec is not installed"


def unit(rows: int, seed: int, dim: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, dtype=torch.float64, generator=generator), dim=1).to(dtype)


def pairs(rows: int) -> tuple[Tensor, Tensor]:
    """Images and texts, some of which find each other and some do not."""
    image = unit(rows, 1)
    return image, F.normalize(image + 0.8 * unit(rows, 2), dim=1)


def takes_the_same(ours: Any, original: Any, extra: tuple[str, ...] = ()) -> None:
    """Whatever the original accepts, by position or name, with the same defaults."""
    wanted, found = inspect.signature(original).parameters, inspect.signature(ours).parameters
    assert list(found)[: len(wanted)] == list(wanted) and tuple(found)[len(wanted) :] == extra
    for name, parameter in wanted.items():
        assert found[name].default == parameter.default, name


def test_signatures_of_llm2clip() -> None:
    original = host_file("eva_clip", "loss.py", EVA_CLIP).ClipLoss
    takes_the_same(losses.LLM2CLIPLoss, original)
    takes_the_same(losses.LLM2CLIPLoss().forward, original().forward)


def check_llm2clip(rank: int, world: int) -> None:
    original = host_file("eva_clip", "loss.py", EVA_CLIP).ClipLoss
    image, text = (t[4 * rank :][:4] for t in pairs(4 * world))
    for local, with_grad, smoothing in itertools.product((False, True), (False, True), (0.0, 0.1)):
        results = []
        for kind in (original, losses.LLM2CLIPLoss):
            leaves = [t.clone().requires_grad_() for t in (image, text, torch.tensor(7.0).double())]
            module = kind(
                local, with_grad, cache_labels=True, rank=rank, world_size=world, smoothing=smoothing
            )
            loss, found = module(*leaves)
            (1.3 * loss).backward()
            scale_grad = leaves[2].grad
            if world > 1:
                dist.all_reduce(scale_grad)
            grads = [leaves[0].grad, leaves[1].grad, scale_grad]
            results.append([loss.detach(), *grads, found["i2t"], found["t2i"]])
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(
                got, want.to(got.dtype), rtol=1e-9, atol=1e-9, msg=f"{local} {with_grad}"
            )


def test_llm2clip_alone() -> None:
    check_llm2clip(0, 1)


@pytest.mark.dist
def test_llm2clip_over_two_ranks() -> None:
    host_file("eva_clip", "loss.py", EVA_CLIP)
    run_on_ranks(2, check_llm2clip)


def test_signatures_of_inf_cl() -> None:
    inf_cl = pytest.importorskip("inf_cl", reason=INF_CL)
    for name in ("cal_flash_loss", "cal_ring_loss", "cal_inf_loss"):
        takes_the_same(getattr(losses, name), getattr(inf_cl, name))


def check_inf_cl(rank: int, world: int) -> None:
    """The ring of inf_cl, on processors as it is on GPUs; it computes in fp32."""
    import inf_cl

    q, k = (t.float()[4 * rank :][:4] for t in pairs(4 * world))
    for labels in (None, torch.tensor([2, 0, 3, 1])):
        results = []
        for function in (inf_cl.cal_ring_loss, losses.cal_ring_loss, losses.cal_inf_loss):
            leaves = [t.clone().requires_grad_() for t in (q, k, torch.tensor(9.0))]
            loss = function(leaves[0], leaves[1], labels=labels, scale=leaves[2], head_dim=4)
            loss.backward()
            results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
        for other in results[1:]:
            for want, got in zip(results[0], other, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.dist
def test_inf_cl_over_two_ranks() -> None:
    pytest.importorskip("inf_cl", reason=INF_CL)
    run_on_ranks(2, check_inf_cl)


def check_inf_clip(rank: int, world: int) -> None:
    """Inf-CLIP's own modules, with the functions that they import swapped for ours."""
    image, text = (t.float()[4 * rank :][:4] for t in pairs(4 * world))
    results = []
    for swapped in (False, True):
        module = host_file("inf_clip", "models/loss.py", INF_CLIP)
        if swapped:
            for name in ("cal_flash_loss", "cal_ring_loss", "cal_inf_loss"):
                setattr(module, name, getattr(losses, name))
        # both have the same values; the one that needs a GPU runs on processors with our function
        kind = module.InfClipLoss if swapped else module.RingClipLoss
        leaves = {
            "image_features": F.pad(image, (0, 256 - image.shape[1])).requires_grad_(),
            "text_features": F.pad(text, (0, 256 - text.shape[1])).requires_grad_(),
            "logit_scale": torch.tensor(9.0, requires_grad=True),
        }
        found = kind(rank=rank, world_size=world)(**leaves)
        found["contrastive_loss"].backward()
        results.append([*found.values(), *(leaf.grad for leaf in leaves.values())])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.dist
def test_inf_clip_over_two_ranks() -> None:
    pytest.importorskip("inf_cl", reason=INF_CL)
    host_file("inf_clip", "models/loss.py", INF_CLIP)
    run_on_ranks(2, check_inf_clip)


def test_llm2vec() -> None:
    """Signature, value and gradients, in each number of hard negatives; over ranks the original asks for CUDA."""
    original = host_package("llm2vec", "loss", LLM2VEC).HardNegativeNLLLoss
    ours = losses.HardNegativeNLLLoss
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(original).parameters)
    takes_the_same(ours.__call__, original.__call__)
    assert ours().scale == original().scale == 20.0
    for count in (0, 5, 9):
        results = []
        for kind in (original, ours):
            leaves = [
                t.clone().requires_grad_() for t in (3 * unit(5, 1), unit(5, 2), unit(max(count, 1), 3))
            ]
            loss = kind(scale=50.0)(*(leaves if count else leaves[:2]))
            loss.backward()
            results.append([loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
        assert len(results[0]) == (4 if count else 3)
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
