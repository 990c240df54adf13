"""Class names as captions: one prompt, OpenAI's ensemble of 80, CuPL's sentences, or templates of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from llm2clip.errors import ConfigError, DataError
from llm2clip.evaluation.datasets.text_files import read_lines
from llm2clip.files import read_json

SINGLE = "a photo of a {c}."
KNOWN = ("single", "ensemble", "name", "cupl", "cupl+ensemble")


@dataclass(frozen=True)
class PromptSet:
    """Prompts of every class.

    Attributes:
        title: row in the tables.
        prompts: one list per class, none empty.
    """

    title: str
    prompts: list[list[str]]


def prompt_sets(kinds: Sequence[str], names: Sequence[str], cupl: str, key: str) -> list[PromptSet]:
    """The prompts of every kind asked for.

    Args:
        kinds: `single`, `ensemble`, `name`, `cupl`, `cupl+ensemble`, or files with a template per line.
        names: class names.
        cupl: CuPL file, for the kinds that need it.
        key: entry of a CuPL file that holds several data sets.

    Raises:
        ConfigError: a kind is neither known nor a file, or needs a CuPL file that is not given.
        DataError: a file has another format.
    """
    if not kinds:
        raise ConfigError(f"prompts is empty; expected some of {', '.join(KNOWN)} or files of templates")
    return [_prompt_set(kind, names, cupl, key) for kind in kinds]


def _prompt_set(kind: str, names: Sequence[str], cupl: str, key: str) -> PromptSet:
    if kind == "single":
        return PromptSet("single prompt", _filled([SINGLE], names))
    if kind == "name":
        return PromptSet("name alone", [[name] for name in names])
    if kind == "ensemble":
        templates = imagenet_templates()
        return PromptSet(f"{len(templates)} prompts", _filled(templates, names))
    if kind in ("cupl", "cupl+ensemble"):
        if not cupl:
            raise ConfigError(f"prompts: {kind} needs cupl, the file of CuPL's sentences")
        sentences = read_cupl(cupl, names, key)
        if kind == "cupl":
            return PromptSet("CuPL", sentences)
        both = zip(sentences, _filled(imagenet_templates(), names), strict=True)
        return PromptSet("CuPL and 80 prompts", [own + more for own, more in both])
    file = Path(kind).expanduser()
    if not file.is_file():
        raise ConfigError(f"prompts: {kind!r} is neither a file nor one of {', '.join(KNOWN)}")
    templates = [line for _, line in read_lines(file)]
    if lost := [template for template in templates if "{c}" not in template and "{}" not in template]:
        raise DataError(f"{file}: {lost[0]!r} has no {{c}} or {{}}, where the class name goes")
    if not templates:
        raise DataError(f"{file} has no templates")
    return PromptSet(file.stem, _filled(templates, names))


def imagenet_templates() -> list[str]:
    """The 80 templates of OpenAI's CLIP for ImageNet; {c} stands for the class name."""
    text = files("llm2clip.evaluation").joinpath("imagenet_templates.txt").read_text(encoding="utf-8")
    return text.splitlines()


def _filled(templates: Sequence[str], names: Sequence[str]) -> list[list[str]]:
    return [[template.replace("{c}", name).replace("{}", name) for template in templates] for name in names]


def read_cupl(file: str, names: Sequence[str], key: str) -> list[list[str]]:
    """CuPL's sentences for every class (Pratt et al., arXiv 2209.03320).

    Format: {"tench": ["A tench is a freshwater fish ...", ...], ...}, directly or below the name of a data set.

    Raises:
        DataError: the file has another form, or no sentences for a class (names the first ten).
    """
    path = Path(file).expanduser()
    values: Any = read_json(path, DataError)
    if isinstance(values, dict) and isinstance(values.get(key), dict):
        values = values[key]
    if not isinstance(values, dict) or not all(isinstance(own, list) for own in values.values()):
        raise DataError(f"{path}: expected an object of class name -> sentences, directly or below {key!r}")
    found = [[str(text).strip() for text in values.get(name, []) if str(text).strip()] for name in names]
    if lost := [name for name, own in zip(names, found, strict=True) if not own]:
        raise DataError(
            f"{path} has no sentences for {len(lost)} of {len(names)} classes: {', '.join(lost[:10])}; it has them for "
            f"{', '.join(list(values)[:5])}, ..."
        )
    return found
