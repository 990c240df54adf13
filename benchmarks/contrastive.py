"""The symmetric contrastive loss as everyone computes it: our providers, the peers, inputs, and the truth in fp64.

A provider turns a `Case` into a step: leaves [x (N, D), y (N, D), scale ()] -> [loss, dx, dy, dscale], where
dscale is None for those whose scale is a constant. All compute

    loss = mean_i [(row_lse_i + col_lse_i) / 2 - S_ii],   S = scale · x yᵀ.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.providers import Provider, Registry, relative_error
from llm2clip_kernels import infonce_loss

SCALE = 1 / 0.07
Leaves = list[Tensor]
Step = Callable[[Leaves], Sequence[Tensor | None]]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One shape to measure: N pairs of D features, dtype by name, "random" or "trained" inputs, device by name."""

    n: int
    d: int
    dtype: str = "float32"
    kind: str = "random"
    device: str = "cpu"


def inputs(case: Case) -> Leaves:
    """x, y (n, d) unit norm and the scale, as leaves; "trained": correlated positives, a shared mean."""
    generator = torch.Generator(case.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device)

    x, y = normal(case.n, case.d), normal(case.n, case.d)
    if case.kind == "trained":
        y = x + y + 0.5 * normal(1, case.d)
    pair = [F.normalize(t, dim=1).to(getattr(torch, case.dtype)).requires_grad_() for t in (x, y)]
    return [*pair, torch.tensor(SCALE, device=case.device, requires_grad=True)]


def exact(x: Tensor, y: Tensor, scale: float, rows: int = 1024) -> list[Tensor]:
    """Loss, dx, dy and dscale in fp64, from the definition, by stripes of `rows` rows: O(rows · N) memory."""
    x, y = x.detach().double(), y.detach().double()
    n = len(x)
    row = x.new_empty(n)
    col = x.new_full((n,), -torch.inf)
    for start in range(0, n, rows):
        logits = scale * x[start : start + rows] @ y.T
        row[start : start + rows] = logits.logsumexp(1)
        col = torch.logaddexp(col, logits.logsumexp(0))
    dots = (x * y).sum(1)
    loss = (0.5 * (row + col) - scale * dots).mean()
    dx, dy, dscale = torch.empty_like(x), torch.zeros_like(y), -dots.mean()
    for start in range(0, n, rows):
        mine = x[start : start + rows]
        cosines = mine @ y.T
        weights = (scale * cosines - row[start : start + rows, None]).exp() + (scale * cosines - col).exp()
        weights /= 2 * n
        dscale += (weights * cosines).sum()
        weights.diagonal(start).sub_(1 / n)
        dx[start : start + rows] = scale * weights @ y
        dy += scale * weights.T @ mine
    return [loss, dx, dy, dscale]


def errors(got: Sequence[Tensor | None], want: Sequence[Tensor]) -> dict[str, float]:
    """Errors of a step against `exact`.

    "loss" is relative, or absolute below 1; "gradients" the larger relative error of dx and dy; "scale" absolute
    (dscale is a mean of differences of cosines), left out where the provider's scale is a constant.
    """
    loss, dx, dy, dscale = got
    assert loss is not None and dx is not None and dy is not None
    found = {
        "loss": abs(float(loss) - float(want[0])) / max(1.0, abs(float(want[0]))),
        # max() would drop a NaN that comes second
        "gradients": float(
            torch.tensor(
                [relative_error(dx, want[1]), relative_error(dy, want[2])], dtype=torch.float64
            ).amax()
        ),
    }
    if dscale is not None:
        found["scale"] = abs(float(dscale) - float(want[3]))
    return found


def _by_autograd(loss: Loss) -> Step:
    def step(leaves: Leaves) -> list[Tensor | None]:
        for leaf in leaves:
            leaf.grad = None
        value = loss(leaves[0], leaves[1], leaves[2])
        value.backward()
        return [value.detach(), *(leaf.grad for leaf in leaves)]

    return step


