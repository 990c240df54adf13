"""The loss of the LLM stage against its definition in fp64: kinds, hard negatives, masks, prefixes, two ranks."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from gloo import run_on_ranks  # noqa: E402

from llm2clip.errors import ConfigError  # noqa: E402
from llm2clip.settings import CaptionLossSettings  # noqa: E402
from llm2clip.training.false_negatives import (  # noqa: E402
    NO_KEY,
    components,
    negative_keys,
    pair_keys,
    shared_ids,
)
from llm2clip.training.pair_loss import PairLoss  # noqa: E402
from llm2clip.training.pairs import TextPair  # noqa: E402
from llm2clip.training.world import World  # noqa: E402

ALONE = World(0, 1, torch.device("cpu"))
WIDTH = 12
# 1 and 2 show one image; 5 has 0's query as its positive, 6 shares a text with 5: 0, 5 and 6 are connected
PAIRS = [
    TextPair("0", "g0", "q0", "p0", "n0", "g1"),  # its hard negative shows what 1 and 2 show
    TextPair("1", "g1", "q1", "p1", "p4", ""),  # its hard negative is 4's positive
    TextPair("2", "g1", "q2", "p2"),
    TextPair("3", "g3", "q3", "p3", "n3", ""),
    TextPair("4", "g4", "q4", "p4"),
    TextPair("5", "g5", "q5", "q0", "n3", ""),  # the same hard negative as 3's
    TextPair("6", "g6", "q0", "p6", "q6", "g6"),  # its hard negative is an own text
]


def masks() -> tuple[Tensor, Tensor]:
    """Which positives and hard negatives no query may be pushed away from, chains included, from the strings."""
    nodes = [(p.group, {p.query, p.positive}) for p in PAIRS]
    nodes += [(p.negative_group, {p.negative}) for p in PAIRS if p.negative]
    linked = np.eye(len(nodes), dtype=bool)
    for (i, (g, t)), (j, (h, u)) in itertools.product(enumerate(nodes), repeat=2):
        linked[i, j] |= bool(t & u) or (bool(g) and g == h)
    for _ in nodes:  # transitive closure
        linked |= (linked.astype(int) @ linked.astype(int)) > 0
    count = len(PAIRS)
    positives = torch.from_numpy(linked[:count, :count] & ~np.eye(count, dtype=bool))
    return positives, torch.from_numpy(linked[:count, count:])


def batch(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    given = [p for p in PAIRS if p.negative]

    def rows(count: int) -> Tensor:
        return torch.randn(count, WIDTH, generator=generator, dtype=dtype).requires_grad_()

    return {
        "query": rows(len(PAIRS)),
        "positive": rows(len(PAIRS)),
        "negative": rows(len(given)),
        "keys": torch.tensor([pair_keys(p) for p in PAIRS]),
        "negative_keys": torch.tensor([negative_keys(p) for p in given]),
        "scale": torch.tensor(7.0, dtype=dtype, requires_grad=True),
        "truncated": torch.zeros(len(PAIRS), 2),
    }


def definition(outputs: Mapping[str, Tensor], kind: str, masked: bool, dims: tuple[int, ...]) -> Tensor:
    hidden, hidden_hard = masks() if masked else (torch.zeros(7, 7).bool(), torch.zeros(7, 5).bool())
    target, losses = torch.arange(len(PAIRS)), []
    for dim in dims:
        q, p = (F.normalize(outputs[n][:, :dim], dim=1) for n in ("query", "positive"))
        columns, hide = [p], [hidden]
        if "negative" in outputs:
            columns.append(F.normalize(outputs["negative"][:, :dim], dim=1))
            hide.append(hidden_hard)
        logits = outputs["scale"] * q @ torch.cat(columns).T
        loss = F.cross_entropy(logits.masked_fill(torch.cat(hide, 1), float("-inf")), target)
        if kind == "symmetric":
            back = (outputs["scale"] * p @ q.T).masked_fill(hidden.T, float("-inf"))
            loss = 0.5 * (loss + F.cross_entropy(back, target))
        losses.append(loss)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kind", ["symmetric", "hard_negative"])
@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize(("masked", "prefixes"), [(True, ()), (True, (3, 8)), (False, ())])
def test_equals_its_definition(kind: Any, hard: bool, masked: bool, prefixes: tuple[int, ...]) -> None:
    settings = CaptionLossSettings(kind=kind, mask_duplicates=masked, matryoshka=prefixes, learn_scale=True)
    results = []
    for ours in (False, True):
        outputs = batch()
        if not hard:
            del outputs["negative"], outputs["negative_keys"]
        if ours:
            loss, metrics = PairLoss(settings, ALONE)(outputs)
            assert metrics["scale"] == 7.0 and -1 <= metrics["positive_similarity"] <= 1
        else:
            loss = definition(outputs, kind, masked, (WIDTH, *prefixes))
        loss.backward()
        names = ("query", "positive", "scale") + (("negative",) if hard else ())
        results.append([loss.detach(), *(outputs[name].grad for name in names)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_masks_matter_here() -> None:
    positives, negatives = masks()
    assert positives[0, 5] and positives[0, 6] and positives[1, 2] and not positives[3].any()
    assert negatives[:, 0].nonzero().flatten().tolist() == [1, 2]
    assert negatives[:, 1].nonzero().flatten().tolist() == [4]
    assert negatives[:, 4].nonzero().flatten().tolist() == [0, 5, 6]
    outputs = batch()
    values = {definition(outputs, "symmetric", masked, (WIDTH,)).item() for masked in (True, False)}
    assert len(values) == 2


def test_no_duplicates_no_ids() -> None:
    keys = torch.tensor([pair_keys(p) for p in (PAIRS[3], PAIRS[4])])
    assert shared_ids([keys], ALONE) is None
    ids = shared_ids([torch.cat([keys, keys[:1]])], ALONE)
    assert ids is not None and ids[0].tolist() == [0, 1, 0]


@pytest.mark.parametrize("seed", range(5))
def test_components_of_random_tables(seed: int) -> None:
    rng = np.random.default_rng(seed)
    keys = rng.integers(NO_KEY, 30, (25, 3))
    keys[rng.random(keys.shape) < 0.5] = NO_KEY
    labels = components(keys)
    linked = np.eye(25, dtype=bool)
    for i, j in itertools.product(range(25), repeat=2):
        linked[i, j] |= bool((set(keys[i]) & set(keys[j])) - {NO_KEY})
    for _ in range(25):
        linked |= (linked.astype(int) @ linked.astype(int)) > 0
    assert np.array_equal(labels[:, None] == labels, linked)
    assert np.array_equal(labels, linked.argmax(1))
    assert components(np.empty((0, 3), np.int64)).shape == (0,)


def check_ranks(rank: int, world: int, settings: CaptionLossSettings) -> None:
    """Two ranks, of which one has no hard negative, give the loss and gradients of one process."""
    whole = batch()
    loss, _ = PairLoss(settings, ALONE)(whole)
    loss.backward()
    pairs = slice(2, 7) if rank == 0 else slice(0, 2)
    hard = slice(0, 0) if rank == 0 else slice(0, 5)  # all hard negatives come from rank 1
    order = {"query": pairs, "positive": pairs, "negative": hard, "keys": pairs, "negative_keys": hard}
    part = {name: t.detach()[order[name]] if name in order else t for name, t in batch().items()}
    for name in ("query", "positive", "negative"):
        part[name].requires_grad_()
    spread = World(rank, world, torch.device("cpu"))
    own, _ = PairLoss(settings, spread)(part | {"truncated": torch.zeros(len(part["query"]), 2)})
    torch.testing.assert_close(own, loss)
    own.backward()
    for name in ("query", "positive", "negative"):
        gradient, expected = part[name].grad, whole[name].grad
        assert gradient is not None and expected is not None
        torch.testing.assert_close(gradient / world, expected[order[name]], rtol=1e-8, atol=1e-12)


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["symmetric", "hard_negative"])
def test_masks_and_hard_negatives_reach_over_ranks(kind: Any) -> None:
    run_on_ranks(2, check_ranks, CaptionLossSettings(kind=kind, matryoshka=(5,)))


def test_prefixes_wider_than_the_embedding_are_refused() -> None:
    with pytest.raises(ConfigError, match="64 dimensions are more than the 12"):
        PairLoss(CaptionLossSettings(matryoshka=(4, 64)), ALONE)(batch())
    with pytest.raises(ConfigError, match="different dimensions of at least 1"):
        CaptionLossSettings(matryoshka=(4, 4))
    with pytest.raises(ConfigError, match="loss.scale 120.0 is above loss.max_scale"):
        CaptionLossSettings(learn_scale=True, scale=120.0)
