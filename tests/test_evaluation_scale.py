"""A gallery of a million images: bounded memory, exact ranks, a fraction of a minute."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, resource, sys, time
from pathlib import Path
import numpy as np
import torch
from llm2clip.evaluation.features import FeatureCache
from llm2clip.evaluation.ranking import Pairing, rank_directions
from llm2clip.evaluation.ranks import TIE_TOLERANCE, summarise
from llm2clip.training.world import World

IMAGES, TEXTS, DIM = 1_000_000, 500, 16
world = World(0, 1, torch.device("cpu"))
cache = FeatureCache(Path(sys.argv[1]), world, block_rows=1 << 16)

def images(rows):
    for start in range(0, len(rows), 1 << 16):
        generator = torch.Generator().manual_seed(rows[start])
        yield torch.randn(min(1 << 16, len(rows) - start), DIM, generator=generator)

gallery = cache.array("images", {}, IMAGES, images)
owner = np.arange(TEXTS) * 997
near = torch.nn.functional.normalize(torch.from_numpy(gallery.gather(owner)), dim=1)
texts = cache.array("texts", {}, TEXTS, lambda rows: iter([near + 0.1 * torch.randn(TEXTS, DIM)]))
groups = np.full(IMAGES, -1)
groups[owner] = np.arange(TEXTS)
pairing = Pairing(np.arange(IMAGES), np.arange(TEXTS), groups, np.arange(TEXTS), np.arange(TEXTS))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
both = rank_directions(texts.rows(), gallery.rows(), pairing, world)
seconds = time.process_time() - start
scores = summarise(both.text_to_image)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
x, y = texts.rows()[:64].double(), gallery.rows()
above = torch.zeros(64, dtype=torch.int64)
for first in range(0, IMAGES, 1 << 17):
    own = (x * y[owner[:64]].double()).sum(1)[:, None]
    above += (x @ y[first : first + (1 << 17)].double().T > own + TIE_TOLERANCE).sum(1)
print(json.dumps({
    "grown": grown, "seconds": seconds,
    "equal": above.tolist() == both.text_to_image.above[:64].tolist(), "r1": scores["recall"]["1"],
    "asked": len(both.image_to_text.above), "gallery": scores["gallery"], "chance": scores["chance"]["1"],
}))
"""


@pytest.mark.slow
def test_a_million_images(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["equal"], "ranks are those of fp64 products"
    assert found["gallery"] == 1_000_000 and found["asked"] == 500
    assert found["chance"] == pytest.approx(1e-6)
    assert 0.05 < found["r1"] < 1, "a case that is neither trivial nor hopeless"
    # the features take 61 MiB, their matrix of similarities would take 1,907
    assert found["grown"] < 300
    # of the processor: other work on the machine does not count
    assert found["seconds"] < 120
