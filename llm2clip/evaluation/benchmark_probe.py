"""`llm2clip evaluate linear-probe`: how well frozen features tell classes apart."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llm2clip.errors import ConfigError, DataError
from llm2clip.evaluation import html
from llm2clip.evaluation.benchmark import places, setup_of, shown_model
from llm2clip.evaluation.class_names import name_classes
from llm2clip.evaluation.classification import Ints, classification_rows, predict
from llm2clip.evaluation.classification_report import write_classification
from llm2clip.evaluation.datasets.labelled import LabelledImages, first_images, open_labelled
from llm2clip.evaluation.encoders import DualEncoder, EncoderOpener
from llm2clip.evaluation.encoding import check_images, encode_images
from llm2clip.evaluation.features import FeatureCache, Features
from llm2clip.evaluation.figures import lines_over
from llm2clip.evaluation.linear_probe import (
    Problem,
    StandardRows,
    Sweep,
    choose_decay,
    split_rows,
    standard_of,
)
from llm2clip.evaluation.neighbours import neighbour_ranks
from llm2clip.evaluation.ranking import rank_classes
from llm2clip.evaluation.ranks import Ranks
from llm2clip.settings import LinearProbeSettings
from llm2clip.training.world import World, start_world

PROBE = "linear probe"


@dataclass
class Part:
    """One of the sets of images: training, validation, test.

    Attributes:
        title: for progress and messages.
        data: its images, their labels as indices into the training classes.
        features: of one model.
    """

    title: str
    data: LabelledImages
    features: Features | None = None

    def rows(self) -> Ints:
        """The images that have features."""
        assert self.features is not None
        return np.flatnonzero(self.features.valid())

    def labels(self) -> Ints:
        """Their classes."""
        return self.data.labels[self.rows()]


def evaluate_linear_probe(settings: LinearProbeSettings) -> dict[str, Any]:
    """Fit and test the probes on every model's features; print the tables and write the report.

    The weight decay is chosen on `val`, or on a share of `train`; the classifier tested is then fitted to both
    (CLIP, arXiv 2103.00020, appendix A.3).

    Returns:
        What results.json holds: `linear_probe` rows (the linear probe and each number of neighbours) with
        accuracy, chance and intervals, `sweeps`, `comparisons`, `classes`, `datasets` and `setup`.

    Raises:
        ConfigError: a setting is missing.
        DataError: images or class names cannot be used.
        ModelError: a model cannot be used.
    """
    begin = time.monotonic()
    if not settings.train or not settings.test:
        raise ConfigError("train or test is empty; give the labelled images to learn from and to test on")
    parts, names = open_parts(settings)
    out, place = places(settings)
    with start_world(settings.device, settings.threads) as world:
        cache = FeatureCache(place, world)
        opener = EncoderOpener(settings, world.device, place)
        ranks: dict[tuple[str, str], Ranks] = {}
        sweeps: dict[str, Sweep] = {}
        models: dict[str, Any] = {}
        bad: dict[str, list[str]] = {}
        for label in settings.models:
            encoder = opener.open(label)
            models[label] = encoder.describe()
            for name, part in parts.items():
                part.features, bad[name] = _encode(encoder, part, cache, settings)
            del encoder
            own, sweeps[label], weights, tested = _probe(parts, len(names), settings, world)
            ranks |= {(title, label): found for title, found in own.items()}
        test = parts["test"]
        rows, comparisons = classification_rows(ranks, test.labels(), len(names), "classifier", settings)
        results = {
            "linear_probe": rows,
            "comparisons": comparisons,
            "sweeps": {label: _tried(sweep) for label, sweep in sweeps.items()},
            "classes": names,
            "datasets": {name: _describe(part, names, bad[name]) for name, part in parts.items()},
            "setup": setup_of(settings, models, time.monotonic() - begin, world.size),
        }
        if world.is_main:
            model = shown_model(models)  # the one just tested
            said = predict(
                f"{model}, {PROBE}", tested, weights, test.rows(), test.labels(), ranks[PROBE, model]
            )
            layer = "projected features" if settings.layer == "projected" else "features of the tower"
            write_classification(
                out,
                results,
                rows,
                said,
                test.data.images,
                what="classifier",
                title="Linear probe and nearest neighbours",
                note=f"Accuracy in % on {layer}, standardised for the probe and of unit norm for neighbours.",
                settings=settings,
                worst=settings.worst,
                charts=_curves(sweeps),
            )
        world.barrier()
    return results


def open_parts(settings: LinearProbeSettings) -> tuple[dict[str, Part], list[str]]:
    """Training, test and, where given, validation images with the labels of the training classes; and names.

    Raises:
        DataError: files are missing, or test images are of classes that training has not.
    """
    opened = {
        name: first_images(open_labelled(path), settings.limit)
        for name, path in (("train", settings.train), ("test", settings.test), ("val", settings.val))
        if path
    }
    named, names = name_classes(opened["train"], settings.classes, settings.classes_key)
    parts = {}
    for name, data in opened.items():
        title = f"{name} images"
        check_images(data.images, settings, title)
        own = named if name == "train" else _relabelled(data, opened["train"], named, title)
        parts[name] = Part(title, own)
    return parts, names


def _relabelled(
    data: LabelledImages, train: LabelledImages, named: LabelledImages, title: str
) -> LabelledImages:
    """The images with the numbers that their classes have in training."""
    # names may have put the classes in another order: seen where training images of a class went
    moved = dict(zip(train.labels.tolist(), named.labels.tolist(), strict=True))
    place = {folder: moved.get(number) for number, folder in enumerate(train.folders)}
    used = [data.folders[number] for number in np.unique(data.labels).tolist()]
    if lost := [folder for folder in used if place.get(folder) is None]:
        raise DataError(
            f"{title} are of {len(lost)} classes that the training images have not: {', '.join(lost[:10])}; those have "
            f"{', '.join(train.folders[:5])}, ..."
        )
    table = np.array([place.get(folder) or 0 for folder in data.folders], np.int64)
    return LabelledImages(data.images, table[data.labels], named.folders)


def _encode(
    encoder: DualEncoder, part: Part, cache: FeatureCache, settings: LinearProbeSettings
) -> tuple[Features, list[str]]:
    return encode_images(encoder, part.data.images, cache, settings, what=part.title, layer=settings.layer)


def _probe(
    parts: Mapping[str, Part], classes: int, settings: LinearProbeSettings, world: World
) -> tuple[dict[str, Ranks], Sweep, torch.Tensor, StandardRows]:
    """Ranks of all probes, what was tried, the weights (C, D + 1) of the linear one and the rows it was tested on."""
    train, test = parts["train"], parts["test"]
    assert train.features is not None and test.features is not None
    rows, labels = train.rows(), train.labels()
    label_of = train.data.labels
    standard = standard_of(train.features, rows, world)
    if "val" in parts:
        val = parts["val"]
        assert val.features is not None
        fitting, validating, val_labels = rows, StandardRows(val.features, val.rows(), standard), val.labels()
    else:
        fitting, held_out = split_rows(labels, rows, settings.val_share, settings.seed)
        if not len(held_out):
            raise DataError(
                f"val_share = {settings.val_share} of every class leaves no image to choose the regularisation on; "
                "give val, or a larger share"
            )
        validating, val_labels = StandardRows(train.features, held_out, standard), label_of[held_out]
    own = StandardRows(train.features, fitting, standard)
    problem = Problem(own, label_of[fitting], classes, world)
    grid = np.geomspace(settings.decay_min, settings.decay_max, settings.sweep).tolist()
    sweep, weights = choose_decay(
        problem, validating, val_labels, world, grid=grid, iterations=settings.iterations
    )
    _warn_of_edges(sweep, settings, world)
    if "val" not in parts:  # what was held out teaches as well
        problem = Problem(StandardRows(train.features, rows, standard), labels, classes, world)
        weights = problem.fit(sweep.best(), weights, settings.iterations)
    tested = StandardRows(test.features, test.rows(), standard)
    weights = weights.float().cpu()
    ranks = {PROBE: rank_classes(tested, weights, test.labels(), world)}
    if settings.neighbours:
        found = neighbour_ranks(
            train.features.rows(rows),
            labels,
            test.features.rows(test.rows()),
            test.labels(),
            classes=classes,
            ks=settings.neighbours,
            temperature=settings.temperature,
            world=world,
        )
        ranks |= {f"{k} nearest neighbour{'s' * (k > 1)}": own_ranks for k, own_ranks in found.items()}
    return ranks, sweep, weights, tested


def _warn_of_edges(sweep: Sweep, settings: LinearProbeSettings, world: World) -> None:
    tried, _ = sweep.sorted()
    if world.is_main and sweep.best() in (tried[0], tried[-1]):
        print(
            f"the best weight decay, {sweep.best():.1e}, is at the edge of the sweep; widen decay_min and decay_max "
            f"({settings.decay_min:.0e} to {settings.decay_max:.0e})",
            file=sys.stderr,
        )


def _tried(sweep: Sweep) -> dict[str, Any]:
    decays, accuracies = sweep.sorted()
    return {"best_decay": sweep.best(), "decays": decays, "accuracies": accuracies}


def _describe(part: Part, names: list[str], bad: list[str]) -> dict[str, Any]:
    return {
        "title": part.title, "images": len(part.data.images), "classes": len(names), "unusable images": bad
    }  # fmt: skip


def _curves(sweeps: Mapping[str, Sweep]) -> str:
    """The chart of what the sweeps found."""
    curves = {}
    for label, sweep in sweeps.items():
        decays, accuracies = sweep.sorted()
        curves[label] = (decays, [100 * accuracy for accuracy in accuracies])
    return html.chart(
        lines_over(curves, "weight decay", "%", "validation accuracy by weight decay"),
        "Validation accuracy of the linear probe by weight decay.",
    )
