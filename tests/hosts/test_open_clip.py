"""open_clip, 3.3 and 4: signatures, the patch and its undoing, and its own trainer's losses and weights with both."""

from __future__ import annotations

import csv
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

pytest.importorskip("torchvision", reason="torchvision, which open_clip needs, is not installed")
open_clip: Any = pytest.importorskip("open_clip", reason="open_clip is not installed")
pytest.importorskip("webdataset", reason="webdataset, which open_clip's trainer needs, is not installed")

from llm2clip import losses  # noqa: E402
from llm2clip.integrations.open_clip import patch  # noqa: E402
from tests.gloo import run_on_ranks  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("ClipLoss", "SigLipLoss", "CoCaLoss", "DistillClipLoss")
BATCH, STEPS = 4, 6
TOWERS: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
MODELS = {
    "tiny": TOWERS,
    "tiny-sigmoid": {**TOWERS, "init_logit_bias": -10, "custom_text": True},
    "coca_tiny": {
        **TOWERS,
        "vision_cfg": {**TOWERS["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {**TOWERS["text_cfg"], "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {
            "context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1,
            "attn_pooler_heads": 2,
        },
        "custom_text": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name: str) -> None:
    """Whatever can be passed to the original, by position or name, means the same here."""
    original, fused = getattr(open_clip.loss, name), getattr(losses, name)
    for method in ("__init__", "forward", "get_logits", "get_ground_truth"):
        wanted, found = (inspect.signature(getattr(kind, method)).parameters for kind in (original, fused))
        assert list(found)[: len(wanted)] == list(wanted), method
        for parameter in wanted.values():
            assert found[parameter.name].default == parameter.default, (method, parameter)
            assert found[parameter.name].kind == parameter.kind


def test_patch_and_undo() -> None:
    originals = {name: getattr(open_clip.loss, name) for name in NAMES}
    arguments = SimpleNamespace(
        distill=False, siglip=False, model="tiny", local_loss=False, gather_with_grad=False, rank=0,
        world_size=1, horovod=False, loss_dist_impl=None, coca_caption_loss_weight=2.0,
        coca_contrastive_loss_weight=1.0, torchcompile=False,
    )  # fmt: skip
    with patch() as handle:
        assert open_clip.ClipLoss is open_clip.loss.ClipLoss is open_clip.factory.ClipLoss is losses.ClipLoss
        assert patch().undo() is None and open_clip.ClipLoss is losses.ClipLoss, "the first patch still holds"
        for name, changes in {
            "ClipLoss": {},
            "SigLipLoss": {"siglip": True},
            "CoCaLoss": {"model": "coca_tiny"},
            "DistillClipLoss": {"distill": True},
        }.items():
            made = open_clip.create_loss(SimpleNamespace(**{**vars(arguments), **changes}))
            assert type(made) is getattr(losses, name)
    for name, original in originals.items():
        assert getattr(open_clip.loss, name) is getattr(open_clip.factory, name) is original
    assert open_clip.ClipLoss is originals["ClipLoss"]
    handle.undo()
    assert type(open_clip.create_loss(arguments)) is originals["ClipLoss"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model configurations, a teacher's weights, and a csv of images with captions of their own."""
    root: Path = tmp_path_factory.mktemp("open_clip")
    (root / "models").mkdir()
    for name, configuration in MODELS.items():
        (root / "models" / f"{name}.json").write_text(json.dumps(configuration))
    random = np.random.default_rng(0)
    with open(root / "pairs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filepath", "title"])
        for index in range(BATCH * STEPS * 2):
            image = Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            image.save(root / f"{index}.png")
            writer.writerow([str(root / f"{index}.png"), f"picture {index} of {index % 7} things"])
    open_clip.add_model_config(root / "models")
    torch.manual_seed(5)
    torch.save(open_clip.create_model("tiny").state_dict(), root / "teacher.pt")
    # open_clip leaves a matrix of CoCa's decoder uninitialised
    coca = open_clip.create_model("coca_tiny")
    torch.nn.init.normal_(coca.text_decoder.text_projection, std=0.02)
    torch.save(coca.state_dict(), root / "coca.pt")
    return root


def train(folder: Path, logs: Path, *arguments: str) -> dict[str, tuple[list[list[float]], Any]]:
    """For the original's run and the fused one, the losses of every step that was logged, and the weights after."""
    command = [
        sys.executable, "-m", "tests.hosts.open_clip_run", str(folder / "models"), str(logs),
        "--train-data", str(folder / "pairs.csv"), "--csv-separator", ",", "--dataset-type", "csv",
        "--batch-size", str(BATCH), "--epochs", "1", "--workers", "0", "--warmup", "1", "--lr", "1e-3",
        # what has no gradient but rounding must not move by its sign
        "--eps", "1e-3",
        "--device", "cpu", "--precision", "fp32", "--log-every-n-steps", "1",
        *arguments,
    ]  # fmt: skip
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": paths, "LLM2CLIP_SMALL_PAIRS": "0"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    results = {}
    for name in ("original", "fused"):
        log = (logs / name / "out.log").read_text()
        lines = [line for line in log.splitlines() if "Train Epoch" in line]
        found = [[float(value) for value in re.findall(r"[Ll]oss: (\S+) \(", line)] for line in lines]
        assert len(found) >= 2 and all(found), log
        saved = torch.load(logs / name / "checkpoints" / "epoch_1.pt", weights_only=True)
        results[name] = found, saved["state_dict"]
    return results


RUNS = {
    "clip": ["--model", "tiny"],
    "accumulated": ["--model", "tiny", "--accum-freq", "2"],
    "sigmoid": ["--model", "tiny-sigmoid", "--siglip"],
    "coca": ["--model", "coca_tiny", "--pretrained", "coca.pt"],
    "distill": ["--model", "tiny", "--distill-model", "tiny", "--distill-pretrained", "teacher.pt"],
}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_its_own_trainer(folder: Path, tmp_path: Path, run: str) -> None:
    arguments = [str(folder / word) if word.endswith(".pt") else word for word in RUNS[run]]
    results = train(folder, tmp_path, *arguments)
    (want, weights), (got, fused) = results["original"], results["fused"]
    assert len(got) == len(want) and len(got[0]) == len(want[0]) >= 1
    for line, true in zip(got, want, strict=True):
        assert line == pytest.approx(true, rel=2e-4)
    assert fused.keys() == weights.keys()
    for key, true in weights.items():
        torch.testing.assert_close(
            fused[key], true, rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.slow
def test_its_synthetic_data(folder: Path, tmp_path: Path) -> None:
    """Every sample of it is the same, so the loss is log of the batch size, and stays there."""
    arguments = ["--model", "tiny", "--dataset-type", "synthetic", "--train-num-samples", "16"]
    for found, _ in train(folder, tmp_path, *arguments).values():
        assert found[0][0] == pytest.approx(np.log(BATCH), rel=1e-4)


def test_losses_passed_in() -> None:
    """open_clip 4's task with the loss given by the caller: value and gradients of the original."""
    task = pytest.importorskip("open_clip.task", reason="open_clip.task came with open_clip 4")
    torch.manual_seed(0)
    batch = {"image": torch.randn(5, 3, 32, 32), "text": torch.randint(1, 400, (5, 16))}
    for task_name, loss_name, configuration in (
        ("CLIPTask", "ClipLoss", MODELS["tiny"]),
        ("SigLIPTask", "SigLipLoss", MODELS["tiny-sigmoid"]),
    ):
        results = []
        for kind in (None, getattr(losses, loss_name)):
            torch.manual_seed(1)
            options = {key: value for key, value in configuration.items() if key != "custom_text"}
            model = open_clip.CLIP(**options, output_dict=True)
            chosen = {} if kind is None else {"loss": kind()}
            made = getattr(task, task_name)(model, device=torch.device("cpu"), verbose=False, **chosen)
            found, _ = made.training_forward(batch)
            found["loss"].backward()
            results.append(
                [found["loss"].detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
            )
        assert len(results[0]) == len(results[1]) > 10
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_direct_use() -> None:
    """The loss of a loop of one's own, with the names that open_clip's models return."""
    image, text = (F.normalize(torch.randn(7, 12), dim=1) for _ in range(2))
    model_out = {"image_features": image, "text_features": text, "logit_scale": torch.tensor(9.0)}
    for name, more in (("ClipLoss", {}), ("SigLipLoss", {"logit_bias": torch.tensor(-3.0)})):
        want = getattr(open_clip.loss, name)()(**model_out, **more, output_dict=True)
        got = getattr(losses, name)()(**model_out, **more, output_dict=True)
        assert got.keys() == want.keys()
        torch.testing.assert_close(got["contrastive_loss"], want["contrastive_loss"], rtol=1e-5, atol=1e-6)


def unit(rows: int, seed: int, dim: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, dtype=torch.float64, generator=generator), dim=1)


def check_ranks(rank: int, world: int) -> None:
    """Every flag of every loss over real ranks: open_clip's trainer itself takes no CPU for more than one."""
    mine = slice(4 * rank, 4 * rank + 4)
    image, text, teacher_image, teacher_text = (unit(4 * world, seed)[mine] for seed in range(4))
    logits = torch.randn(4, 5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    labels = torch.arange(20).reshape(4, 5) % 11
    for local, with_grad in itertools.product((False, True), (False, True)):
        flags = {"local_loss": local, "gather_with_grad": with_grad, "rank": rank, "world_size": world}
        for name, first, more in (
            ("ClipLoss", {}, {}),
            ("CoCaLoss", {"caption_loss_weight": 2.0, "clip_loss_weight": 0.5}, {"labels": labels}),
            (
                "DistillClipLoss",
                {},
                {
                    "dist_image_features": teacher_image,
                    "dist_text_features": teacher_text,
                    "dist_logit_scale": 5.0,
                },
            ),
        ):
            results = []
            for module in (open_clip.loss, losses):
                leaves = {
                    "image_features": image,
                    "text_features": text,
                    "logit_scale": torch.tensor(7.0).double(),
                }
                if name == "CoCaLoss":
                    leaves["logits"] = logits
                leaves = {key: leaf.clone().requires_grad_() for key, leaf in leaves.items()}
                found = getattr(module, name)(**first, **flags)(**leaves, **more, output_dict=True)
                sum(found.values()).backward()
                # the two sides' gradients of the scale differ from rank to rank, their sum is what DDP sees
                dist.all_reduce(leaves["logit_scale"].grad)
                results.append([*found.values(), *(leaf.grad for leaf in leaves.values())])
            for want, got in zip(*results, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12, msg=f"{name} {flags}")


@pytest.mark.dist
def test_two_ranks() -> None:
    run_on_ranks(2, check_ranks)