def eager_loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Two matmuls and two cross-entropies in fp32, both N×N matrices kept for the backward."""
    target = torch.arange(len(x), device=x.device)
    per_x, per_y = scale * x @ y.T, scale * y @ x.T
    return 0.5 * (F.cross_entropy(per_x.float(), target) + F.cross_entropy(per_y.float(), target))


@functools.cache
def _compiled(case: Case) -> Step:
    # compiled for this shape alone; past its limit of shapes per function torch would quietly run it eagerly
    torch.compiler.reset()
    return _by_autograd(torch.compile(eager_loss, dynamic=False))


def _open_clip(case: Case) -> Step:
    from open_clip.loss import ClipLoss

    loss = ClipLoss()

    def run(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        # as its trainer calls it: half precision through autocast, cross-entropy in fp32
        with torch.autocast(x.device.type, dtype=x.dtype, enabled=x.dtype != torch.float32):
            return loss(x, y, scale)

    return _by_autograd(run)


def _ours(method: Any) -> Callable[[Case], Step]:
    return lambda case: _by_autograd(lambda x, y, scale: infonce_loss(x, y, scale, method=method))


@contextmanager
def _forced_backend(name: str) -> Iterator[None]:
    before = os.environ.get("LLM2CLIP_BACKEND")
    os.environ["LLM2CLIP_BACKEND"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["LLM2CLIP_BACKEND"]
        else:
            os.environ["LLM2CLIP_BACKEND"] = before


def _chunked(case: Case) -> Step:
    inner = _by_autograd(lambda x, y, scale: infonce_loss(x, y, scale, method="recompute"))

    def step(leaves: Leaves) -> Sequence[Tensor | None]:
        with _forced_backend("chunked"):
            return inner(leaves)

    return step


def _sentence_transformers(mini_batch: int) -> Callable[[Case], Step]:
    """The loss stage of CachedMultipleNegativesRankingLoss on both directions, each with its own softmax.

    With dot products instead of its default cosine: the features are of unit norm already, so that the default
    would only normalise again, in every chunk.
    """

    def make(case: Case) -> Step:
        from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
        from sentence_transformers.util import dot_score

        loss = CachedMultipleNegativesRankingLoss(
            # the model is asked for the kind of its first module and for nothing else
            torch.nn.Sequential(torch.nn.Identity()),
            scale=SCALE,
            similarity_fct=dot_score,
            mini_batch_size=mini_batch,
            directions=("query_to_doc", "doc_to_query"),
            partition_mode="per_direction",
        )

        def step(leaves: Leaves) -> list[Tensor | None]:
            # its leaves are the mini-batches that the model embedded
            reps = [[part.detach().requires_grad_() for part in t.split(mini_batch)] for t in leaves[:2]]
            value = loss.calculate_loss(reps, with_backward=True)
            dx, dy = (torch.cat([part.grad for part in column]) for column in reps)
            return [value.detach(), dx, dy, None]

        return step

    return make


def _inf_cl(case: Case) -> Step:
    from inf_cl import cal_inf_loss

    # heads of a power of two that divide D, as its kernel needs
    head = max(h for h in (16, 32, 64, 128, 256) if case.d % h == 0)

    def run(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        # scaled outside: its own scale argument needs a process group in the backward
        one = cal_inf_loss(scale * x, y, head_dim=head)
        return 0.5 * (one + cal_inf_loss(scale * y, x, head_dim=head))

    return _by_autograd(run)


def _cut_cross_entropy(filter_eps: str | None) -> Callable[[Case], Step]:
    def make(case: Case) -> Step:
        from cut_cross_entropy import linear_cross_entropy

        def run(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
            target = torch.arange(len(x), device=x.device)
            one = linear_cross_entropy((scale * x).to(x.dtype), y, target, filter_eps=filter_eps)
            two = linear_cross_entropy((scale * y).to(y.dtype), x, target, filter_eps=filter_eps)
            return 0.5 * (one + two)

        return _by_autograd(run)

    return make


def _liger(case: Case) -> Step:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused

    def run(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        target = torch.arange(len(x), device=x.device)
        one = fused((scale * x).to(x.dtype), y, target)
        two = fused((scale * y).to(y.dtype), x, target)
        return 0.5 * (one + two)

    return _by_autograd(run)


MINI_BATCHES = (32, 128, 512, 1024, 2048, 4096)

PROVIDERS = Registry()
for _provider in (
    Provider("eager", lambda case: _by_autograd(eager_loss)),
    Provider("compile", _compiled),
    Provider("open_clip", _open_clip, needs=("open_clip",)),
    *(
        Provider(f"sbert_{size}", _sentence_transformers(size), needs=("sentence_transformers",))
        for size in MINI_BATCHES
    ),
    Provider("inf_cl", _inf_cl, needs=("inf_cl",), cuda_only=True),
    Provider("cce", _cut_cross_entropy(None), needs=("cut_cross_entropy",), cuda_only=True),
    Provider("cce_filtered", _cut_cross_entropy("high"), needs=("cut_cross_entropy",), cuda_only=True),
    Provider("liger", _liger, needs=("liger_kernel",), cuda_only=True),
    Provider("chunked", _chunked, ours=True),
    Provider("recompute", _ours("recompute"), ours=True),
    Provider("cached", _ours("cached"), ours=True),
    Provider("auto", _ours("auto"), ours=True),
):
    PROVIDERS.add(_provider)
