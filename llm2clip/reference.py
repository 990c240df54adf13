"""Writes docs/config.md, the reference of all settings, from the dataclasses (`--check`: only compares)."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

from llm2clip.config import iter_fields, type_name
from llm2clip.settings import (
    CaptionRetrievalSettings,
    EmbedImagesSettings,
    EmbedSettings,
    EmbedTextsSettings,
    EvaluateSettings,
    ExportSettings,
    FinetuneLLMSettings,
    LinearProbeSettings,
    PlanSettings,
    RetrievalSettings,
    SearchSettings,
    TrainSettings,
    ZeroShotSettings,
)

COMMANDS: tuple[type, ...] = (
    FinetuneLLMSettings,
    EmbedSettings,
    EmbedImagesSettings,
    EmbedTextsSettings,
    TrainSettings,
    EvaluateSettings,
    CaptionRetrievalSettings,
    RetrievalSettings,
    ZeroShotSettings,
    LinearProbeSettings,
    ExportSettings,
    SearchSettings,
    PlanSettings,
)
PAGE = Path(__file__).resolve().parents[1] / "docs" / "config.md"

HEAD = """# Settings

Generated from `llm2clip/settings/` by `make docs`. Each command takes a YAML file (`--config`) and
`name=value` overrides, which win; `--print-config` shows the result. Unknown names and wrong types are refused.
Both of these set the same value:

```yaml
optim:
  lr: 3e-4
```

```sh
llm2clip train --config train.yaml optim.lr=3e-4
```
"""


def render() -> str:
    """The page as Markdown."""
    parts = [HEAD]
    for command in COMMANDS:
        parts.append(f"\n## {(command.__doc__ or '').strip()}\n")
        parts.append("| setting | type | default | meaning |\n|---|---|---|---|")
        stages = _stages(command)
        for name, kind, default, text in iter_fields(command):
            if name.partition(".")[0] in stages:
                continue
            row = (f"`{name}`", _cell(type_name(kind)), f"`{_default(default)}`", _cell(text))
            parts.append(f"| {' | '.join(row)} |")
        for name, text in stages.items():
            parts.append(f"| `{name}.*` | settings | | {text} |")
    return "\n".join(parts) + "\n"


def _stages(command: type) -> dict[str, str]:
    """Groups of a command's settings that are another command's, and their help."""
    hints = get_type_hints(command)
    return {f.name: str(f.metadata["help"]) for f in fields(command) if hints[f.name] in COMMANDS}


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _default(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(str, value))}]"
    return str(value) if value != "" else '""'


def main() -> int:
    """Write the page, or with `--check` report whether it is up to date."""
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(render(), encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == render():
        return 0
    print(f"{PAGE.name} differs from llm2clip/settings/; run: make docs", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
