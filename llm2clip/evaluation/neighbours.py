"""Classification by nearest neighbours among the training features, without a matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from llm2clip.evaluation.features import UnitRows
from llm2clip.evaluation.ranks import Ranks
from llm2clip.training.world import World
from llm2clip_kernels import similarity_topk_stream

_QUERIES = 4096  # test images whose neighbours are looked for in one pass over the training features
Ints = npt.NDArray[np.int64]


def neighbour_ranks(
    train: UnitRows,
    train_labels: Ints,
    test: UnitRows,
    test_labels: Ints,
    *,
    classes: int,
    ks: Sequence[int],
    temperature: float,
    world: World,
) -> dict[int, Ranks]:
    """Rank of every test image's class by the votes of its k nearest training images.

    A neighbour votes for its class with weight exp(cosine / temperature) (Wu et al., arXiv 1805.01978).

    Args:
        train, train_labels: training features (n, D) and classes (n,).
        test, test_labels: test features (m, D) and classes (m,).
        classes: number of classes.
        ks: numbers of neighbours, each 1 to 64.
        temperature: > 0.
        world: ranks that share the test images.

    Returns:
        k -> ranks; classes with equal votes, none among them, are ties.
    """
    most = min(max(ks), len(train))
    found = torch.zeros(2, len(ks), len(test), dtype=torch.int64)  # better and equal classes
    own = np.array_split(np.arange(len(test)), world.size)[world.rank]
    of_train = torch.from_numpy(train_labels)
    for start in range(0, len(own), _QUERIES):
        rows = own[start : start + _QUERIES]
        queries = test[rows].to(world.device)
        scores, near = similarity_topk_stream(queries, train, most)
        # the largest is divided out: weights of exp(1 / 0.07) would lose the small ones in fp32
        weights = ((scores.double() - scores[:, :1].double()) / temperature).exp().cpu()
        voted = of_train[near.cpu()]
        right = torch.from_numpy(test_labels[rows])[:, None]
        for number, k in enumerate(ks):
            votes = torch.zeros(len(rows), classes, dtype=torch.float64)
            votes.scatter_add_(1, voted[:, :k], weights[:, :k])
            mine = votes.gather(1, right)
            found[0, number, rows] = (votes > mine).sum(1)
            found[1, number, rows] = (votes == mine).sum(1) - 1
    if world.size > 1:
        found = found.to(world.device)
        dist.all_reduce(found)
    above, tied = found.cpu().numpy()
    one = np.ones(len(test), np.int64)
    return {k: Ranks(above[number], tied[number], one, one, classes) for number, k in enumerate(ks)}
