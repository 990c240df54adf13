"""The Python of docs/contrastive-losses.md runs, and what a drop-in gives after is what its host gave before."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).resolve().parents[1] / "docs" / "contrastive-losses.md"
HOSTS = {"open_clip", "sentence_transformers", "llm2vec", "inf_cl"}


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def missing_host(block: str) -> str | None:
    # Inf-CL's kernels run on a GPU only
    found = set(re.findall(r"^from (\w+)", block, flags=re.MULTILINE)) & HOSTS
    for name in found:
        if name == "inf_cl" and not torch.cuda.is_available():
            return name
        try:
            importlib.import_module(name)
        except ImportError:
            # LLM2Vec, where it is installed, does not load beside transformers 5
            return name
    return None


def test_every_block_runs_and_the_drop_ins_agree() -> None:
    names: dict[str, Any] = {}
    compared, skipped, ran = [], [], 0
    for block in blocks():
        host = missing_host(block)
        if host is None and "llm2clip.integrations.sentence_transformers" in block:
            host = None if importlib.util.find_spec("sentence_transformers") else "sentence_transformers"
        if host is not None:
            skipped.append(host)
            names.pop("before", None)
            continue
        exec(compile(block, str(PAGE), "exec"), names)
        ran += 1
        for name in ("loss", "after"):
            if re.search(rf"^{name} = ", block, flags=re.MULTILINE):
                assert torch.isfinite(names[name]).all(), block
        if "after" in names and "before" in names:
            torch.testing.assert_close(names.pop("after"), names.pop("before"), rtol=1e-4, atol=1e-5)
            compared.append(block)
        names.pop("after", None)
    assert ran + len(skipped) == len(blocks()) and ran >= 9
    if "sentence_transformers" not in skipped:
        assert any("sentence_transformers" in block for block in compared)


@pytest.mark.parametrize("name", ["ClipLoss", "HardNegativeNLLLoss", "cal_inf_loss", "ranking_loss"])
def test_the_page_shows(name: str) -> None:
    assert any(name in block for block in blocks())
