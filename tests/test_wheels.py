"""What users install: the sdist is whole, the wheel built from it is right inside, and works where nothing else is."""

from __future__ import annotations

import importlib.util
import json
import shutil
import zipfile
from pathlib import Path

import pytest

from tests.test_imports import CODE, HOSTS
from tests.wheels import ROOT, Environment, build_sdist, build_wheel, closure, inspect

MISSING = [tool for tool in ("cmake", "ninja", "readelf", "nm") if shutil.which(tool) is None]
MISSING += [name for name in ("pybind11", "pip") if importlib.util.find_spec(name) is None]
if not any(map(shutil.which, ("c++", "g++", "clang++"))):
    MISSING.append("a C++ compiler")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(MISSING), reason=f"a wheel needs {', '.join(MISSING)}"),
]

KERNELS = """
import sys, torch
before = set(sys.modules)
import llm2clip_kernels as kernels
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert "llm2clip" not in new and "numpy" not in new, new
assert "site-packages" in kernels.__file__, kernels.__file__
info = kernels.build_info()
assert info["native"]["loaded"], info
torch.manual_seed(0)
x, y = (torch.nn.functional.normalize(torch.randn(300, 32), dim=1).requires_grad_() for _ in "xy")
loss = kernels.infonce_loss(x, y, torch.tensor(20.0))
loss.backward()
logits = 20 * x.double() @ y.double().T
target = torch.arange(300)
cross_entropy = torch.nn.functional.cross_entropy
plain = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
assert abs(loss.item() - plain.item()) < 1e-5, (loss, plain)
(gradient,) = torch.autograd.grad(plain, x)
assert torch.allclose(x.grad, gradient.float(), atol=1e-6)
print("kernels:", info["backends"]["similarity_lse"]["cpu float32"])
"""
LOSSES = """
import torch
from llm2clip.losses import ClipLoss
x, y = (torch.nn.functional.normalize(torch.randn(8, 16), dim=1) for _ in "xy")
assert torch.isfinite(ClipLoss()(x, y, torch.tensor(10.0)))
import llm2clip
assert "site-packages" in llm2clip.__file__
"""


def use(environment: Environment) -> None:
    """Everything that must work where the wheel, torch, Triton and numpy are, and nothing else."""
    python = str(environment.python)
    alone = closure("torch", "triton", without=("numpy",))
    assert "kernels: native" in environment.run(python, "-W", "ignore", "-c", KERNELS, lent=alone)
    plain = closure("torch", "triton", "numpy")
    assert not HOSTS & set(plain)
    environment.run(python, "-W", "ignore", "-c", LOSSES, lent=plain)
    info = json.loads(environment.run("llm2clip", "env", "--json", lent=plain))
    assert info["kernels"]["native"]["loaded"]
    said = environment.run("llm2clip", "train", "run.out=x", lent=plain, status=2)
    assert "pip install 'llm2clip[train]'" in said
    modules = ["llm2clip_kernels", "llm2clip_kernels.losses", "llm2clip", "llm2clip.losses"]
    lines = environment.run(python, "-W", "ignore", "-c", CODE, *modules, lent=plain).splitlines()
    for line in lines:
        name, seconds, _, connected = json.loads(line)
        assert connected == [] and seconds < 2.0, line
    assert len(lines) == len(modules)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sdist(tmp_path_factory.mktemp("sdist"))


def test_the_wheel_of_the_sdist_works_elsewhere(sdist: Path, tmp_path: Path) -> None:
    wheel = build_wheel(sdist, tmp_path / "cpu", cuda=False)
    found = inspect(wheel, cuda=False)
    assert found.torch_symbols and found.glibc
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(archive.read(name).decode() for name in names if name.endswith("METADATA"))
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "llm2clip").rglob("*.py")}
    modules |= {str(p.relative_to(ROOT / "kernels")) for p in (ROOT / "kernels").rglob("*.py")}
    assert modules <= names
    needs = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line
    ]
    assert sorted(need.split()[1].split(">")[0].rstrip(";") for need in needs) == ["numpy", "torch", "triton"]
    use(Environment(tmp_path / "environment", wheel))


def test_what_is_wrong_with_a_wheel_is_said(tmp_path: Path) -> None:
    wheel = tmp_path / "llm2clip-0.1.0-py3-none-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm2clip/py.typed", "")
    with pytest.raises(AssertionError, match=r"lacks .*_C\.so"):
        inspect(wheel, cuda=False)
    with pytest.raises(AssertionError, match="cp311"):
        inspect(wheel.rename(tmp_path / "llm2clip-0.1.0-cp311-cp311-linux_x86_64.whl"), cuda=False)


def test_a_lent_package_comes_with_what_it_needs() -> None:
    found = closure("torch", without=("numpy",))
    assert (
        "torch" in found
        and "typing-extensions" in found
        and "transformers" not in found
        and "numpy" not in found
    )
