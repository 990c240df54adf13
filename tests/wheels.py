"""Builds the sdist and the wheels from it, looks inside, and uses them from an environment that has nothing else.

    python -m tests.wheels [--out dist] [--cuda auto|on|off]

A wheel is built from the unpacked sdist, never from the checkout, so that what the sdist lacks is missed. It is then
installed without anything into an empty environment; torch and Triton, which no test should download, are lent to it
from the running one, each package by itself.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "llm2clip_kernels/_C.so"
# what a wheel must have beside the modules
DATA = (
    "llm2clip/py.typed", "llm2clip/demo.yaml", "llm2clip/evaluation/imagenet_templates.txt",
    "llm2clip/search/static/index.html", "llm2clip/search/static/app.js", "llm2clip_kernels/py.typed",
    "llm2clip_kernels/build_record.json", LIBRARY,
)  # fmt: skip
MOST_BYTES = {False: 4 << 20, True: 16 << 20}  # by whether there is CUDA code
# libraries of the system that every Linux has, and torch's own; libtorch.so is what brings torch's CUDA half in
NEEDED = {"libtorch.so", "libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6",
          "libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2"}  # fmt: skip
# mangled names of torch's C++, which change with every version of it
UNSTABLE = re.compile(r"^_ZN?K?(?:2at|3c10|5torch)")


@dataclass(frozen=True)
class Found:
    """What a wheel is.

    Attributes:
        size: in bytes.
        needed: libraries that the op library asks for.
        torch_symbols: undefined symbols that torch must have.
        glibc: newest version of glibc's symbols that it asks for.
    """

    size: int
    needed: tuple[str, ...]
    torch_symbols: tuple[str, ...]
    glibc: str


def build_sdist(out: Path) -> Path:
    """Write the sdist to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    code = f"from setuptools.build_meta import build_sdist as b; print(b({str(out.resolve())!r}))"
    return out / _run(sys.executable, "-c", code, cwd=ROOT).split()[-1]


