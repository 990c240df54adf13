"""What an import brings along: no network, no CUDA context, no host library, and little time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOSTS = {
    "transformers", "peft", "accelerate", "sentence_transformers", "open_clip", "torchvision", "timm", "lightning",
    "mteb", "clip_benchmark", "datasets", "llm2vec", "inf_cl",
}  # fmt: skip
# in this order: the kernels come first, alone
MODULES = [
    "llm2clip_kernels",
    "llm2clip_kernels.losses",
    "llm2clip",
    "llm2clip.losses",
    "llm2clip.integrations.transformers",
    "llm2clip.models",
    "llm2clip.evaluation.joint_encoder",
    "llm2clip.evaluation.clip_benchmark",
]

CODE = """
import importlib, json, sys, time
import torch
connected = []
sys.addaudithook(lambda event, _: connected.append(event) if event.startswith("socket.") else None)
def refuse(*_): raise AssertionError("CUDA was started")
torch.cuda._lazy_init = refuse
for name in sys.argv[1:]:
    before, start = set(sys.modules), time.process_time()
    importlib.import_module(name)
    seconds = time.process_time() - start
    new = sorted({module.split(".")[0] for module in set(sys.modules) - before})
    print(json.dumps([name, seconds, new, connected]))
"""


def test_imports_are_clean() -> None:
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", CODE, *MODULES],
        capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in found] == MODULES
    for name, seconds, new, connected in found:
        assert connected == [], name
        assert not HOSTS & set(new), name
        assert name.startswith("llm2clip_kernels") <= ("llm2clip" not in new), name
        # processor time beside torch's own: other work on the machine does not count
        assert seconds < 2.0, name
