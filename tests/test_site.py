"""The documentation site: built without a warning, whole, self-contained; and what its pages tell users to type."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import llm2clip_kernels.losses
from llm2clip.cli import build_parser, main

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MISSING = [
    n for n in ("mkdocs", "material", "mkdocstrings", "matplotlib") if importlib.util.find_spec(n) is None
]
needs_mkdocs = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} are not installed (llm2clip[docs,train])")
# commands whose settings can be checked without running them
CONFIGURED = {
    "finetune-llm", "embed", "train", "evaluate", "export", "search", "plan", "embed images", "embed texts",
    "evaluate caption-retrieval", "evaluate retrieval", "evaluate zero-shot", "evaluate linear-probe",
}  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT, capture_output=True, text=True, timeout=280, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return out


@needs_mkdocs
def test_every_page_is_built_and_shown(site: Path) -> None:
    pages = [page.relative_to(DOCS) for page in DOCS.rglob("*.md")]
    assert len(pages) > 30
    start = (site / "index.html").read_text(encoding="utf-8")
    for page in [*pages, Path("benchmarks.md"), Path("contributing.md"), Path("changelog.md")]:
        html = page.with_suffix(".html")
        assert (site / html).is_file() and (page.name == "index.md" or f'href="{html}"' in start), page


@needs_mkdocs
def test_pictures_and_links_between_pages(site: Path) -> None:
    performance = (site / "performance.html").read_text(encoding="utf-8")
    assert 'href="benchmarks.html"' in performance and "../benchmarks" not in performance
    for page in site.rglob("*.html"):
        for source in re.findall(r'<img[^>]* src="([^"]+)"', page.read_text(encoding="utf-8")):
            assert (page.parent / source).is_file(), (page, source)


@needs_mkdocs
def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|link rel="stylesheet")[^>]* (?:src|href)="(https?:[^"]+)"', text)
        assert loaded == [], page


@needs_mkdocs
def test_the_reference_has_signatures_and_docstrings(site: Path) -> None:
    kernels = (site / "api" / "kernels.html").read_text(encoding="utf-8")
    shown = set(re.findall(r'id="llm2clip_kernels\.(?:\w+\.)*(\w+)"', kernels))
    assert set(llm2clip_kernels.__all__) <= shown, "docs/api/kernels.md lists every name"
    losses = (site / "api" / "losses.html").read_text(encoding="utf-8")
    assert "gather_with_grad" in losses
    assert all(f'id="llm2clip_kernels.losses.{name}"' in losses for name in llm2clip_kernels.losses.__all__)
    models = (site / "api" / "models.html").read_text(encoding="utf-8")
    assert "from_pretrained" in models and "Raises" in models


def test_pictures_are_well_formed_and_named() -> None:
    found = list(DOCS.glob("*.svg"))
    assert len(found) >= 3
    for picture in found:
        root = ElementTree.parse(picture).getroot()
        assert root.find("{http://www.w3.org/2000/svg}title") is not None and root.get("viewBox"), picture


def test_the_first_page_s_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "index.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["images"].grad is not None  # type: ignore[attr-defined]


def typed(page: Path) -> list[list[str]]:
    """The commands of llm2clip in a page's code blocks, as words."""
    language: str | None = None
    lines: list[str] = []
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            language = line[3:].strip() if language is None else None
        elif language in ("", "sh"):
            lines.append(line)
    found = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if re.match(r"(llm2clip|python -m llm2clip|torchrun .*-m llm2clip) ", line):
            words = shlex.split(line, comments=True)
            found.append(words[words.index("llm2clip") + 1 :])
    return found


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_commands_exist_and_take_these_settings(
    page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, names = build_parser()
    for words in typed(page):
        command = " ".join(words[:2]) if " ".join(words[:2]) in names else words[0]
        assert command in names, words
        if command not in CONFIGURED or any("..." in word or "$" in word for word in words):
            continue
        rest = words[len(command.split()) :]
        if "--config" in rest:  # files of the reader's
            place = rest.index("--config")
            del rest[place : place + 2]
        assert main([command, *rest, "--print-config"]) == 0, (words, capsys.readouterr().err)
