"""Sections that run other programs: the GPU-marked tests, compute-sanitizer, Nsight Compute."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from benchmarks.proof.layout import ROOT
from benchmarks.proof.sections import Context, Skip

_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")


def find_tool(name: str) -> str:
    """Returns the path of a CUDA tool; raises Skip where there is none."""
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(_PLACES))
    if found is None:
        raise Skip(f"{name} is neither on PATH nor under /usr/local/cuda")
    return found


def read_junit(path: Path) -> dict[str, Any]:
    """Returns how many tests passed, failed and were skipped, and the names of those that failed."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failed = []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[kind] += 1
        if kind == "failed":
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    return {**counts, "failures": failed}


def tests(context: Context) -> dict[str, Any]:
    """Runs every test marked `gpu`; in the dry run they are collected and skip themselves."""
    report = context.out / "proof" / "tests.xml"
    path = " ".join(entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        f"--junitxml={report}",
        "-p",
        "no:cacheprovider",
    ]
    # the library under test is the one on PYTHONPATH
    command += ["-o", f"pythonpath={path or 'kernels .'}"]
    done = subprocess.run(command, cwd=ROOT, timeout=context.seconds)
    assert report.exists(), f"pytest ended with status {done.returncode} and no report"
    found = read_junit(report)
    assert not found["failures"] and done.returncode == 0, (
        f"{found['failed']} failed: {found['failures'][:10]}"
    )
    assert found["passed"] > 0 or context.dry, f"no test ran: {found}"
    return found


def findings(text: str) -> int:
    """Returns the number of errors that compute-sanitizer's output sums up; -1 where it has no summary."""
    counts = re.findall(r"ERROR SUMMARY: (\d+) error", text) + re.findall(
        r"RACECHECK SUMMARY: (\d+) hazard", text
    )
    return sum(int(count) for count in counts) if counts else -1


def last_line(text: str) -> str:
    """Returns the last line that says something: of a traceback, the error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def sanitizer(context: Context) -> dict[str, Any]:
    """memcheck, racecheck and initcheck over every op at small shapes; the dry run runs the shapes alone."""
    watched = [sys.executable, "-m", "benchmarks.proof.cases", "--device", context.device]
    # one allocation per tensor: a read past its end is then a read past an allocation
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    checks = [None] if context.dry else ["memcheck", "racecheck", "initcheck"]
    program = "" if context.dry else find_tool("compute-sanitizer")
    found: dict[str, Any] = {}
    for check in checks:
        command = watched if check is None else [program, "--tool", check, "--print-limit", "20", *watched]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=context.seconds / len(checks),
        )
        text = done.stdout + done.stderr
        print(text, flush=True)
        if check is None:
            assert done.returncode == 0, last_line(text)
            found["cases"] = "ran without compute-sanitizer, which needs a GPU"
            continue
        found[check] = findings(text)
        assert done.returncode == 0, f"{check}: the program failed: {last_line(text)}"
    faults = {name: count for name, count in found.items() if isinstance(count, int) and count != 0}
    assert not faults, f"findings (-1: no summary): {faults}"
    return found


def ncu(context: Context) -> dict[str, Any]:
    """Counters of the kernels of one case: tensor pipe, memory, stalls; the text goes to proof/ncu.txt."""
    if context.dry:
        raise Skip("hardware counters need a GPU")
    program = find_tool("ncu")
    output = context.out / "proof" / "ncu.txt"
    command = [program, "--clock-control", "none", "--set", "full", "--launch-count", "12"]
    command += ["--kernel-name", "regex:similarity|slab|stripe|gemm", "--log-file", str(output)]
    command += [
        sys.executable,
        "-m",
        "benchmarks.proof.cases",
        "--device",
        "cuda",
        "--cases",
        "similarity_lse",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=context.seconds)
    assert done.returncode == 0, last_line(done.stdout + done.stderr)
    return {"file": output.name, "kernels": len(re.findall(r"Context \d+, Stream", output.read_text()))}
