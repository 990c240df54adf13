"""Triton kernels without a GPU: their arithmetic in the interpreter, their code by cross-compiling."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from llm2clip_kernels.triton_tiles import Config, choose_config

ROOT = Path(__file__).resolve().parents[1]

TARGETS = {
    # name: (backend, arch, warp size, table key, shared memory of a program in bytes)
    "sm_80": ("cuda", 80, 32, ("cuda", 8, 2), 163 * 1024),
    "sm_90": ("cuda", 90, 32, ("cuda", 9, 2), 227 * 1024),
    "sm_100": ("cuda", 100, 32, ("cuda", 10, 2), 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, ("hip", 9, 2), 64 * 1024),
}


def run_interpreted(script: str, folder: Path, timeout: int = 200) -> None:
    """Runs a script in a process of its own under Triton's interpreter; it must print "interpreted: ok".

    The interpreter must be chosen before Triton is imported. Its bf16 products are wrong (a known fault), so
    scripts use fp32 and fp16.
    """
    path = folder / "interpreted.py"
    path.write_text(script)
    env = os.environ | {
        "TRITON_INTERPRET": "1",
        "LLM2CLIP_BACKEND": "triton",
        "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(path)], env=env, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "interpreted: ok" in done.stdout


def target_config(target: str) -> Config:
    """The shipped tile for a target of TARGETS."""
    return choose_config(*TARGETS[target][3])


def cross_compile(
    function: Any,
    target: str,
    constants: Mapping[str, Any],
    pointers: Mapping[str, str],
    config: Config,
    divisible: tuple[str, ...] = ("N", "D"),
    scalars: Mapping[str, str] | None = None,
) -> Any:
    """Compiles a Triton kernel for a target of TARGETS.

    Args:
        function: the kernel.
        target: a name in TARGETS.
        constants: constexpr arguments; those the kernel does not have are left out.
        pointers: element type of pointer arguments that are not fp32, e.g. {"x_ptr": "bf16"}, or a TMA
            descriptor, e.g. {"x_ptr": "tensordesc<bf16[128,64]>"}.
        config: warps and stages.
        divisible: integer arguments that are multiples of 16, as Triton finds out by itself when launched.
        scalars: type of arguments that are neither pointers nor int32, e.g. {"eps": "fp32"}.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arch, warp, _, _ = TARGETS[target]
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        kind = pointers.get(argument, "fp32")
        is_descriptor = kind.startswith("tensordesc")
        if argument.endswith("_ptr"):
            signature[argument] = kind if is_descriptor else f"*{kind}"
        else:
            signature[argument] = (scalars or {}).get(argument, "i32")
        if (argument.endswith("_ptr") and not is_descriptor) or argument in divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    used = {k: v for k, v in constants.items() if k in signature}
    return triton.compile(
        ASTSource(function, signature, used, attributes),
        target=GPUTarget(backend, arch, warp),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )


def assemblers() -> list[str]:
    """The assemblers at hand; Triton ships its own, a newer one for Blackwell."""
    import triton.backends.nvidia as nvidia

    shipped = Path(nvidia.__file__).parent / "bin"
    found = [str(shipped / name) for name in ("ptxas-blackwell", "ptxas") if (shipped / name).is_file()]
    on_path = shutil.which("ptxas")
    return found + ([on_path] if on_path else [])


def assemble(code: str, folder: Path) -> str:
    """The assembler's report on PTX; skips where none here knows this version of PTX."""
    target = re.search(r"\.target (\w+)", code)
    assert target is not None
    source = folder / "kernel.ptx"
    source.write_text(code)
    complaint = "no ptxas"
    for assembler in assemblers():
        command = [
            assembler,
            "-v",
            f"--gpu-name={target[1]}",
            str(source),
            "-o",
            str(folder / "kernel.cubin"),
        ]
        report = subprocess.run(command, capture_output=True, text=True, timeout=100)
        if report.returncode == 0:
            return report.stderr
        complaint = report.stderr
        assert "Unsupported .version" in complaint or "is not defined for option" in complaint, complaint
    pytest.skip(f"no assembler for {target[1]}: {complaint}")


def assert_fits(compiled: Any, target: str, folder: Path, tensor_cores: bool = True) -> None:
    """Shared memory fits, nothing spills, and bf16 products run on the target's tensor cores."""
    assert compiled.metadata.shared <= TARGETS[target][4]
    if TARGETS[target][0] != "cuda":
        assert compiled.asm["amdgcn"]
        return
    code = compiled.asm["ptx"]
    if tensor_cores:
        instruction = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "sm_80": "mma.sync"}[target]
        assert instruction in code
    report = assemble(code, folder)
    assert "0 bytes spill stores, 0 bytes spill loads" in report, report
