"""The Triton kernels without a GPU: their arithmetic in the interpreter, their code by cross-compiling.

The interpreter must be chosen before Triton is imported, so those tests run in a process of their own. bf16
products are wrong in the interpreter (a known fault), so it sees fp32 and fp16.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from llm2clip_kernels.similarity_lse import kernel  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]

INTERPRETED = """
import torch, torch.nn.functional as F
from llm2clip_kernels.similarity_lse import kernel
from llm2clip_kernels import similarity_lse

def check(got, want, limit, what):
    error = ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()
    assert error <= limit, f"{what}: {error:.2e} > {limit:.0e}"

torch.manual_seed(0)
for dtype, limit in ((torch.float32, 2e-6), (torch.float16, 1e-3)):
    # ragged tiles, several tiles, D = 1, underflow (scale 1e4), negative scale, rectangular both ways
    for m, n, d, s in ((33, 20, 5, 10.0), (7, 40, 33, 1e4), (5, 5, 1, 1.0), (18, 50, 16, -30.0)):
        x, y = (F.normalize(torch.randn(k, d), dim=1).to(dtype) for k in (m, n))
        scale = torch.tensor(s)
        dots = x.double() @ y.double().T
        logits = s * dots
        rows, cols = logits.logsumexp(1), logits.logsumexp(0)
        row_lse, col_lse = kernel.forward(x, y, scale, True)
        check(row_lse, rows, 2e-6, ("row_lse", dtype, m))
        check(col_lse, cols, 2e-6, ("col_lse", dtype, m))
        only_rows, nothing = kernel.forward(x, y, scale, False)
        assert torch.equal(only_rows, row_lse) and nothing.numel() == 0
        g_row, g_col = torch.randn(m) / m, torch.randn(n) / m
        diagonal = 2 if n >= m + 2 else -1
        g_pos = -torch.rand(m) if diagonal >= 0 else torch.empty(0)
        g = g_row[:, None].double() * (logits - rows[:, None]).exp() + g_col.double() * (logits - cols).exp()
        if diagonal >= 0:
            g.diagonal(diagonal).add_(g_pos)
        # at scale 1e4 a rounded log-sum-exp alone moves the exponentials by 1e4 * 6e-8
        bound = max(limit, 6e-4) if s == 1e4 else limit
        dx, dy, dscale = kernel.backward(
            g_row, g_col, g_pos, x, y, scale, rows.float(), cols.float(), diagonal, True, True, True)
        check(dx, s * g @ y.double(), bound, ("dx", dtype, m))
        check(dy, s * g.T @ x.double(), bound, ("dy", dtype, m))
        check(dscale, (g * dots).sum(), 10 * bound, ("dscale", dtype, m))

# more tiles a side than programs, so that one program owns several tiles, and more than one stripe
kernel._SIDE, kernel._STRIPE_BYTES = 2, 16 * 70 * 4
x, y = (F.normalize(torch.randn(k, 8), dim=1) for k in (85, 70))
for s, limit in ((2e3, 2e-4), (5.0, 5e-6)):
    logits = s * x.double() @ y.double().T
    row_lse, col_lse = kernel.forward(x, y, torch.tensor(s), True)
    check(row_lse, logits.logsumexp(1), 2e-6, "row groups")
    check(col_lse, logits.logsumexp(0), 2e-6, "col groups")
    g = (logits - logits.logsumexp(1)[:, None]).exp() + (logits - logits.logsumexp(0)).exp()
    ones = torch.ones(85), torch.ones(70), torch.empty(0)
    dx, dy, _ = kernel.backward(*ones, x, y, torch.tensor(s), row_lse, col_lse, -1, True, True, False)
    check(dx, s * g @ y.double(), limit, "dx stripes")
    check(dy, s * g.T @ x.double(), limit, "dy stripes")

# a NaN row stays in its row and in the columns, and an infinite norm ends
x[3, 0] = float("nan")
row_lse, _ = kernel.forward(x, y, torch.tensor(5.0), True)
assert row_lse.isnan().nonzero().flatten().tolist() == [3]

