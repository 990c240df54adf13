"""Hooks of mkdocs: pages of the site that are files elsewhere in the repository, and plots of the committed results."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# page of the site -> file of the repository
PAGES = {
    "benchmarks.md": "benchmarks/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
_PLOTTED = "performance.md"
_plots: list[str] = []


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and plots that do not lie in docs/."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_links(text, Path(source).parent)))
    _plots[:] = []
    for name, content in _drawn():
        files.append(File.generated(config, f"plots/{name}", content=content))
        _plots.append(name)
    return files


def on_page_markdown(markdown: str, page: Any, **others: Any) -> str:
    """Point links out of docs/ at the pages made of those files, and show the plots."""
    markdown = _links(markdown, Path("docs"))
    if page.file.src_uri == _PLOTTED and _plots:
        shown = "\n\n".join(f"![{Path(name).stem.replace('_', ' ')}](plots/{name})" for name in _plots)
        markdown += f"\n## Plots\n\nThe same results over the number of pairs.\n\n{shown}\n"
    return markdown


def _links(text: str, folder: Path) -> str:
    """Relative links of a file in `folder` of the repository, as a page of the site has them."""
    pages = {source: page for page, source in PAGES.items()}

    def moved(found: re.Match[str]) -> str:
        target, anchor = found[1], found[2] or ""
        whole = (ROOT / folder / target).resolve()
        if ROOT not in whole.parents:
            return found[0]
        inside = whole.relative_to(ROOT).as_posix()
        if inside in pages:
            return f"]({pages[inside]}{anchor})"
        return f"]({inside.removeprefix('docs/')}{anchor})" if inside.startswith("docs/") else found[0]

    return text if folder == Path("docs/api") else re.sub(r"\]\(([\w./-]+\.\w+)(#[\w-]+)?\)", moved, text)


def _drawn() -> list[tuple[str, bytes]]:
    """Figures of every suite that has several sizes."""
    sys.path.insert(0, str(ROOT))
    try:
        import matplotlib  # noqa: F401

        from benchmarks import plot
        from benchmarks.record import RESULTS
    except ImportError:  # the site is built without its plots
        return []
    import json

    found = []
    with tempfile.TemporaryDirectory() as place:
        for file in sorted(RESULTS.glob("*/*.json")):
            record = json.loads(file.read_text(encoding="utf-8"))
            path = Path(place) / f"{file.parent.name}-{file.stem}.svg"
            if isinstance(record.get("rows"), list) and plot.draw(record, path):
                found.append((path.name, path.read_bytes()))
    return found
