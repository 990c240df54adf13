"""Every op once, forward and backward, at small ragged shapes: what sanitizer, graph, stream and repeat checks run.

python -m benchmarks.proof.cases --device cuda       # all of them, once: what compute-sanitizer watches

A case makes its inputs once and returns a function that computes outputs and gradients from them, the same every
time it is called.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import llm2clip_kernels as kernels

Compute = Callable[[], list[Tensor]]
Make = Callable[[str, torch.dtype], Compute]

# "auto" leaves batches this small to plain torch
METHOD: Literal["recompute"] = "recompute"
# rows, columns, features: no multiple of a tile
M, N, D = 150, 203, 72


def features(rows: int, dim: int, device: str, dtype: torch.dtype, seed: int) -> Tensor:
    """(rows, dim) unit-norm random features that need a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator), dim=1).to(device, dtype).requires_grad_()


def with_gradients(function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor]) -> Compute:
    """Returns a function that computes the outputs and, of their weighted sum, the gradients of all inputs."""

    def compute() -> list[Tensor]:
        found = function(*inputs)
        outputs = [found] if isinstance(found, Tensor) else list(found)
        # unequal weights: a sum of log-sum-exps alone would hide a gradient that lands in the wrong row
        total = sum(
            (o.float() * torch.linspace(0.5, 1.5, o.numel(), device=o.device).view(o.shape)).sum()
            for o in outputs
            if o.is_floating_point()
        )
        assert isinstance(total, Tensor)
        return [o.detach() for o in outputs] + list(torch.autograd.grad(total, inputs))

    return compute


def scalar(value: float, device: str) -> Tensor:
    return torch.tensor(value, device=device, requires_grad=True)


