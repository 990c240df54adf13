"""The model card beside saved weights: what the model is for, what made it, how good it is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm2clip.models.llm2clip import LLM2CLIP

_UNKNOWN = "not recorded"
_USAGE = (
    "from llm2clip.models import LLM2CLIP",
    "",
    "model = LLM2CLIP.from_pretrained(path)",
    "pixels = model.vision_model.preprocessing.transform()(image)[None]  # image: PIL, RGB",
    "images = model.get_image_features(pixels, normalize=True)",
    "texts = model.get_text_features(encoder.encode(captions), normalize=True)",
)


@dataclass(frozen=True)
class ModelCard:
    """What a model's README.md says besides its architecture.

    Attributes:
        data: the training sources, as the settings name them.
        command: the command that trained the model.
        metrics: name -> value, as `val/long/t2i_r10` -> 0.31.
        licence: licence of these weights, an SPDX name in small letters; empty: none is claimed.
        base_llm: name of the LLM under the caption encoder.
        base_licence: that LLM's licence; its terms go on for models trained with its embeddings.
        attribution: licence or attribution -> values that travel with the data.
        versions: package -> version that wrote the model.
    """

    data: Sequence[str] = ()
    command: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    licence: str = ""
    base_llm: str = ""
    base_licence: str = ""
    attribution: Mapping[str, Sequence[str]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def render(self, model: LLM2CLIP, usage: Sequence[str] = _USAGE) -> str:
        """The card as Markdown, with YAML front matter; `usage` are the lines of its code sample."""
        parts = [self._front_matter(), _about(model), self._training(model), self._results()]
        sample = ["## How to use", "", "```python", *usage, "```", ""]
        return "\n".join(line for part in [*parts, sample] for line in part)

    def _front_matter(self) -> list[str]:
        import yaml

        values: dict[str, Any] = {
            "library_name": "llm2clip",
            "pipeline_tag": "zero-shot-image-classification",
            "tags": ["llm2clip", "clip", "image-text-retrieval"],
        }
        if self.licence:
            values["license"] = self.licence
        if self.base_llm:
            values["base_model"] = self.base_llm
        if self.metrics:
            values["model-index"] = [{"name": "llm2clip", "results": [_result(self.metrics)]}]
        return ["---", yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip(), "---", ""]

    def _training(self, model: LLM2CLIP) -> list[str]:
        fingerprint = model.fingerprint or {}
        llm = self.base_llm or fingerprint.get("model_type") or _UNKNOWN
        lines = ["## Training", "", f"- Data: {', '.join(f'`{place}`' for place in self.data) or _UNKNOWN}"]
        lines += [f"- {name}: {', '.join(values)}" for name, values in self.attribution.items()]
        lines.append(f"- Base LLM: {llm}, licence: {self.base_licence or _UNKNOWN}")
        if self.versions:
            lines.append(
                f"- Versions: {', '.join(f'{name} {number}' for name, number in self.versions.items())}"
            )
        if self.command:
            lines += ["", "```sh", self.command, "```"]
        return [*lines, ""]

    def _results(self) -> list[str]:
        if not self.metrics:
            return ["## Results", "", "None recorded with these weights.", ""]
        rows = [f"| {name} | {value:.4g} |" for name, value in self.metrics.items()]
        return ["## Results", "", "| metric | value |", "|---|---|", *rows, ""]


def _result(metrics: Mapping[str, float]) -> dict[str, Any]:
    return {
        "task": {"type": "image-text-retrieval"},
        "dataset": {"name": "held-out samples of the training data", "type": "custom"},
        "metrics": [{"type": name, "value": round(float(value), 6)} for name, value in metrics.items()],
    }


def _about(model: LLM2CLIP) -> list[str]:
    count = sum(p.numel() for p in model.parameters())
    if model.caption_encoder is not None:
        count -= sum(p.numel() for p in model.caption_encoder.parameters())
    vision = model.vision_model
    return [
        "# LLM2CLIP model",
        "",
        f"{count:,} parameters, shared space of {model.settings.embed_dim} dimensions, images of "
        f"{vision.image_size} pixels ({vision.model.kind} tower). The method is LLM2CLIP's (arXiv 2411.04997): the "
        f"text side is an adapter on embeddings of width {model.llm_dim} that a fine-tuned LLM makes of captions.",
        "",
        "## Intended use",
        "",
        "Image-text retrieval, in both directions and with captions of any length, and zero-shot classification "
        "through captions; or the vision tower as a feature extractor. The embeddings must come from the encoder whose "
        "fingerprint is `text_encoder` in config.json: those of another encoder mean nothing to this model. It says "
        "how well texts and images fit, not what is true, and inherits the biases of its data and of the LLM.",
        "",
    ]


def command_line(arguments: Sequence[str]) -> str:
    """The command of a process, as a shell takes it; the program by its name alone."""
    program = Path(arguments[0]).name if arguments else ""
    start = "llm2clip" if program in ("llm2clip", "__main__.py") else program
    return " ".join([start, *(shlex.quote(text) for text in arguments[1:])])


def licence_of(folder: str | Path) -> str:
    """The licence that a model directory's README.md names in its front matter; empty where it names none."""
    readme = Path(folder) / "README.md"
    if not readme.is_file():
        return ""
    text = readme.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license(?:_name)?:\s*(\S+)", front[1], re.MULTILINE) if front else None
    return found[1].strip("'\"") if found else ""
