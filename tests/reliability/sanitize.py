"""The native code under AddressSanitizer and UndefinedBehaviorSanitizer: `python -m tests.reliability.sanitize`.

Builds csrc/ with `LLM2CLIP_SANITIZE` into build/sanitize, lays the packages beside it and runs the tests of every op
there. A finding ends the process of its test, so the command fails. `--all` takes every test of the ops, which is
slow; without it those that call each op with odd sizes are run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "sanitize"
SANITIZERS = "address,undefined"
COPIED = ("kernels", "llm2clip", "tests", "benchmarks", "pyproject.toml", "CMakeLists.txt", "csrc", "docs")
QUICK = (
    "tests/test_poisoned_memory.py",
    "tests/test_host.py",
    "tests/test_store_rows.py",
    "tests/test_store_lookup.py",
    "tests/test_tile_product.py",
    "tests/reliability/test_native.py",
)
ALL = (
    *QUICK,
    *(
        f"tests/test_{op}.py"
        for op in (
            "similarity_lse", "similarity_lse_groups", "similarity_rank", "similarity_topk", "similarity_distill",
            "similarity_distill_use", "sigmoid_loss", "packed_attention", "segment_mean", "l2_normalize", "lora_linear",
            "adapter", "contrastive_properties", "instruction_sets", "host_memory",
        )
    ),
)  # fmt: skip
_FINDING = re.compile(r"ERROR: AddressSanitizer: (.*)|runtime error: (.*)")


def build(compiler: str = "g++") -> None:
    """Compile into the copy."""
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CXX_COMPILER": compiler,
        "LLM2CLIP_CUDA": "OFF",
        "LLM2CLIP_SANITIZE": SANITIZERS,
        "LLM2CLIP_OUTPUT_DIR": WORK / "kernels" / "llm2clip_kernels",
        "LLM2CLIP_HOST_OUTPUT_DIR": WORK / "llm2clip",
        "Python_EXECUTABLE": sys.executable,
    }
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", "-S", str(ROOT), "-B", str(WORK / "cmake"), *generator]
    subprocess.check_call([*configure, *(f"-D{name}={value}" for name, value in options.items())])
    subprocess.check_call(["cmake", "--build", str(WORK / "cmake"), "-j", str(os.cpu_count() or 1)])


def lay_out() -> None:
    """Copy what the tests need beside the libraries."""
    for name in COPIED:
        source, target = ROOT / name, WORK / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "build_record.json")
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=ignored)
        else:
            shutil.copy(source, target)


def environment(compiler: str = "g++") -> dict[str, str]:
    """Variables under which Python loads the sanitized libraries."""
    runtimes = [
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        # libstdc++ too: the sanitizer must find its __cxa_throw at start
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        # the interpreter keeps what it allocated; leaks have a test of their own
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1:strict_init_order=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "LLM2CLIP_REQUIRE_NATIVE": "1",
        "PYTHONPATH": f"{WORK / 'kernels'}{os.pathsep}{WORK}",
        "PYTHONMALLOC": "malloc",
    }


def run(tests: Sequence[str], compiler: str = "g++") -> dict[str, Any]:
    """Run each file of tests in a process of its own; what was found, as JSON values."""
    found: dict[str, Any] = {"sanitizers": SANITIZERS, "files": {}, "findings": []}
    for test in tests:
        start = time.monotonic()
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-m",
            "not gpu and not dist",
            test,
        ]
        done = subprocess.run(
            command,
            cwd=WORK,
            env=environment(compiler),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lines = done.stdout.strip().splitlines()
        entry = {"status": done.returncode, "seconds": round(time.monotonic() - start), "last": lines[-1:]}
        found["files"][test] = entry
        found["findings"] += [f"{test}: {match[1] or match[2]}" for match in _FINDING.finditer(done.stdout)]
        print(json.dumps({test: entry}), flush=True)
        if done.returncode:
            print(done.stdout[-6000:])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the status is 1 where a test failed or something was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tests", nargs="*", help="test files; default: a short list")
    parser.add_argument("--all", action="store_true", help="every test of the ops")
    parser.add_argument("--out", default="", help="JSON file for the result")
    chosen = parser.parse_args(arguments)
    build()
    lay_out()
    found = run(chosen.tests or (ALL if chosen.all else QUICK))
    if chosen.out:
        Path(chosen.out).write_text(json.dumps(found, indent=2) + "\n")
    return 1 if found["findings"] or any(entry["status"] for entry in found["files"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
