"""Our models in MTEB: its own tasks for checking a model run through, and scores are those of the features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

mteb: Any = pytest.importorskip("mteb", reason="mteb is not installed")

from datasets import Dataset  # noqa: E402
from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402

from llm2clip.evaluation.joint_encoder import JointEncoder  # noqa: E402
from llm2clip.evaluation.mteb import MTEBModel  # noqa: E402
from llm2clip.models import CaptionEncoder  # noqa: E402
from tests.tiny_llm2clip import pictures, save_both, sentences  # noqa: E402

ITEMS = 12


class Pictures(AbsTaskRetrieval):
    """Find the picture of a caption, offline."""

    metadata = TaskMetadata(
        name="TinyPictures", description="Pictures and captions.", reference=None, type="Any2AnyRetrieval",
        category="t2i", modalities=["text", "image"], eval_splits=["test"], eval_langs=["eng-Latn"],
        main_score="hit_rate_at_5", dataset={"path": "none", "revision": "none"}, date=None, domains=None,
        task_subtypes=None, license=None, annotations_creators=None, dialect=None, sample_creation=None,
        bibtex_citation=None,
    )  # fmt: skip

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        queries = [{"id": f"q{i}", "text": text} for i, text in enumerate(sentences(ITEMS))]
        corpus = [{"id": f"d{i}", "image": image} for i, image in enumerate(pictures(ITEMS))]
        split = RetrievalSplitData(
            queries=Dataset.from_list(queries), corpus=Dataset.from_list(corpus),
            relevant_docs={f"q{i}": {f"d{i}": 1} for i in range(ITEMS)}, top_ranked=None,
        )  # fmt: skip
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return save_both(tmp_path_factory.mktemp("mteb"))


@pytest.fixture(scope="module")
def joint(saved: tuple[Path, Path, Path]) -> JointEncoder:
    llm, adapter, clip = saved
    return JointEncoder.from_pretrained(clip, llm, adapter=adapter)


def test_scores_are_those_of_the_features(joint: JointEncoder) -> None:
    results = mteb.evaluate(MTEBModel(joint, "tests/llm2clip"), Pictures(), cache=None)
    scores = results.task_results[0].scores["test"][0]
    similarity = joint.encode_texts(sentences(ITEMS)) @ joint.encode_images(pictures(ITEMS)).T
    found = (similarity > similarity.diagonal()[:, None]).sum(1)
    for k in (1, 3, 5, 10):
        assert scores[f"hit_rate_at_{k}"] == pytest.approx((found < k).double().mean().item(), abs=1e-4)
    assert 0 < scores["main_score"] < 1, "the case must have hits and misses"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["captions", "both"])
def test_every_kind_of_task_runs(kind: str, saved: tuple[Path, Path, Path], joint: JointEncoder) -> None:
    """mteb's own tiny tasks: retrieval, classification, clustering, pairs, similarity, zero-shot, ..."""
    encoder: Any = joint if kind == "both" else CaptionEncoder.from_pretrained(saved[0])
    found = mteb.mock_run(MTEBModel(encoder, f"tests/{kind}"))
    ran = {name: status for name, status in found.items() if status is not None}
    assert found.all_passed, {name: status for name, status in ran.items() if hasattr(status, "exception")}
    assert len(ran) > (25 if kind == "both" else 15), sorted(ran)


def test_what_the_model_says_of_itself(saved: tuple[Path, Path, Path], joint: JointEncoder) -> None:
    captions = CaptionEncoder.from_pretrained(saved[0], max_length=77)
    text_only, both = MTEBModel(captions, "tests/captions", "7"), MTEBModel(joint, "tests/both")
    meta = text_only.mteb_model_meta
    assert (meta.name, meta.revision, meta.modalities) == ("tests/captions", "7", ["text"])
    assert (meta.embed_dim, meta.max_tokens) == (captions.dim, 77)
    assert both.mteb_model_meta.embed_dim == 6 and set(both.mteb_model_meta.modalities) == {"text", "image"}
    assert meta.n_parameters == sum(p.numel() for p in captions.parameters())
    # an empty text, which some corpora have, is no error
    assert text_only.encode([{"text": ["", "a"]}]).shape == (2, captions.dim)
    torch.testing.assert_close(text_only.encode([{"text": ["a"]}]), captions.encode(["a"], normalize=True))
    with pytest.raises(ValueError, match="images need the CLIP model too"):
        text_only.encode([{"image": pictures(1)}])
    with pytest.raises(ValueError, match=r"text or image, this one has \['audio'\]"):
        both.encode([{"audio": [0]}])
