"""Fuzz a reader: `python -m tests.reliability.fuzz tar --seconds 300 --out fuzz-tar.json`.

With atheris installed (`pip install atheris`) the search is guided by coverage, else it is random. A crash is any end
but success or an error of `llm2clip.errors`; a killed worker (a segmentation fault, more than 4 GiB, no end within 30
seconds) is one, too. Each kind is kept once, with its input, in the folder beside the result.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_INSTRUMENTED = ["llm2clip", "gguf", "yaml", "transformers.modeling_gguf_pytorch_utils"]
_MEMORY_MIB, _INPUT_SECONDS, _LONGEST = 4096, 30, 1 << 16
_GUIDED = importlib.util.find_spec("atheris") is not None


class Watch:
    """Runs a reader on inputs, keeps what breaks it, and ends the process when its time is over."""

    def __init__(self, name: str, folder: Path, seconds: float) -> None:
        from llm2clip.errors import UserError
        from tests.reliability.readers import READERS

        self.seeds = READERS[name].seeds()
        self._read, self._expected, self._folder = READERS[name].read, UserError, folder
        self._seconds, self._saved = seconds, 0.0
        self.runs, self.crashes = 0, {}  # type: ignore[var-annotated]

    def __call__(self, data: bytes) -> None:
        """One input."""
        with tempfile.TemporaryDirectory() as place:
            try:
                self._read(data, Path(place))
            except self._expected:
                pass
            except Exception as error:
                self._keep(error, data)
        self.runs += 1
        used = time.process_time()
        if used > self._saved + 1:
            self.save()
            self._saved = used
        if used > self._seconds:
            self.save()
            sys.stderr.flush()
            os._exit(0)

    def _keep(self, error: Exception, data: bytes) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "/llm2clip/" in frame.filename] or frames
        kind = f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}"
        if kind not in self.crashes:
            self.crashes[kind] = str(error)[:200]
            file = self._folder / f"crash-{len(self.crashes)}"
            file.write_bytes(data)
            file.with_suffix(".txt").write_text("".join(traceback.format_exception(error)))

    def save(self) -> None:
        """Write what is known so far."""
        state = {"runs": self.runs, "cpu_seconds": round(time.process_time(), 1), "crashes": self.crashes}
        (self._folder / "state.json").write_text(json.dumps(state))


def work(name: str, folder: Path, seconds: float) -> None:
    """Fuzz in this process until its processor time is used up; does not return."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if _GUIDED:
        import atheris

        with atheris.instrument_imports(include=_INSTRUMENTED):
            watch = Watch(name, folder, seconds)
        corpus = folder / "corpus"
        corpus.mkdir(exist_ok=True)
        for number, seed in enumerate(watch.seeds):
            (corpus / f"seed-{number}").write_bytes(seed)
        limits = [f"-timeout={_INPUT_SECONDS}", f"-rss_limit_mb={_MEMORY_MIB}", f"-max_len={_LONGEST}"]
        atheris.Setup([sys.argv[0], str(corpus), f"-artifact_prefix={folder}/killed-", *limits], watch)
        atheris.Fuzz()
    else:
        from tests.reliability.mutate import mutants

        watch = Watch(name, folder, seconds)
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_MIB << 20, _MEMORY_MIB << 20))
        for data in mutants(watch.seeds, random.Random(time.time_ns())):
            (folder / "killed-last").write_bytes(data)
            watch(data)


def fuzz(name: str, folder: Path, seconds: float, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run workers until they used `seconds` of processor time.

    Returns:
        The result as JSON values: runs, cpu_seconds, crashes by kind, workers that were killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total: dict[str, Any] = {"reader": name, "guided": _GUIDED, "runs": 0, "cpu_seconds": 0.0, "crashes": {}}
    total["killed"] = []
    while total["cpu_seconds"] < seconds and len(total["killed"]) < 10:
        (folder / "state.json").write_text(json.dumps({"runs": 0, "cpu_seconds": 0, "crashes": {}}))
        rest = str(seconds - total["cpu_seconds"])
        command = [
            sys.executable,
            "-m",
            "tests.reliability.fuzz",
            name,
            "--worker",
            str(folder),
            "--seconds",
            rest,
        ]
        with open(folder / "log.txt", "a") as log:
            done = subprocess.run(command, stdout=log, stderr=log)
        state = json.loads((folder / "state.json").read_text())
        total["runs"] += state["runs"]
        total["cpu_seconds"] = round(total["cpu_seconds"] + state["cpu_seconds"], 1)
        total["crashes"].update(state["crashes"])
        if done.returncode:
            total["killed"].append(f"worker ended with {done.returncode} after {state['runs']} runs")
        say(json.dumps(total))
    return total


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the status is 1 where something was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reader")
    parser.add_argument("--seconds", type=float, default=60, help="processor time (default 60)")
    parser.add_argument("--out", default="", help="result file; its folder gets what was found")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.worker:
        work(chosen.reader, Path(chosen.worker), chosen.seconds)
    out = Path(chosen.out or f"build/fuzz/{chosen.reader}.json")
    total = fuzz(chosen.reader, out.with_suffix(""), chosen.seconds)
    out.write_text(json.dumps(total, indent=2) + "\n")
    return 1 if total["crashes"] or total["killed"] else 0


if __name__ == "__main__":
    sys.exit(main())
