"""`torchrun -m llm2clip embed` with a real encoder: uneven shares, a killed rank, another number of ranks after it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from llm2clip.data.store import EmbeddingStore, verify_store
from llm2clip.models import CaptionEncoder
from tests.tiny_models import save_tiny

ROOT = Path(__file__).resolve().parents[1]


def start(config: Path, ranks: int) -> subprocess.Popen[str]:
    """The command as a user types it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}",
         "-m", "llm2clip", "embed", "--config", str(config)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def write_job(folder: Path, captions: list[str]) -> Path:
    save_tiny(folder / "llm")
    (folder / "train.jsonl").write_text("".join(json.dumps({"caption": text}) + "\n" for text in captions))
    config = {
        "data": {"train": [str(folder / "train.jsonl")]},
        "llm": {"path": str(folder / "llm")},
        "out": str(folder / "store"),
        "dtype": "fp32",
        "commit_rows": 16,
        "device": "cpu",
    }
    (folder / "run.yaml").write_text(json.dumps(config))  # JSON is YAML
    return folder / "run.yaml"


def rank_of(process: psutil.Process) -> str:
    return str(process.environ().get("LOCAL_RANK", ""))


@pytest.mark.dist
@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_loses_nothing_that_was_written(tmp_path: Path) -> None:
    """601 captions on two ranks, then on three: shares differ in size. Rank 0 is the one that writes the result."""
    captions = [f"caption {i} x" + "x" * (i * 37 % 120) for i in range(601)]
    config = write_job(tmp_path, captions)
    store = tmp_path / "store"
    job = start(config, 2)
    try:
        watched = store / "rank-001" / "index.json"
        deadline = time.monotonic() + 120
        while not (watched.exists() and json.loads(watched.read_text())["shards"]):
            assert time.monotonic() < deadline and job.poll() is None, job.communicate()[0]
            time.sleep(0.01)
        workers = {rank_of(child): child for child in psutil.Process(job.pid).children()}
        workers["0"].send_signal(signal.SIGKILL)
        log = job.communicate(timeout=120)[0]
    finally:
        job.kill()
    assert job.returncode != 0 and "Signal 9 (SIGKILL)" in log, log
    assert not workers["0"].is_running() and not workers["1"].is_running(), "the other rank ended too"
    kept = len(EmbeddingStore.open(store)) + len(EmbeddingStore.open(store / "rank-001"))
    assert 16 <= kept < len(captions)

    job = start(config, 3)
    log = job.communicate(timeout=180)[0]
    assert job.returncode == 0 and log.count("601 embeddings of dimension") == 1, log
    summary = json.loads((store / "embed.json").read_text())
    assert (summary["unique"], summary["embedded"]) == (601, 601 - kept), "nothing is computed twice"
    found = EmbeddingStore.open(store)
    assert found.complete and len(found) == 601 and verify_store(store).ok
    assert not list(store.glob("rank-*"))
    want = CaptionEncoder.from_pretrained(tmp_path / "llm").encode(captions)
    assert torch.allclose(found.get(captions), want, atol=1e-5)