def build_wheel(sdist: Path, out: Path, *, cuda: bool) -> Path:
    """Build a wheel from the sdist alone, with or without CUDA code."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        with tarfile.open(sdist) as archive:
            # as Python's documentation has it for versions without filters
            archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
            archive.extractall(place)
        (source,) = Path(place).iterdir()
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet")
        options = ("--no-build-isolation", "--no-deps", "--wheel-dir", str(out.resolve()))
        tools = Path(sys.executable).parent  # the environment's own cmake and ninja
        env = {"LLM2CLIP_CUDA": "ON" if cuda else "OFF", "PATH": f"{tools}:{os.environ['PATH']}"}
        _run(*pip, *options, ".", cwd=source, env=env)
    return next(out.glob("*.whl"))


def inspect(wheel: Path, *, cuda: bool) -> Found:
    """Look inside a wheel; AssertionError says what is wrong with it."""
    name, version, *tag = wheel.stem.split("-")
    assert name == "llm2clip" and tag[:2] == ["py3", "none"] and tag[2].startswith("linux_"), wheel.name
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as place:
        names = set(archive.namelist())
        missing = [member for member in DATA if member not in names]
        assert not missing, f"{wheel.name} lacks {missing}"
        strange = {member.split("/")[0] for member in names} - {
            "llm2clip", "llm2clip_kernels", f"llm2clip-{version}.dist-info"
        }  # fmt: skip
        assert not strange, f"{wheel.name} installs {strange}"
        library = archive.extract(LIBRARY, place)
        record = archive.read("llm2clip_kernels/build_record.json").decode()
        assert f'"cuda_sources": {str(cuda).lower()}' in record, record
        dynamic = _run("readelf", "-d", library)
        symbols = [line.split() for line in _run("nm", "-D", "--undefined-only", library).splitlines()]
    needed = tuple(re.findall(r"\(NEEDED\).*\[(.+?)\]", dynamic))
    assert "libtorch.so" in needed and set(needed) <= NEEDED, needed
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic, "a path of the machine it was built on"
    plain = [words[-1].partition("@")[0] for words in symbols]
    unstable = [symbol for symbol in plain if UNSTABLE.match(symbol)]
    assert not unstable, f"not of torch's stable ABI: {unstable[:5]}"
    weak = {words[-1] for words in symbols if words[-2] == "w"}
    if cuda:
        assert "aoti_torch_get_current_cuda_stream" in weak, "it would not load beside a torch without CUDA"
    size = wheel.stat().st_size
    assert size <= MOST_BYTES[cuda], f"{size >> 10} KiB"
    versions = [v for words in symbols for v in re.findall(r"@GLIBC_([\d.]+)", words[-1])]
    newest = max(versions, key=lambda v: [int(part) for part in v.split(".")], default="")
    torch_symbols = tuple(sorted(s for s in plain if s.startswith(("aoti_torch_", "torch_"))))
    return Found(size, needed, torch_symbols, newest)


class Environment:
    """An empty environment with one wheel in it.

    Args:
        place: an empty directory, outside of the checkout.
        wheel: what is installed.
    """

    def __init__(self, place: Path, wheel: Path) -> None:
        self.place = place
        venv.create(place / "venv", with_pip=False)
        self.python = place / "venv" / "bin" / "python"
        # the running pip, on the other environment: nothing is downloaded, and nothing but the wheel is installed
        pip = (
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--python",
            str(self.python),
            "install",
        )
        # a checkout on the path would count as installed
        _run(*pip, "--quiet", "--no-index", "--no-deps", str(wheel), cwd=place, env={"PYTHONPATH": ""})

    def run(
        self, *command: str, lent: Sequence[str] = (), env: Mapping[str, str] | None = None, status: int = 0
    ) -> str:
        """Output of a command, run in an empty directory, with some packages of the running environment lent."""
        place = Path(tempfile.mkdtemp(dir=self.place))
        packages = place / "lent"
        packages.mkdir()
        for name in lent:
            lend(name, packages)
        inside = place / "elsewhere"
        inside.mkdir()
        clean = {
            "PATH": f"{self.python.parent}:/usr/bin:/bin",
            "HOME": str(place),
            "PYTHONPATH": str(packages),
        }
        done = subprocess.run(
            [*command], cwd=inside, env={**clean, **(env or {})}, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == status, (
            f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
        return done.stdout + done.stderr


def closure(*names: str, without: Sequence[str] = ()) -> list[str]:
    """Distributions that some need, themselves included; those that are not installed are left out."""
    found: dict[str, None] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found or name in without:
            continue
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found[name] = None
        for text in needs:
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                waiting.append(need.name)
    return list(found)


def lend(name: str, packages: Path) -> None:
    """Link the top-level files of a distribution into a directory of packages."""
    distribution = importlib.metadata.distribution(name)
    for file in distribution.files or ():
        top = file.parts[0]
        if top in ("..", "__pycache__") or (packages / top).exists():
            continue
        (packages / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())


def _run(*command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=3600
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command[:4])} ... ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def main() -> int:
    """Build, look inside, install and use; the wheels are in `<out>/cpu` and `<out>/cuda`."""
    parser = argparse.ArgumentParser(description="sdist and wheels, checked")
    parser.add_argument("--out", type=Path, default=Path("dist"))
    parser.add_argument("--cuda", choices=("auto", "on", "off"), default="auto")
    args = parser.parse_args()
    cuda = args.cuda == "on" or (args.cuda == "auto" and shutil.which("nvcc") is not None)
    from tests.test_wheels import use

    shutil.rmtree(args.out, ignore_errors=True)
    sdist = build_sdist(args.out)
    print(f"{sdist}: {sdist.stat().st_size >> 10} KiB")
    for with_cuda in (False, True) if cuda else (False,):
        wheel = build_wheel(sdist, args.out / ("cuda" if with_cuda else "cpu"), cuda=with_cuda)
        found = inspect(wheel, cuda=with_cuda)
        with tempfile.TemporaryDirectory() as place:
            use(Environment(Path(place), wheel))
        print(
            f"{wheel}: {found.size >> 10} KiB, needs {', '.join(found.needed)}, glibc {found.glibc}, "
            f"{len(found.torch_symbols)} symbols of torch's stable ABI; installed and used"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
