"""Sample queries of caption retrieval for the report: hits and misses with the captions that were retrieved."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from llm2clip.evaluation.benchmark_samples import best_answers
from llm2clip.evaluation.caption_measures import rank_pairs
from llm2clip.evaluation.captions import CaptionData
from llm2clip.evaluation.ranks import group_ids
from llm2clip.evaluation.samples import Answer, QuerySample, draw_queries
from llm2clip.settings import CaptionRetrievalSettings


def sample_queries(
    data: Mapping[str, CaptionData], embed: Callable[[list[str]], Tensor], settings: CaptionRetrievalSettings
) -> dict[str, list[QuerySample]]:
    """Queries of the first pairs of every set, with their best answers.

    Args:
        data: the sets.
        embed: texts -> embeddings (n, D) of one encoder.
        settings: how many, and the seed.

    Returns:
        Heading -> queries.
    """
    found: dict[str, list[QuerySample]] = {}
    for name, one in data.items():
        if settings.samples == 0:
            continue
        pairs = one.pairs[0]
        first, second = (
            torch.nn.functional.normalize(embed(texts), dim=1) for texts in (pairs.first, pairs.second)
        )
        ranks = rank_pairs(first, second, pairs, shared=settings.shared).forward.expected_rank()
        groups = group_ids(pairs.first, pairs.second)
        queries = []
        for query in draw_queries(ranks, settings.samples, settings.seed):
            right = (
                np.array([query]) if settings.shared == "wrong" else np.flatnonzero(groups == groups[query])
            )
            answers = [
                Answer(place, similarity, bool((right == row).any()), None, pairs.second[row])
                for place, row, similarity in best_answers(first, second, query, right, ranks[query])
            ]
            rank = max(1, round(float(ranks[query])))
            queries.append(QuerySample(pairs.name, rank, len(second), answers, text=pairs.first[query]))
        found[f"{name}: {pairs.labels[0]}"] = queries
    return found
