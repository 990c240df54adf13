"""Ranking losses against the installed sentence-transformers (5.2 and later): signature, value, gradients, settings."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
sys.path.insert(0, str(Path(__file__).parent))
from gloo import run_on_ranks  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.util import dot_score  # noqa: E402
from test_ranking import named, variants  # noqa: E402
from tiny_models import tiny_model, tiny_tokenizer  # noqa: E402

try:
    from sentence_transformers.sentence_transformer import losses, modules
except ImportError:
    # until 5.3
    from sentence_transformers import losses
    from sentence_transformers import models as modules

from llm2clip.integrations import sentence_transformers as ours  # noqa: E402

NO_LABELS = torch.empty(0)
KINDS = ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss")
# before 5.3 there is one variant
KNOWN = inspect.signature(losses.MultipleNegativesRankingLoss).parameters
VARIANTS: list[dict[str, Any]] = variants() if "directions" in KNOWN else [{}]


def name(variant: dict[str, Any]) -> str:
    return named(variant) if variant else "default"


def columns(rows: int, count: int, dim: int = 10) -> list[Tensor]:
    """Embeddings of any norm whose positives are near, so that no gradient is only rounding."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(rows, dim, generator=generator)
    return [
        queries * 3,
        *(queries + torch.randn(rows, dim, generator=generator) for _ in range(count - 1)),
    ]


