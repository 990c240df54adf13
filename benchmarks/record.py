"""Where results go and what stands beside every figure: machine, versions, commit, command."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from llm2clip_kernels import build_info

RESULTS = Path(__file__).parent / "results"

# distributions whose version a figure may depend on
PEERS = (
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "open_clip_torch",
    "sentence-transformers",
    "transformers",
    "peft",
    "xformers",
    "inf-cl",
    "cut-cross-entropy",
    "liger-kernel",
)


def processor() -> str:
    """Returns the processor's model name."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1].strip() if found else platform.machine()


def machine_name() -> str:
    """Returns a folder name for this machine: its GPU, else its processor's model and the threads in use."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = f"{processor()} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> dict[str, str]:
    """Returns the versions of the installed distributions in PEERS."""
    found = {}
    for name in PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    # the distribution does not tell a CPU build from a CUDA build
    return found | {"torch": str(torch.__version__)}


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """Returns the short commit, with "+" where tracked sources differ from it; "unknown" without git."""
    name = _git("rev-parse", "--short", "HEAD")
    changed = _git(
        "status", "--porcelain", "--untracked-files=no", "--", ":/", ":/!benchmarks/results", ":/!docs"
    )
    return (name + ("+" if changed else "")) or "unknown"


def command() -> str:
    """Returns the command of this process as a reader would type it."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    start = ["python", "-m", spec.name.removesuffix(".__main__")] if spec else [Path(sys.argv[0]).name]
    return shlex.join(start + sys.argv[1:])


def environment() -> dict[str, Any]:
    """Returns what a figure of this process depends on besides the code."""
    record: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        # above the number of threads in use, others ran too, and only ratios of one run mean something
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "python": platform.python_version(),
        "versions": versions(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        record["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": properties.L2_cache_size / 2**20,
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return record


def _driver() -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.split("\n")[0].strip() or "unknown"


def save(name: str, rows: list[dict[str, Any]], **more: Any) -> Path:
    """Writes `<name>.csv` and `<name>.json` for this machine.

    Args:
        name: the suite, which names the files.
        rows: one dictionary per figure or line of a table.
        more: further entries of the JSON record.

    Returns:
        The CSV's path.
    """
    folder = RESULTS / machine_name()
    folder.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    record = {
        "suite": name,
        "command": command(),
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "environment": environment(),
        "build": build_info(),
        **more,
        "rows": rows,
    }
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    return folder / f"{name}.csv"
