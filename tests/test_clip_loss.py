"""The CLIP stage's loss on named outputs, against dense definitions in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.config import from_tree
from llm2clip.errors import ConfigError
from llm2clip.settings import ClipLossSettings, TrainSettings
from llm2clip.training.clip_loss import ClipLoss
from llm2clip.training.distill import feature_loss

SCALE, BIAS = 8.0, -3.0


def rows(count: int, dim: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=generator, dtype=torch.float64), dim=1)


def outputs(images: int = 5, captions: int | None = None, **more: Any) -> dict[str, Tensor]:
    captions = captions or images
    found = {"image": rows(images, seed=1), "text": rows(captions, seed=2)}
    scalars = {"scale": torch.tensor(SCALE).double(), "bias": torch.tensor(BIAS).double()}
    return {**found, **scalars, **more}


def loss(
    settings: dict[str, Any], given: dict[str, Tensor], **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    return ClipLoss(from_tree(ClipLossSettings, settings), **options)(given)


def cross_entropy(logits: Tensor, allowed: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean over rows of -(log-softmax at the target): the diagonal, over what is allowed."""
    logs = logits.masked_fill(~allowed, -torch.inf).log_softmax(1)
    target = -logs.diagonal()
    spread = -(logs.masked_fill(~allowed, 0.0)).sum(1) / allowed.sum(1)
    return ((1 - smoothing) * target + smoothing * spread).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("groups", [None, [3, 4, 3, 5, 3]])
def test_softmax_masks_what_shows_the_same(smoothing: float, groups: list[int] | None) -> None:
    given = outputs()
    allowed = torch.ones(5, 5, dtype=torch.bool)
    if groups is not None:
        given["groups"] = torch.tensor(groups)
        allowed = (given["groups"][:, None] != given["groups"]) | torch.eye(5, dtype=torch.bool)
    logits = SCALE * given["image"] @ given["text"].T
    want = (cross_entropy(logits, allowed, smoothing) + cross_entropy(logits.T, allowed.T, smoothing)) / 2
    value, metrics = loss({"label_smoothing": smoothing}, given)
    torch.testing.assert_close(value, want, rtol=1e-6, atol=1e-8)
    assert metrics["logit_scale"] == SCALE and "loss_contrastive" not in metrics
    torch.testing.assert_close(
        metrics["positive_similarity"].double(),
        (given["image"] * given["text"]).sum(1).mean(),
        rtol=1e-5,
        atol=1e-6,
    )
    # kept duplicates are negatives whatever their groups
    plain = (
        cross_entropy(logits, torch.ones(5, 5).bool()) + cross_entropy(logits.T, torch.ones(5, 5).bool())
    ) / 2
    torch.testing.assert_close(loss({"duplicates": "keep"}, given)[0], plain, rtol=1e-6, atol=1e-8)