# through the public op, autograd included
x, y = (F.normalize(torch.randn(20, 8), dim=1).requires_grad_() for _ in "xy")
scale = torch.tensor(7.0, requires_grad=True)
row_lse, col_lse = similarity_lse(x, y, scale)
(row_lse.sum() + 2 * col_lse.sum()).backward()
a, b, c = (t.detach().double().requires_grad_() for t in (x, y, scale))
s = c * a @ b.T
(s.logsumexp(1).sum() + 2 * s.logsumexp(0).sum()).backward()
for got, want in ((x.grad, a.grad), (y.grad, b.grad), (scale.grad, c.grad)):
    check(got, want, 2e-6, "op")
print("interpreted: ok")
"""


def test_arithmetic_in_the_interpreter(tmp_path: Path) -> None:
    script = tmp_path / "interpreted.py"
    script.write_text(INTERPRETED)
    env = os.environ | {
        "TRITON_INTERPRET": "1",
        "LLM2CLIP_BACKEND": "triton",
        "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "interpreted: ok" in done.stdout


TARGETS = {
    # name: (backend, arch, warp size, table key, shared memory of a program in bytes)
    "sm_80": ("cuda", 80, 32, ("cuda", 8, 2), 163 * 1024),
    "sm_90": ("cuda", 90, 32, ("cuda", 9, 2), 227 * 1024),
    "sm_100": ("cuda", 100, 32, ("cuda", 10, 2), 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, ("hip", 9, 2), 64 * 1024),
}
KERNELS = {
    "sums": kernel.similarity_lse_fwd_kernel_sums,
    "online": kernel.similarity_lse_fwd_kernel_online,
    "stripe": kernel.similarity_lse_bwd_kernel_stripe,
}
INPUTS = {"x_ptr", "y_ptr", "stripe_ptr"}


def cross_compile(name: str, target: str, dtype: str) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arch, warp, key, _ = TARGETS[target]
    config = kernel.choose_config(*key)
    function = KERNELS[name]
    constants = {
        "COLUMNS": True, "POSITIVES": True, "SCALE": True, "PRECISION": "tf32",
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
    }  # fmt: skip
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        kind = f"*{dtype}" if argument in INPUTS else "*i32" if argument == "flag_ptr" else "*fp32"
        signature[argument] = kind if argument.endswith("_ptr") else "i32"
        if argument.endswith("_ptr") or argument in ("N", "D"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        function, signature, {k: v for k, v in constants.items() if k in signature}, attributes
    )
    return triton.compile(
        source,
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


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_and_fits(name: str, target: str, tmp_path: Path) -> None:
    compiled = cross_compile(name, target, "bf16")
    assert compiled.metadata.shared <= TARGETS[target][4]
    if TARGETS[target][0] != "cuda":
        assert compiled.asm["amdgcn"]
        return
    code = compiled.asm["ptx"]
    if target == "sm_90":
        assert "wgmma.mma_async" in code
    elif target == "sm_100":
        assert "tcgen05.mma" in code
    else:
        assert "mma.sync" in code
    report = assemble(code, tmp_path)
    assert "0 bytes spill stores, 0 bytes spill loads" in report, report


def test_offsets_are_64_bit() -> None:
    """A row offset i·D or i·N passes 2^31 long before memory is full."""
    code = cross_compile("stripe", "sm_80", "bf16").asm["ttir"]
    products = [line for line in code.splitlines() if "arith.muli" in line and "tensor<" in line]
    assert products and all("i64" in line for line in products), products


def test_a_config_for_every_architecture() -> None:
    assert kernel.choose_config("cuda", 12, 2) == kernel.choose_config("hip", 11, 4)
    largest = kernel.choose_config("cuda", 12, 4)
    operands = (largest.block_m + largest.block_n) * largest.block_k * 4 * largest.num_stages
    assert operands <= 64 * 1024, "the fallback must fit the smallest shared memory"
