"""The library that was built and the wheel's name: one binary for every Python and every torch >= 2.10."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kernels" / "llm2clip_kernels"
LIBRARY = PACKAGE / "_C.so"

built = pytest.mark.skipif(not LIBRARY.is_file(), reason="the native library is not built in place")


def tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@built
def test_needs_libtorch_and_no_cuda() -> None:
    needed = [line for line in tool("readelf", "-d", str(LIBRARY)).splitlines() if "NEEDED" in line]
    libraries = " ".join(needed)
    # the name that brings libtorch_cuda.so in, where the stream symbol is found
    assert "[libtorch.so]" in libraries
    for forbidden in ("libcudart", "libcuda", "libtorch_python", "libpython", "libc10"):
        assert forbidden not in libraries, libraries


@built
def test_asks_torch_for_stable_symbols_only() -> None:
    lines = tool("nm", "-D", "--undefined-only", str(LIBRARY)).splitlines()
    symbols = {line.split()[-1]: line.split()[-2] for line in lines}
    mangled = [
        name for name in symbols if name.startswith(("_ZN2at", "_ZN3c10", "_ZN5torch", "_ZNK2at", "_ZNK3c10"))
    ]
    assert not mangled, mangled
    record = json.loads((PACKAGE / "build_record.json").read_text())
    if record["cuda_sources"]:
        assert symbols["aoti_torch_get_current_cuda_stream"] == "w"


@built
def test_record_says_what_was_built() -> None:
    from llm2clip_kernels import build_info

    info = build_info()
    assert info["native"]["loaded"] and info["native"]["torch_minimum"] == "2.10"
    assert info["cpu_capability"] in ("portable", "avx2", "avx512")
    if info["native"]["cuda_sources"]:
        assert info["native"]["cuda"] and info["native"]["architectures"]


def test_the_record_lists_every_op() -> None:
    from llm2clip_kernels import build_info

    ops = {path.parent.name for path in PACKAGE.glob("*/op.py")}
    assert len(ops) >= 10 and set(build_info()["backends"]) == ops


def test_serves_without_native_library_and_triton_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "sys.modules['triton'] = None\n"
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "import llm2clip_kernels\n"
        "heavy = {'transformers', 'peft', 'sympy', 'numpy.testing', 'torch._dynamo', 'torch._inductor'}\n"
        "assert not heavy & (set(sys.modules) - before), heavy & set(sys.modules)\n"
        "info = llm2clip_kernels.build_info()\n"
        "assert info['triton'] is None and not info['native']['loaded']\n"
        "assert {b for of in info['backends'].values() for b in of.values()} == {'chunked'}, info\n"
        "x = torch.eye(4, requires_grad=True)\n"
        "llm2clip_kernels.infonce_loss(x, x, 2.0).backward()\n"
        "y = llm2clip_kernels.lora_linear(x, x, None, x[:2], x[:, :2], 2.0, dropout_p=0.5)\n"
        "assert torch.equal(y[2:], x[2:]) and x.grad is not None\n"
    )
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "LLM2CLIP_DISABLE_NATIVE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def metadata(tmp_path: Path, **env: str) -> tuple[str, str]:
    """What `setup.py` answers about the wheel without building: its tag and packages, and its warnings."""
    code = (
        "import distutils.core, sys, setuptools\n"
        "sys.argv = ['setup.py', '-q', 'egg_info', '-e', sys.argv[1]]\n"
        "dist = distutils.core.run_setup('setup.py', stop_after='commandline')\n"
        "command = dist.get_command_obj('bdist_wheel'); command.ensure_finalized()\n"
        "print('-'.join(command.get_tag())); print(*sorted(dist.packages))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)],
        cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_wheel_serves_every_python(tmp_path: Path) -> None:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    tag, *packages = metadata(tmp_path)[0].split()
    assert tag.startswith("py3-none-linux_")
    assert {"llm2clip", "llm2clip.data", "llm2clip_kernels", "llm2clip_kernels.similarity_lse"} <= set(
        packages
    )
    assert not any(name.split(".")[0] in ("tests", "benchmarks", "kernels") for name in packages)


def test_pure_python_wheel(tmp_path: Path) -> None:
    assert metadata(tmp_path, LLM2CLIP_NO_NATIVE="1")[0].startswith("py3-none-any")
    out, err = metadata(tmp_path, PATH=str(tmp_path), CXX="")
    assert out.startswith("py3-none-any")
    assert err.count("no C++ compiler found") == 1


def configure(tmp_path: Path, *options: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    cmake = shutil.which("cmake")
    if cmake is None or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no cmake or no C++ compiler")
    env = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDA_PATH", "CUDA_HOME")}
    command = [
        cmake,
        "-S",
        str(ROOT),
        "-B",
        str(tmp_path / "build"),
        f"-DLLM2CLIP_OUTPUT_DIR={tmp_path}",
        *options,
    ]
    command += [f"-DPython_EXECUTABLE={sys.executable}", "-DLLM2CLIP_HOST=OFF"]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_cuda_switch(tmp_path: Path) -> None:
    wrong = configure(tmp_path, "-DLLM2CLIP_CUDA=YES")
    assert wrong.returncode != 0 and "expected AUTO, ON or OFF" in wrong.stderr
    off = configure(tmp_path, "-DLLM2CLIP_CUDA=OFF")
    assert off.returncode == 0, off.stderr
    assert json.loads((tmp_path / "build_record.json").read_text())["cuda_sources"] is False
    missing = configure(tmp_path, "-DLLM2CLIP_CUDA=ON", "-DCMAKE_CUDA_COMPILER=NOTFOUND")
    if missing.returncode != 0:
        assert "LLM2CLIP_CUDA=ON but no nvcc" in " ".join(missing.stderr.split())
