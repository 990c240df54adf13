"""CLIP_benchmark's own command with our model type: its figures are those of the features."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision", reason="torchvision, which CLIP_benchmark needs, is not installed")
pytest.importorskip("clip_benchmark", reason="CLIP_benchmark is not installed")

from clip_benchmark import models  # noqa: E402

from llm2clip.evaluation.clip_benchmark import load, register  # noqa: E402
from llm2clip.evaluation.joint_encoder import JointEncoder  # noqa: E402
from tests.data_files import write_tar  # noqa: E402
from tests.tiny_llm2clip import pictures, save_both, sentences  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
ITEMS = 12


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return save_both(tmp_path_factory.mktemp("clip_benchmark"))


def write_data(folder: Path, extra: dict[str, str]) -> Path:
    """Twelve pictures as CLIP_benchmark reads them, with a caption and a class each."""
    (folder / "test").mkdir(parents=True)
    members = []
    for index, (image, text) in enumerate(zip(pictures(ITEMS), sentences(ITEMS), strict=True)):
        image.save(folder / "one.png")
        members += [
            (f"{index:03d}.png", (folder / "one.png").read_bytes()),
            (f"{index:03d}.txt", text.encode()),
            (f"{index:03d}.cls", str(index % 3).encode()),
        ]
    write_tar(folder / "test" / "0.tar", members)
    (folder / "test" / "nshards.txt").write_text("1")
    for name, content in extra.items():
        (folder / name).write_text(content)
    return folder


def measured(folder: Path, saved: tuple[Path, Path, Path], task: str, *more: str) -> dict[str, Any]:
    llm, adapter, clip = saved
    out = folder / "result.json"
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [
            sys.executable, "-m", "llm2clip.evaluation.clip_benchmark", "eval", "--model_type", "llm2clip",
            "--model", str(clip), "--pretrained", f"{llm}+{adapter}", "--dataset", "wds/pictures",
            "--dataset_root", str(folder), "--task", task, "--output", str(out), "--num_workers", "0",
            "--batch_size", "4", "--no_amp", *more,
        ],
        cwd=folder, capture_output=True, text=True, timeout=200, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    metrics: dict[str, Any] = json.loads(out.read_text())["metrics"]
    return metrics


@pytest.mark.slow
def test_retrieval(saved: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data", {"dataset_type.txt": "retrieval"})
    metrics = measured(folder, saved, "zeroshot_retrieval", "--recall_k", "1", "3", "5")
    joint = JointEncoder.from_pretrained(saved[2], saved[0], adapter=saved[1])
    similarity = joint.encode_texts(sentences(ITEMS)) @ joint.encode_images(pictures(ITEMS)).T
    for name, scores in (("image", similarity), ("text", similarity.T)):
        better = (scores > scores.diagonal()[:, None]).sum(1)
        for k in (1, 3, 5):
            want = (better < k).double().mean().item()
            assert metrics[f"{name}_retrieval_recall@{k}"] == pytest.approx(want, abs=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(
    tuple(int(part) for part in np.__version__.split(".")[:2]) >= (2, 4),
    reason="CLIP_benchmark 1.6.2 turns an array of one number into a float, which numpy 2.4 refuses",
)
def test_classification(saved: tuple[Path, Path, Path], tmp_path: Path) -> None:
    names, templates = ["red", "a house", "water"], ["a photo of {c}", "{c} in a picture"]
    extra = {
        "classnames.txt": "\n".join(names),
        "zeroshot_classification_templates.txt": "\n".join(templates),
    }
    metrics = measured(write_data(tmp_path / "data", extra), saved, "zeroshot_classification")
    joint = JointEncoder.from_pretrained(saved[2], saved[0], adapter=saved[1])
    classes = torch.stack(
        [joint.encode_texts([t.format(c=name) for t in templates]).mean(0) for name in names]
    )
    classes = torch.nn.functional.normalize(classes, dim=1)
    found = (joint.encode_images(pictures(ITEMS)) @ classes.T).argmax(1)
    want = (found == torch.arange(ITEMS) % 3).double().mean().item()
    assert metrics["acc1"] == pytest.approx(want, abs=1e-6)


def test_loader_and_registration(saved: tuple[Path, Path, Path]) -> None:
    llm, adapter, clip = saved
    with register() as handle:
        assert "llm2clip" in models.MODEL_TYPES and register() is not None
        model, transform, tokenizer = models.load_clip("llm2clip", str(clip), f"{llm}+{adapter}", "", "cpu")
        handle.undo()
        assert "llm2clip" not in models.MODEL_TYPES and "llm2clip" not in models.TYPE2FUNC
    joint = JointEncoder.from_pretrained(clip, llm, adapter=adapter)
    rows = tokenizer(sentences(5))
    assert rows.dtype == torch.int64 and rows.min() == -1
    want = joint.encode_texts(sentences(5))
    torch.testing.assert_close(model.encode_text(rows), want)
    # the LLM's precision is its own
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.encode_text(rows), want)
    pixels = torch.stack([transform(image) for image in pictures(3)])
    torch.testing.assert_close(model.encode_image(pixels), joint.encode_images(pictures(3)))
    with pytest.raises(Exception, match="not the one whose embeddings"):
        load(str(clip), str(llm))
