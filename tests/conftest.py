"""Fixtures every test may use: a fixed seed, and the devices of this machine."""

from __future__ import annotations

import os
import random

# tests use small shapes and mean the kernels; processes they start inherit this
os.environ.setdefault("LLM2CLIP_SMALL_PAIRS", "0")

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# pytest --hypothesis-profile=long
hypothesis.settings.register_profile("long", max_examples=5000, deadline=None)


@pytest.fixture(autouse=True)
def seed() -> int:
    """The same random numbers for every test, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the GPU where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    return torch.device(request.param)
