"""Every op once, forward and backward, at small ragged shapes: what sanitizer, graph, stream and repeat checks run.

python -m benchmarks.proof.cases --device cuda       # all of them, once: what compute-sanitizer watches

A case makes its inputs once and returns a function that computes outputs and gradients from them, the same every
time it is called.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import llm2clip_kernels as kernels

Compute = Callable[[], list[Tensor]]
Make = Callable[[str, torch.dtype], Compute]

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


def _similarity_lse(device: str, dtype: torch.dtype) -> Compute:
    pair = [features(M, D, device, dtype, 0), features(N, D, device, dtype, 1)]
    return with_gradients(kernels.similarity_lse, [*pair, scalar(20.0, device)])


def _similarity_lse_online(device: str, dtype: torch.dtype) -> Compute:
    """Norms so large that the constant shift does not serve."""
    pair = [(30 * features(n, D, device, dtype, n)).detach().requires_grad_() for n in (M, N)]
    return with_gradients(kernels.similarity_lse, [*pair, scalar(3.0, device)])


def _infonce(device: str, dtype: torch.dtype) -> Compute:
    pair = [features(M, D, device, dtype, 0), features(M, D, device, dtype, 1)]
    return with_gradients(
        lambda x, y, s: kernels.infonce_loss(x, y, s, label_smoothing=0.1), [*pair, scalar(20.0, device)]
    )


def _nll(device: str, dtype: torch.dtype) -> Compute:
    x, y, negatives = (features(n, D, device, dtype, i) for i, n in enumerate((M, M, N)))
    return with_gradients(kernels.nll_loss, [x, y, negatives, scalar(20.0, device)])


# name -> (names of the package that it needs, what makes it)
CASES: dict[str, tuple[tuple[str, ...], Make]] = {
    "similarity_lse": (("similarity_lse",), _similarity_lse),
    "similarity_lse_online": (("similarity_lse",), _similarity_lse_online),
    "infonce_loss": (("infonce_loss",), _infonce),
    "nll_loss": (("nll_loss",), _nll),
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