def value_and_gradients(loss: Any, embeddings: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = [t.to(dtype).clone().requires_grad_() for t in embeddings]
    value = loss.compute_loss_from_embeddings(leaves, NO_LABELS)
    (1.7 * value).backward()
    return [value.detach().double()] + [t.grad.double() for t in leaves]  # type: ignore[union-attr]


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
def test_every_variant_of_the_original(variant: dict[str, Any]) -> None:
    model: Any = nn.Identity()
    original = losses.MultipleNegativesRankingLoss(model, **variant)
    fused = ours.MultipleNegativesRankingLoss(model, **variant)
    for rows, count in ((2, 2), (9, 4)):
        embeddings = columns(rows, count)
        want = value_and_gradients(original, embeddings, torch.float64)
        for got, true in zip(value_and_gradients(fused, embeddings, torch.float64), want, strict=True):
            torch.testing.assert_close(got, true, rtol=1e-9, atol=1e-12)
        plain = value_and_gradients(original, embeddings, torch.float32)
        for got, reference, true in zip(
            value_and_gradients(fused, embeddings, torch.float32), plain, want, strict=True
        ):
            assert (got - true).norm() <= 2 * (reference - true).norm() + 4e-7 * (true.norm() + 1)


def test_what_is_not_covered_is_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another similarity, or columns the kernels do not take: the original computes, and is right."""
    monkeypatch.setattr(ours, "ranking_loss", lambda *_, **__: pytest.fail("the kernels were asked"))
    model: Any = nn.Identity()
    embeddings = columns(4, 3)
    fused = ours.MultipleNegativesRankingLoss(model, scale=0.1, similarity_fct=dot_score)
    original = losses.MultipleNegativesRankingLoss(model, scale=0.1, similarity_fct=dot_score)
    for got, want in zip(
        value_and_gradients(fused, embeddings, torch.float32),
        value_and_gradients(original, embeddings, torch.float32),
        strict=True,
    ):
        assert torch.equal(got, want)
    fused, original = ours.MultipleNegativesRankingLoss(model), losses.MultipleNegativesRankingLoss(model)
    # two negatives more than queries
    longer = [*embeddings, torch.randn(6, 10)]
    assert torch.equal(
        fused.compute_loss_from_embeddings(longer, NO_LABELS),
        original.compute_loss_from_embeddings(longer, NO_LABELS),
    )
    # before 5.3 one column is an error of torch.cat
    with pytest.raises((ValueError, RuntimeError), match="at least 2|non-empty list"):
        fused.compute_loss_from_embeddings(embeddings[:1], NO_LABELS)


class Tower(nn.Module):
    """Stands where a SentenceTransformer would: its first module is looked at, nothing else."""

    def __getitem__(self, index: int) -> nn.Module:
        return nn.Identity()


@pytest.mark.parametrize("kind", KINDS)
def test_signature_settings_and_checks_are_the_originals(kind: str) -> None:
    original_class, fused_class = getattr(losses, kind), getattr(ours, kind)
    assert issubclass(fused_class, original_class)
    assert inspect.signature(fused_class) == inspect.signature(original_class)
    model: Any = Tower()
    for variant in VARIANTS:
        original = original_class(model, scale=30.0, **variant)
        fused = fused_class(model, scale=30.0, **variant)
        assert fused.get_config_dict() == original.get_config_dict()
        assert fused.citation == original.citation
        assert getattr(fused, "temperature", None) == getattr(original, "temperature", None)
    if "directions" in KNOWN:
        with pytest.raises(ValueError, match="query_to_doc"):
            fused_class(model, directions=("doc_to_query",))


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
def test_the_cached_loss_of_every_variant(variant: dict[str, Any]) -> None:
    """Value, and the gradients put into the mini-batches' embeddings."""
    model: Any = Tower()
    results = []
    for kind in (losses.CachedMultipleNegativesRankingLoss, ours.CachedMultipleNegativesRankingLoss):
        loss = kind(model, mini_batch_size=4, **variant)
        reps = [
            [part.double().clone().requires_grad_() for part in column.split(4)] for column in columns(9, 3)
        ]
        value = loss.calculate_loss(reps, with_backward=True)
        assert not value.requires_grad
        results.append([value, *(part.grad for column in reps for part in column)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A random two-layer sentence-transformers model."""
    folder = str(tmp_path_factory.mktemp("llama"))
    tiny_model("llama", num_hidden_layers=2).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    transformer = modules.Transformer(folder)
    width = getattr(transformer, "get_embedding_dimension", None) or transformer.get_word_embedding_dimension
    yield SentenceTransformer(modules=[transformer, modules.Pooling(width())], device="cpu")


TEXTS = [
    [f"a question about number {i}" for i in range(5)],
    [f"the answer {i} to it" for i in range(5)],
    [f"something else, {i * i}" for i in range(5)],
]


def features_of(model: Any) -> list[Any]:
    # until 5.3 it is called tokenize
    prepare = model.preprocess if hasattr(model, "preprocess") else model.tokenize
    return [prepare(texts) for texts in TEXTS]


def step(loss: Any, model: Any) -> list[Tensor]:
    """Value of a loss on TEXTS, and the gradients of all parameters."""
    model.zero_grad()
    features = features_of(model)
    value = loss(features, NO_LABELS)
    (2.0 * value).backward()
    return [value.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
            "hardness_mode": "hard_negatives",
            "hardness_strength": 5.0,
        },
    ],
    ids=["default", "all"],
)
@pytest.mark.parametrize("cached", [False, True])
def test_a_model_gets_the_same_gradients(tiny: Any, options: dict[str, Any], cached: bool) -> None:
    tiny.eval()
    if not set(options) <= set(KNOWN):
        pytest.skip("this sentence-transformers has no directions")
    if cached:
        options = {**options, "mini_batch_size": 2}
        pair = losses.CachedMultipleNegativesRankingLoss, ours.CachedMultipleNegativesRankingLoss
    else:
        pair = losses.MultipleNegativesRankingLoss, ours.MultipleNegativesRankingLoss  # type: ignore[assignment]
    original, fused = (kind(tiny, **options) for kind in pair)
    assert fused.get_config_dict() == original.get_config_dict()
    want, got = step(original, tiny), step(fused, tiny)
    assert len(want) == len(got) > 10
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        features = features_of(tiny)
        torch.testing.assert_close(fused(features, NO_LABELS), want[0], rtol=1e-4, atol=1e-5)


def test_the_cached_loss_falls_back_too(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "ranking_loss", lambda *_, **__: pytest.fail("the kernels were asked"))
    options: dict[str, Any] = {"similarity_fct": dot_score, "scale": 0.1, "mini_batch_size": 2}
    want = step(losses.CachedMultipleNegativesRankingLoss(tiny, **options), tiny)
    for g, w in zip(step(ours.CachedMultipleNegativesRankingLoss(tiny, **options), tiny), want, strict=True):
        assert torch.equal(g, w)


def check_ranks(rank: int, world: int) -> None:
    model: Any = Tower()
    mine = slice(4 * rank, 4 * rank + 4)
    embeddings = [t[mine] for t in columns(4 * world, 3)]
    for variant in VARIANTS:
        original = losses.MultipleNegativesRankingLoss(model, gather_across_devices=True, **variant)
        fused = ours.MultipleNegativesRankingLoss(model, gather_across_devices=True, **variant)
        want = value_and_gradients(original, embeddings, torch.float64)
        for got, true in zip(value_and_gradients(fused, embeddings, torch.float64), want, strict=True):
            torch.testing.assert_close(got, true, rtol=1e-9, atol=1e-12)
    for variant in VARIANTS[:2]:
        options = {"gather_across_devices": True, "mini_batch_size": 3, **variant}
        results = []
        for kind in (losses.CachedMultipleNegativesRankingLoss, ours.CachedMultipleNegativesRankingLoss):
            reps = [[part.double().requires_grad_() for part in column.split(3)] for column in embeddings]
            value = kind(model, **options).calculate_loss(reps, with_backward=True)
            results.append([value, *(part.grad for column in reps for part in column)])
        for true, got in zip(*results, strict=True):
            torch.testing.assert_close(got, true, rtol=1e-9, atol=1e-12)
    dist.barrier()


@pytest.mark.dist
def test_gathered_across_two_ranks() -> None:
    run_on_ranks(2, check_ranks)