def set_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """Mean over rows of the cross-entropy against a target spread over the positives."""
    target = positive.double() / positive.sum(1, keepdim=True)
    return -(target * logits.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("groups", [None, [7, 8, 7]])
def test_several_captions_are_several_positives(groups: list[int] | None) -> None:
    owners = torch.tensor([0, 0, 1, 2, 2, 2])
    given = outputs(3, 6, owners=owners)
    ids = torch.arange(3)
    if groups is not None:
        given["groups"] = ids = torch.tensor(groups)
    logits = SCALE * given["image"] @ given["text"].T
    positive = ids[:, None] == ids[owners]
    want = (set_loss(logits, positive) + set_loss(logits.T, positive.T)) / 2
    torch.testing.assert_close(loss({}, given, several=True)[0], want, rtol=1e-6, atol=1e-8)
    signs = torch.where(positive, 1.0, -1.0).double()
    want = F.softplus(-signs * (logits + BIAS)).sum() / 3
    torch.testing.assert_close(loss({"kind": "sigmoid"}, given, several=True)[0], want, rtol=1e-6, atol=1e-8)


def test_softmax_may_take_groups_as_positives() -> None:
    groups = torch.tensor([1, 2, 1, 3, 1])
    given = outputs(groups=groups)
    logits = SCALE * given["image"] @ given["text"].T
    positive = groups[:, None] == groups
    want = (set_loss(logits, positive) + set_loss(logits.T, positive.T)) / 2
    torch.testing.assert_close(loss({"duplicates": "positive"}, given)[0], want, rtol=1e-6, atol=1e-8)


def test_sigmoid_takes_groups_as_positives() -> None:
    groups = torch.tensor([1, 2, 1, 3, 4])
    given = outputs(groups=groups)
    signs = torch.where(groups[:, None] == groups, 1.0, -1.0).double()
    logits = SCALE * given["image"] @ given["text"].T + BIAS
    want = F.softplus(-signs * logits).sum() / 5
    torch.testing.assert_close(loss({"kind": "sigmoid"}, given)[0], want, rtol=1e-6, atol=1e-8)
    alone = F.softplus(-(2 * torch.eye(5).double() - 1) * logits).sum() / 5
    kept = loss({"kind": "sigmoid", "duplicates": "keep"}, given)[0]
    torch.testing.assert_close(kept, alone, rtol=1e-6, atol=1e-8)


def test_cosine_looks_at_pairs_alone() -> None:
    owners = torch.tensor([0, 1, 1, 2])
    given = outputs(3, 4, owners=owners)
    want = 1 - (given["image"][owners] * given["text"]).sum(1).mean()
    torch.testing.assert_close(loss({"kind": "cosine"}, given, several=True)[0], want, rtol=1e-6, atol=1e-8)


def test_the_other_text_tower_adds_its_losses() -> None:
    given = outputs(clip_text=rows(5, seed=3))

    def pair(x: Tensor, y: Tensor) -> Tensor:
        return loss({}, {"image": x, "text": y, "scale": given["scale"]})[0]

    first, second = pair(given["image"], given["text"]), pair(given["image"], given["clip_text"])
    value, metrics = loss({"clip_text": 0.5}, given)
    torch.testing.assert_close(value, first + 0.5 * second)
    torch.testing.assert_close(metrics["loss_clip_text"], 0.5 * second)
    third = pair(given["text"], given["clip_text"])
    torch.testing.assert_close(loss({"clip_text": 0.5}, given, texts=True)[0], first + 0.5 * (second + third))


@pytest.mark.parametrize("groups", [None, [3, 4, 3, 5, 6]])
def test_similarity_distillation(groups: list[int] | None) -> None:
    teacher = {"teacher_image": rows(5, 4, seed=4), "teacher_text": rows(5, 4, seed=5)}
    given = outputs(**teacher)
    if groups is not None:
        given["groups"] = torch.tensor(groups)
    logits = SCALE * given["image"] @ given["text"].T
    aims = 20.0 * teacher["teacher_image"] @ teacher["teacher_text"].T
    want = sum(
        -(a.softmax(1) * s.log_softmax(1)).sum(1).mean() / 2 for a, s in ((aims, logits), (aims.T, logits.T))
    )
    contrastive = loss({}, {**given, "scale": given["scale"]})[0]
    settings = {"distill": {"similarity": 0.3, "teacher_scale": 20.0}}
    value, metrics = loss(settings, given)
    torch.testing.assert_close(value, contrastive + 0.3 * want, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(metrics["loss_similarity"], 0.3 * want, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(metrics["loss_contrastive"], contrastive, rtol=1e-6, atol=1e-8)
    only = loss({"kind": "none", **settings}, given)[0]
    torch.testing.assert_close(only, 0.3 * want, rtol=1e-6, atol=1e-8)


def test_feature_losses_and_their_gradients() -> None:
    teacher = rows(7, 6, seed=8)
    student = rows(7, 6, seed=9).requires_grad_()
    wants = {
        "mse": (student - teacher).square().sum(1).mean(),
        "cosine": (1 - (student * teacher).sum(1)).mean(),
        "structure": (student @ student.T - teacher @ teacher.T).square().mean(),
    }
    for name, want in wants.items():
        value = feature_loss(student, teacher, {name: 1.0})
        torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-12)
        (got,) = torch.autograd.grad(value, student)
        (expected,) = torch.autograd.grad(want, student)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
        assert feature_loss(teacher, teacher, {name: 1.0}).abs() < 1e-12
    both = feature_loss(student, teacher, {"mse": 2.0, "cosine": 0.0, "structure": 3.0})
    torch.testing.assert_close(both, 2 * wants["mse"] + 3 * wants["structure"])
    # any width of the teacher's will do for the structure
    wide = rows(7, 11, seed=10)
    want = (student @ student.T - wide @ wide.T).square().mean()
    torch.testing.assert_close(feature_loss(student, wide, {"structure": 1.0}), want)


def test_distillation_of_named_sides() -> None:
    given = outputs(teacher_image=rows(5, seed=6), teacher_text=rows(5, seed=7))
    given |= {"tower": rows(5, 9, seed=11), "teacher_tower": rows(5, 9, seed=12)}
    weights = {"image": {"mse": 1.0}, "text": {"cosine": 2.0}, "tower": {"structure": 3.0}}
    value, metrics = loss({"distill": weights}, given)
    parts = {
        side: feature_loss(given[side], given[f"teacher_{side}"], weights[side])
        for side in ("image", "text", "tower")
    }
    torch.testing.assert_close(value, loss({}, given)[0] + sum(parts.values()))
    for side, part in parts.items():
        torch.testing.assert_close(metrics[f"loss_distill_{side}"], part)
    # without the contrastive part no scale is needed
    del given["scale"], given["bias"]
    torch.testing.assert_close(loss({"kind": "none", "distill": weights}, given)[0], sum(parts.values()))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"loss": {"kind": "sigmoid", "duplicates": "mask"}}, "loss.duplicates: the sigmoid loss has no mask"),
        ({"loss": {"kind": "cosine", "label_smoothing": 0.1}}, "the cosine loss has none, got 0.1"),
        ({"loss": {"kind": "none"}}, "loss.kind none: there is nothing to learn"),
        ({"loss": {"distill": {"image": {"mae": 1}}}}, "expected weights of cosine, mse, structure, got mae"),
        ({"loss": {"distill": {"text": {"mse": -1}}}}, "loss.distill.text: expected weights of at least 0"),
        ({"loss": {"distill": {"similarity": -1}}}, "loss.distill.similarity: expected at least 0"),
        ({"loss": {"distill": {"image": {"mse": 1}}}}, "set teacher.images or teacher.model"),
        ({"loss": {"distill": {"similarity": 1}}, "teacher": {"images": "a"}}, "set teacher.texts or teacher.model"),
        ({"loss": {"distill": {"tower": {"mse": 1}}}}, "set teacher.start"),
        ({"teacher": {"views": 2}}, "teacher.views: views are stored ones"),
        ({"teacher": {"texts": "a"}}, "teacher.texts is set, but loss.distill gives nothing of it a weight"),
        ({"teacher": {"start": True}}, "teacher.start is set, but"),
        ({"teacher": {"model": "a", "images": "b"}}, "give a model or stores of its features, not both"),
        ({"data": {"captions": {"per_image": 2}}, "loss": {"duplicates": "mask"}}, "several captions per image"),
        ({"data": {"captions": {"per_image": 0}}}, "data.captions.per_image: expected at least 1"),
        ({"data": {"captions": {"roles": {"short": ["a"]}}}}, "data.captions.roles: short has a setting of its own"),
        (
            {"features": "a", "teacher": {"start": True}, "loss": {"distill": {"tower": {"mse": 1}}}},
            "features: the tower is frozen and absent",
        ),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        from_tree(TrainSettings, tree)
