"""Runs one section and writes its outcome: python -m benchmarks.proof SECTION --device cuda --out FOLDER."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.proof import sections

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("section", choices=[section.name for section in sections.SECTIONS])
parser.add_argument("--device", required=True, choices=["cpu", "cuda"])
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--seconds", type=float, default=600.0)
options = parser.parse_args()
(chosen,) = sections.choose([options.section])
outcome = sections.run(chosen, sections.Context(options.device, options.out.resolve(), options.seconds))
(options.out / "proof" / f"{chosen.name}.json").write_text(json.dumps(asdict(outcome), indent=1) + "\n")
