"""Proves the kernels on a GPU in one go: builds, checks, measures, and leaves one results folder.

python -m benchmarks.gpu_proof                                  # everything, in under ten minutes
python -m benchmarks.gpu_proof --sections library graph ceilings contrastive --minutes 4
python -m benchmarks.gpu_proof --device cpu --sections determinism graph   # dry run at tiny sizes, without a GPU

Needs torch >= 2.11 with CUDA, this checkout, and for the sections `build` and `sanitizer` nvcc and
compute-sanitizer. Every section runs in a process of its own, so that a fault on the device ends one section
only; the run goes on and lists failures at the end. What no time is left for is listed as not run.

Results: <out>/<machine>/ with one JSON and CSV per suite, plots, and proof/ with the outcome and log of every
section, proof.json and summary.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks import record
from benchmarks.proof import layout
from benchmarks.proof.sections import SECTIONS, Context, Outcome, Section, choose

# not worth starting with less, in seconds
_LEAST = 5.0


def run_in_process(section: Section, context: Context) -> Outcome:
    """Runs a section in a process group of its own, which is ended as a whole when its time is up."""
    log = context.out / "proof" / "logs" / f"{section.name}.log"
    answer = context.out / "proof" / f"{section.name}.json"
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.proof", section.name, "--device", context.device]
    command += ["--out", str(context.out), "--seconds", str(context.seconds)]
    start = time.perf_counter()
    late = False
    with open(log, "w") as file:
        process = subprocess.Popen(
            command,
            cwd=layout.ROOT,
            env=os.environ | {"PYTHONPATH": layout.python_path(section.name), "PYTHONUNBUFFERED": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout=context.seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = round(time.perf_counter() - start, 1)
    if answer.exists():
        return Outcome(**json.loads(answer.read_text()))
    reason = f"ended after {context.seconds:.0f} s" if late else f"died with exit status {process.returncode}"
    tail = log.read_text(errors="replace").strip().splitlines()[-3:]
    return Outcome(section.name, "failed", " | ".join([reason, *tail])[:2000], seconds)


def prove(
    chosen: list[Section],
    device: str,
    out: Path,
    minutes: float,
    start: Callable[[Section, Context], Outcome] = run_in_process,
) -> list[Outcome]:
    """Runs the sections in order until the time is up; a failure does not stop it.

    Args:
        start: runs one section.

    Returns:
        One outcome for every chosen section.
    """
    end = time.perf_counter() + 60 * minutes
    outcomes = []
    for section in chosen:
        left = end - time.perf_counter()
        if left < _LEAST:
            outcome = Outcome(section.name, "skipped", "not run: out of time")
        else:
            outcome = start(section, Context(device, out, min(section.seconds, left)))
        outcomes.append(outcome)
        print(line(outcome), flush=True)
    return outcomes


def line(outcome: Outcome) -> str:
    """Returns an outcome as a line of the summary."""
    reason = outcome.reason.splitlines()[0][:150] if outcome.reason else ""
    return f"{outcome.status:8} {outcome.section:20} {outcome.seconds:7.1f} s  {reason}".rstrip()


def write_summary(outcomes: list[Outcome], out: Path) -> str:
    """Writes proof.json and summary.txt; returns the summary, failures last."""
    proof = out / "proof"
    (proof / "proof.json").write_text(
        json.dumps(
            {
                "command": record.command(),
                "commit": record.commit(),
                "environment": record.environment(),
                "sections": [asdict(outcome) for outcome in outcomes],
            },
            indent=1,
        )
        + "\n"
    )
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    lines = [line(outcome) for outcome in outcomes]
    lines.append("")
    lines += [f"FAILED {outcome.section}: {outcome.reason}" for outcome in failed] or ["no section failed"]
    summary = "\n".join(lines) + "\n"
    (proof / "summary.txt").write_text(summary)
    return summary


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", help=f"of {', '.join(s.name for s in SECTIONS)}")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: dry run, tiny sizes")
    parser.add_argument("--minutes", type=float, default=9.5, help="of all sections together")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="where <machine>/ is made")
    parser.add_argument("--archive", type=Path, help="also pack the machine's folder into this .zip")
    options = parser.parse_args(arguments)
    try:
        chosen = choose(options.sections)
    except ValueError as error:
        parser.error(str(error))
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA GPU: torch.cuda.is_available() is false (--device cpu makes a dry run)")
    out = options.out.resolve() / record.machine_name()
    (out / "proof" / "logs").mkdir(parents=True, exist_ok=True)
    layout.refresh()
    outcomes = prove(chosen, options.device, out, options.minutes)
    summary = write_summary(outcomes, out)
    from benchmarks import plot

    try:
        plot.draw_all(out)
    except ImportError as error:
        print(f"no plots: {error}")
    print(f"\n{summary}{out}")
    if options.archive:
        shutil.make_archive(str(options.archive.with_suffix("")), "zip", out.parent, out.name)
    if any(outcome.status == "failed" for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
