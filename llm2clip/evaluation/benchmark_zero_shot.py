"""`llm2clip evaluate zero-shot`: images among class names, with one prompt, an ensemble and CuPL."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm2clip.errors import DataError
from llm2clip.evaluation.benchmark import places, setup_of, shown_model, write_captions
from llm2clip.evaluation.class_names import name_classes
from llm2clip.evaluation.classification import classification_rows, predict
from llm2clip.evaluation.classification_report import write_classification
from llm2clip.evaluation.datasets.labelled import LabelledImages, first_images, open_labelled
from llm2clip.evaluation.encoders import EncoderOpener
from llm2clip.evaluation.encoding import check_images, encode_images, encode_texts
from llm2clip.evaluation.features import FeatureCache, Features
from llm2clip.evaluation.prompts import PromptSet, prompt_sets
from llm2clip.evaluation.ranking import rank_classes
from llm2clip.evaluation.ranks import Ranks
from llm2clip.settings import ZeroShotSettings
from llm2clip.training.world import start_world


def evaluate_zero_shot(settings: ZeroShotSettings) -> dict[str, Any]:
    """Classify the images with every model and every set of prompts; print the tables and write the report.

    A class is represented by the mean of the unit-norm features of its prompts (CLIP, arXiv 2103.00020, section
    3.1.4); the class of the highest cosine similarity is the answer.

    Returns:
        What results.json holds: `zero_shot` rows with top-1 and top-5 accuracy, chance, intervals and the
        accuracy of every class; `comparisons`, `classes`, `datasets` and `setup`.

    Raises:
        ConfigError: a setting is missing or unknown.
        DataError: images, class names or prompts cannot be used.
        ModelError, StoreError: a model or its captions cannot be used.
    """
    begin = time.monotonic()
    data, names = name_classes(open_labelled(settings.images), settings.classes, settings.classes_key)
    data = first_images(data, settings.limit)
    sets = prompt_sets(settings.prompts, names, settings.cupl, settings.classes_key)
    texts = list(dict.fromkeys(text for one in sets for own in one.prompts for text in own))
    if settings.prompts_out:
        count = write_captions(settings.prompts_out, texts)
        print(f"{count} different prompts in {settings.prompts_out}")
        return {"prompts": count}
    title = Path(settings.images).name
    check_images(data.images, settings, title)
    out, place = places(settings)
    with start_world(settings.device, settings.threads) as world:
        cache = FeatureCache(place, world)
        opener = EncoderOpener(settings, world.device, place)
        ranks: dict[tuple[str, str], Ranks] = {}
        models: dict[str, Any] = {}
        for label in settings.models:
            encoder = opener.open(label)
            models[label] = encoder.describe()
            encoder.check_texts(texts, "the prompts")
            features, bad = encode_images(encoder, data.images, cache, settings, what=title)
            usable = np.flatnonzero(features.valid())
            labels, images = data.labels[usable], features.rows(usable)
            prompts = encode_texts(encoder, texts, cache, what="prompts")
            for one in sets:
                classes = class_features(one, texts, prompts)
                ranks[one.title, label] = rank_classes(images, classes, labels, world)
            del encoder
        rows, comparisons = classification_rows(ranks, labels, len(names), "prompts", settings)
        results = {
            "zero_shot": rows,
            "comparisons": comparisons,
            "classes": names,
            "datasets": {"images": _describe(title, data, names, bad)},
            "setup": setup_of(settings, models, time.monotonic() - begin, world.size),
        }
        if world.is_main:
            # of the last model and the last set of prompts, which are those just computed
            last = sets[-1].title, shown_model(models)
            said = predict(f"{last[1]}, {last[0]}", images, classes, usable, labels, ranks[last])
            write_classification(
                out,
                results,
                rows,
                said,
                data.images,
                what="prompts",
                title="Zero-shot classification",
                note="Accuracy in %; mean per class weighs all classes equally.",
                settings=settings,
                worst=settings.worst,
            )
        world.barrier()
    return results


def class_features(prompts: PromptSet, texts: Sequence[str], features: Features) -> Tensor:
    """Unit-norm mean of the unit-norm features of every class's prompts, (C, D) fp32.

    Args:
        prompts: the prompts of every class.
        texts: all texts that have features.
        features: of `texts`.
    """
    row_of = {text: row for row, text in enumerate(texts)}
    unit = features.rows()
    means = [unit[[row_of[text] for text in own]].mean(dim=0) for own in prompts.prompts]
    return torch.nn.functional.normalize(torch.stack(means), dim=1)


def _describe(title: str, data: LabelledImages, names: Sequence[str], bad: list[str]) -> dict[str, Any]:
    if len(data.images) < 2:
        raise DataError(f"{title}: {len(data.images)} images, expected at least 2")
    return {"title": title, "images": len(data.images), "classes": len(names), "unusable images": bad}
