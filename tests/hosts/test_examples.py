"""Every program under examples/ runs, learns, and ends with the same loss on one process and on two."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# program -> the package it is about
EXAMPLES = {"accelerate_clip.py": "accelerate", "lightning_clip.py": "lightning"}


def test_every_example_is_tested() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == EXAMPLES.keys()


def final_loss(program: str, ranks: int, folder: Path) -> float:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    )
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "examples" / program)],
        cwd=folder, capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    found = re.findall(r"^loss (\S+)$", run.stdout, flags=re.MULTILINE)
    assert len(found) == 1, run.stdout
    return float(found[0])


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("program", EXAMPLES)
def test_alone_and_on_two_processes(program: str, tmp_path: Path) -> None:
    package = EXAMPLES[program]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    alone = final_loss(program, 1, tmp_path)
    # 128 pairs a batch, which are all: knowing nothing costs log 128, and no order changes anything
    assert alone < 0.5
    assert final_loss(program, 2, tmp_path) == pytest.approx(alone, abs=3e-4)