def _lse(x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return kernels.similarity_lse(x, y, scale, method=METHOD)


def _similarity_lse(device: str, dtype: torch.dtype) -> Compute:
    pair = [features(M, D, device, dtype, 0), features(N, D, device, dtype, 1)]
    return with_gradients(_lse, [*pair, scalar(20.0, device)])


def _similarity_lse_online(device: str, dtype: torch.dtype) -> Compute:
    """Norms so large that the constant shift does not serve."""
    pair = [(30 * features(n, D, device, dtype, n)).detach().requires_grad_() for n in (M, N)]
    return with_gradients(_lse, [*pair, scalar(3.0, device)])


def _infonce(device: str, dtype: torch.dtype) -> Compute:
    pair = [features(M, D, device, dtype, 0), features(M, D, device, dtype, 1)]
    return with_gradients(
        lambda x, y, s: kernels.infonce_loss(x, y, s, label_smoothing=0.1, method=METHOD),
        [*pair, scalar(20.0, device)],
    )


def _nll(device: str, dtype: torch.dtype) -> Compute:
    x, y, negatives = (features(n, D, device, dtype, i) for i, n in enumerate((M, M, N)))
    return with_gradients(
        lambda x, y, z, s: kernels.nll_loss(x, y, z, s, method=METHOD),
        [x, y, negatives, scalar(20.0, device)],
    )


def _infonce_groups(device: str, dtype: torch.dtype) -> Compute:
    pair = [features(M, D, device, dtype, 0), features(M, D, device, dtype, 1)]
    groups = torch.arange(M, device=device) // 3
    return with_gradients(
        lambda x, y, s: kernels.infonce_loss(x, y, s, groups=groups, method=METHOD),
        [*pair, scalar(20.0, device)],
    )


def _sigmoid(device: str, dtype: torch.dtype) -> Compute:
    pair = [features(M, D, device, dtype, 0), features(M, D, device, dtype, 1)]
    return with_gradients(kernels.sigmoid_loss, [*pair, scalar(10.0, device), scalar(-10.0, device)])


def _distill(device: str, dtype: torch.dtype) -> Compute:
    pair = [features(M, D, device, dtype, 0), features(N, D, device, dtype, 1)]
    p, q = features(M, 40, device, dtype, 2).detach(), features(N, 40, device, dtype, 3).detach()

    def run(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        terms = kernels.similarity_distill(x, y, s, p, q, 30.0)
        assert terms.col_lse is not None and terms.cross_col is not None
        return terms.row_lse, terms.col_lse, terms.cross_row, terms.cross_col

    return with_gradients(run, [*pair, scalar(20.0, device)])


def _ranks(device: str, dtype: torch.dtype) -> Compute:
    x, y = features(M, D, device, dtype, 0).detach(), features(N, D, device, dtype, 1).detach()
    target = torch.arange(M, device=device)
    return lambda: list(kernels.similarity_rank(x, y, target))


def _topk(device: str, dtype: torch.dtype) -> Compute:
    x, y = features(M, D, device, dtype, 0).detach(), features(N, D, device, dtype, 1).detach()
    return lambda: list(kernels.similarity_topk(x, y, 10))


def _normalize(device: str, dtype: torch.dtype) -> Compute:
    return with_gradients(kernels.l2_normalize, [features(M, D, device, dtype, 0)])


def _lengths(device: str) -> Tensor:
    """Boundaries of packed sequences of 1, 30, 64 and 55 tokens: M in all."""
    return torch.tensor([0, 1, 31, 95, M], dtype=torch.int32, device=device)


def _segments(device: str, dtype: torch.dtype) -> Compute:
    ends = _lengths(device)
    return with_gradients(
        lambda hidden: kernels.segment_mean(hidden, ends, normalize=True), [features(M, D, device, dtype, 0)]
    )


def _attention(device: str, dtype: torch.dtype) -> Compute:
    """Forward only: on a GPU its backward is torch's own, which adds in changing order."""
    half = torch.bfloat16 if device.startswith("cuda") else dtype
    q, k, v = (features(M, 4 * 64, device, half, i).detach().view(M, 4, 64) for i in range(3))
    ends = _lengths(device)
    return lambda: [kernels.packed_attention(q, k, v, ends, 64, causal=True)]


def _lora(device: str, dtype: torch.dtype) -> Compute:
    shapes = ((M, D), (96, D), (1, 96), (8, D), (96, 8))
    x, weight, bias, a, b = (features(*shape, device, dtype, i) for i, shape in enumerate(shapes))
    return with_gradients(
        lambda x, w, bias, a, b: kernels.lora_linear(x, w, bias[0], a, b, 2.0), [x, weight, bias, a, b]
    )


def _adapter_block(device: str, dtype: torch.dtype) -> Compute:
    shapes = ((M, D), (1, D), (1, D), (2 * D, D), (1, 2 * D), (D, 2 * D), (1, D))
    inputs = [features(*shape, device, dtype, i) for i, shape in enumerate(shapes)]
    return with_gradients(
        lambda x, g, h, w1, b1, w2, b2: kernels.adapter_block(x, g[0], h[0], w1, b1[0], w2, b2[0]), inputs
    )


# these ask the device for a number in between, which a graph cannot hold
NOT_CAPTURED = frozenset({"similarity_topk"})

# name -> (names of the package that it needs, what makes it)
CASES: dict[str, tuple[tuple[str, ...], Make]] = {
    "similarity_lse": (("similarity_lse",), _similarity_lse),
    "similarity_lse_online": (("similarity_lse",), _similarity_lse_online),
    "infonce_loss": (("infonce_loss",), _infonce),
    "infonce_loss_groups": (("infonce_loss",), _infonce_groups),
    "nll_loss": (("nll_loss",), _nll),
    "sigmoid_loss": (("sigmoid_loss",), _sigmoid),
    "similarity_distill": (("similarity_distill",), _distill),
    "similarity_rank": (("similarity_rank",), _ranks),
    "similarity_topk": (("similarity_topk",), _topk),
    "l2_normalize": (("l2_normalize",), _normalize),
    "segment_mean": (("segment_mean",), _segments),
    "packed_attention": (("packed_attention",), _attention),
    "lora_linear": (("lora_linear",), _lora),
    "adapter_block": (("adapter_block",), _adapter_block),
}


def available() -> dict[str, Make]:
    """Returns the cases whose op this version has."""
    return {
        name: make for name, (needs, make) in CASES.items() if all(hasattr(kernels, need) for need in needs)
    }


def dtypes(device: str) -> list[torch.dtype]:
    """Returns the dtypes that a device's checks run in."""
    return [torch.bfloat16, torch.float32] if device == "cuda" else [torch.float32]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--cases", nargs="+", default=list(available()), choices=list(available()))
    options = parser.parse_args()
    for name in options.cases:
        for dtype in dtypes(options.device):
            found = available()[name](options.device, dtype)()
            if options.device == "cuda":
                torch.cuda.synchronize()
            assert all(t.isfinite().all() for t in found if t.is_floating_point()), name
            print(f"{name} {dtype}: {len(found)} finite tensors", flush=True)


if __name__ == "__main__":
    main()
