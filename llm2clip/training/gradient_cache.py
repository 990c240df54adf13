"""One exact contrastive loss over a batch that does not fit in memory as one graph.

Gradient cache (Gao et al. 2021, arXiv 2101.06983): embed every chunk without a graph, take the loss over
all embeddings at once and its gradients on them, then embed each chunk again with a graph and feed it the
cached gradients. The result equals one big batch; memory is that of one chunk. Both forwards of a chunk run
under the same random state, so dropout agrees. (Batch normalisation that still learns would see chunks.)

A loss that is a sum over chunks needs none of this: `accumulate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.training.parallel import exchange_gradients

Outputs = Mapping[str, Tensor]
LossFunction = Callable[[Outputs], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class RandomState:
    """The state of torch's generators on the CPU and on one CUDA device."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> RandomState:
        """The state now."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    @contextmanager
    def replay(self, device: torch.device) -> Iterator[None]:
        """Run a block under this state; afterwards the generators are as they were before it."""
        before = RandomState.capture(device)
        self._set(device)
        try:
            yield
        finally:
            before._set(device)

    def _set(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)


def backward(
    module: nn.Module,
    chunks: Sequence[Any],
    loss: LossFunction,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    *,
    always_cache: bool = False,
    passes: int = 0,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Accumulate the gradients of one loss over all `chunks` into the module's parameters.

    Args:
        module: maps a chunk to named outputs; tensors with a batch dimension (b, ...) are concatenated over
            the chunks, 0-dimensional ones (the logit scale) are the same for all and taken once; what is not
            floating point (group ids) is passed on. May be a DistributedDataParallel or sharded: ranks exchange
            gradients once, after the last chunk.
        chunks: parts of the batch; one chunk needs no second forward.
        loss: maps the outputs of the whole batch to a 0-dimensional loss and detached metrics.
        device: device of the module, for its random state.
        autocast: context of every forward.
        always_cache: use the cache for one chunk too. Ranks of a DistributedDataParallel must agree on it: both
            ways order the communication of its first steps differently, and would wait for each other.
        passes: forward passes to make at least, for sharded modules, whose ranks must make equally many: the last
            chunk runs again and adds nothing.
        scaler: multiplies the loss before its gradients are taken (fp16).

    Returns:
        The detached loss and the metrics of `loss`.
    """
    if not chunks:
        raise ValueError("gradient cache: the batch has no chunk")
    scaled = scaler.scale if scaler is not None else _unchanged
    if len(chunks) == 1 and not always_cache:
        with autocast():
            outputs = module(chunks[0])
        value, metrics = loss(outputs)
        scaled(value).backward()
        return value.detach(), metrics

    own = len(chunks)
    chunks = [*chunks, *[chunks[-1]] * (passes - own)]
    states, parts = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(RandomState.capture(device))
            with autocast():
                parts.append(module(chunk))
    leaves = {name: _join([part[name] for part in parts[:own]]) for name in parts[0]}
    del parts  # joined: the loss's own memory comes next
    value, metrics = loss(leaves)
    scaled(value).backward()
    # what the loss computed with is not needed any more, while the chunks' graphs come next
    value, gradients_of = value.detach(), {name: leaf.grad for name, leaf in leaves.items()}
    del leaves

    starts = dict.fromkeys(gradients_of, 0)
    for index, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
        last = index == len(chunks) - 1
        with state.replay(device), exchange_gradients(module, last):
            with autocast():
                outputs = module(chunk)
            roots, gradients = [], []
            for name, output in outputs.items():
                gradient = gradients_of[name]
                if output.dim() > 0 and index >= own:
                    gradient = None if gradient is None else torch.zeros_like(output)
                elif output.dim() > 0:
                    start, starts[name] = starts[name], starts[name] + len(output)
                    gradient = None if gradient is None else gradient[start : starts[name]]
                elif not last:
                    gradient = None  # a scalar that all chunks share counts once
                if gradient is not None and output.requires_grad:
                    roots.append(output)
                    gradients.append(gradient)
            if roots:
                torch.autograd.backward(roots, gradients)
    return value, metrics


def accumulate(
    module: nn.Module,
    chunks: Sequence[Any],
    loss: LossFunction,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    *,
    always_cache: bool = False,
    passes: int = 0,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `backward`, for a loss that is the sum of the chunks' own: each is done with at once, in one forward.

    Args:
        loss: maps the outputs of one chunk to its share of the loss of the batch; its metrics are added up.
        module, chunks, device, autocast, passes, scaler: as in `backward`.
        always_cache: without meaning here.
    """
    if not chunks:
        raise ValueError("gradient accumulation: the batch has no chunk")
    scaled = scaler.scale if scaler is not None else _unchanged
    own, count = len(chunks), max(len(chunks), passes)
    total, sums = torch.zeros((), device=device), dict[str, Tensor]()
    for index in range(count):
        with exchange_gradients(module, index == count - 1):
            with autocast():
                outputs = module(chunks[min(index, own - 1)])
            value, metrics = loss(outputs)
            scaled(value if index < own else 0.0 * value).backward()
        if index < own:
            total = total + value.detach()
            sums = {name: metric + sums.get(name, 0.0) for name, metric in metrics.items()}
    return total, sums


def _join(parts: list[Tensor]) -> Tensor:
    joined = parts[-1].clone() if parts[-1].dim() == 0 else torch.cat(parts)
    return joined.detach().requires_grad_(joined.is_floating_point())


def _unchanged(value: Tensor) -> Tensor:
    return value
