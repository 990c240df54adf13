"""Multinomial logistic regression on frozen features: L-BFGS with a validation sweep of the weight decay.

The objective is mean cross-entropy + decay/2 · ‖W‖², the bias free, on features standardised by the training set; it
is convex, so the result does not depend on the optimiser. Each rank holds its share of the rows and the gradient is
summed over ranks, which makes every step the same on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from llm2clip.evaluation.features import Features
from llm2clip.evaluation.ranking import rank_classes
from llm2clip.training.world import World

_BLOCK = 16384  # rows whose logits exist at a time
_ROUNDS = 2  # of refining around the best decay of the grid
_HISTORY = 10
_GRADIENT = 1e-8  # largest component of the gradient at the end, where rounding allows it
# products of a pass up to which fp64 costs little: there the minimum is the same on any number of ranks
_SMALL = 1 << 31
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Standard:
    """Mean and standard deviation of the training features, (D,) fp32."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class StandardRows:
    """Rows of features, standardised and followed by a 1 for the bias; an array to the retrieval ops.

    Attributes:
        features: all features.
        rows: which of them.
        standard: of the training features.
    """

    features: Features
    rows: Ints
    standard: Standard

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, D + 1)."""
        return len(self.rows), self.features.shape[1] + 1

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> Tensor:
        values = torch.from_numpy(self.features.gather(self.rows[part]))
        scaled = (values - self.standard.mean) / self.standard.std
        return torch.cat([scaled, scaled.new_ones(len(scaled), 1)], dim=1)


@dataclass
class Sweep:
    """The decays tried and the validation accuracy of each.

    Attributes:
        decays, accuracies: in the order tried.
    """

    decays: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)

    def best(self) -> float:
        """The decay of the highest accuracy; the largest of several."""
        return max(zip(self.accuracies, self.decays, strict=True))[1]

    def sorted(self) -> tuple[list[float], list[float]]:
        """Decays in ascending order, and their accuracies."""
        order = np.argsort(self.decays)
        return [self.decays[i] for i in order], [self.accuracies[i] for i in order]


def standard_of(features: Features, rows: Ints, world: World) -> Standard:
    """Mean and standard deviation over `rows`, all ranks together; constant features keep their scale."""
    own = np.array_split(rows, world.size)[world.rank]
    sums = torch.zeros(2, features.shape[1], dtype=torch.float64)
    for start in range(0, len(own), _BLOCK):
        values = torch.from_numpy(features.gather(own[start : start + _BLOCK])).double()
        sums += torch.stack([values.sum(0), values.square().sum(0)])
    if world.size > 1:
        sums = sums.to(world.device)
        dist.all_reduce(sums)
        sums = sums.cpu()
    mean = sums[0] / len(rows)
    variance = (sums[1] / len(rows) - mean.square()).clamp_min(0)
    # a variance within rounding of the mean's square is none
    constant = variance <= 1e-10 * mean.square()
    std = torch.where(constant, torch.ones_like(variance), variance).sqrt()
    return Standard(mean.float(), std.float())


class Problem:
    """Training rows and labels; this rank's share of them is held on the device.

    Args:
        rows: standardised training features.
        labels: (n,) classes.
        classes: number of classes C.
        world: ranks that share the rows.
    """

    def __init__(self, rows: StandardRows, labels: Ints, classes: int, world: World) -> None:
        self.shape, self._world, self._total = (classes, rows.shape[1]), world, len(rows)
        small = self._total * self.shape[0] * self.shape[1] <= _SMALL
        self._dtype = torch.float64 if small else torch.float32
        share = np.array_split(np.arange(len(rows)), world.size)[world.rank]
        start, stop = (int(share[0]), int(share[-1]) + 1) if len(share) else (0, 0)
        self._blocks: list[tuple[Tensor, Tensor]] = []
        for first in range(start, stop, _BLOCK):
            part = slice(first, min(first + _BLOCK, stop))
            own = torch.from_numpy(labels[part]).to(world.device)
            self._blocks.append((rows[part].to(world.device, self._dtype), own))

    def fit(self, decay: float, start: Tensor | None = None, iterations: int = 1000) -> Tensor:
        """The weights (C, D + 1) fp64 of the minimum; the last column is the bias.

        Args:
            decay: weight decay, > 0.
            start: weights to start from; None: zeros.
            iterations: L-BFGS steps at most.
        """
        first = torch.zeros(self.shape, dtype=torch.float64) if start is None else start
        weights = torch.nn.Parameter(first.to(self._world.device, torch.float64, copy=True))
        optimizer = torch.optim.LBFGS(
            [weights],
            max_iter=iterations,
            max_eval=2 * iterations,
            tolerance_grad=_GRADIENT,
            tolerance_change=1e-12 if self._dtype == torch.float32 else 1e-16,
            history_size=_HISTORY,
            line_search_fn="strong_wolfe",
        )

        @torch.no_grad()
        def closure() -> Tensor:
            loss, gradient = self._loss(weights.detach(), decay)
            weights.grad = gradient
            return loss

        optimizer.step(closure)
        return weights.detach()

    def _loss(self, weights: Tensor, decay: float) -> tuple[Tensor, Tensor]:
        typed = weights.to(self._dtype)
        result = torch.zeros(1 + weights.numel(), dtype=torch.float64, device=weights.device)
        gradient = result[1:].view_as(weights)
        for rows, labels in self._blocks:
            logits = rows @ typed.T
            lse = logits.logsumexp(dim=1)
            own = labels[:, None]
            result[0] += (lse - logits.gather(1, own)[:, 0]).double().sum()
            # softmax less the target, the derivative of the cross-entropy by the logits
            logits.sub_(lse[:, None]).exp_()
            logits.scatter_add_(1, own, torch.full_like(own, -1, dtype=logits.dtype))
            gradient += (logits.T @ rows).double()
        if self._world.size > 1:
            dist.all_reduce(result)
        result /= self._total
        penalised = weights.clone()
        penalised[:, -1] = 0
        return result[0] + decay / 2 * penalised.square().sum(), gradient + decay * penalised


def choose_decay(
    problem: Problem,
    rows: StandardRows,
    labels: Ints,
    world: World,
    *,
    grid: Sequence[float],
    iterations: int = 1000,
) -> tuple[Sweep, Tensor]:
    """Try decays on validation rows: a grid from strong to weak, then finer around the best.

    Args:
        problem: the training rows.
        rows, labels: validation features and classes.
        world: ranks that share the work.
        grid: decays, ascending, a constant factor apart.
        iterations: L-BFGS steps of a fit at most.

    Returns:
        What was tried, and the weights (C, D + 1) of the best decay.
    """
    sweep = Sweep()
    fitted: dict[float, Tensor] = {}

    def attempt(decay: float, start: Tensor | None) -> Tensor:
        weights = problem.fit(decay, start, iterations)
        ranks = rank_classes(rows, weights.float().cpu(), labels, world)
        sweep.decays.append(decay)
        sweep.accuracies.append(float(ranks.recall(1).mean()))
        fitted[decay] = weights
        return weights

    weights: Tensor | None = None
    for decay in sorted(grid, reverse=True):  # each solution is a good start for the next weaker decay
        weights = attempt(decay, weights)
    step = (max(grid) / min(grid)) ** (1 / (len(grid) - 1))
    for _ in range(_ROUNDS):
        step = math.sqrt(step)
        middle = sweep.best()
        for decay in (middle * step, middle / step):
            attempt(decay, fitted[middle])
    return sweep, fitted[sweep.best()]


def split_rows(labels: Ints, rows: Ints, share: float, seed: int) -> tuple[Ints, Ints]:
    """Training and validation rows, the same share of every class, drawn at random.

    Args:
        labels: (n,) class of each of `rows`.
        rows: (n,) what is split.
        share: of each class that validates, rounded down.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    validate = np.zeros(len(rows), bool)
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        validate[own[: int(share * len(own))]] = True
    return rows[~validate], rows[validate]
