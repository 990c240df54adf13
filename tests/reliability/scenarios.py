"""The commands that are attacked, on tiny models and data: how they are started, and what they must leave behind."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llm2clip.config import dump_yaml
from tests.reliability import evidence
from tests.reliability.forks import preload, run
from tests.search_kit import build_search_kit
from tests.test_data_builders import package
from tests.training_kit import Kit, make_kit, write_set
from tests.training_kit import records as caption_records

Facts = dict[str, str]


@dataclass(frozen=True)
class Scenario:
    """One command.

    Attributes:
        name: of the scenario.
        argv: the command line; it writes to `out` and goes on when it is given again.
        out: directory that it fills.
        facts: what a finished `out` says, without what no two runs share (times); equal facts, equal runs.
        check: raises when what a kill left in `out` is not whole.
    """

    name: str
    argv: tuple[str, ...]
    out: Path
    facts: Callable[[Path], Facts]
    check: Callable[[Path], None]

    def work(self) -> int:
        """Run the command in this process, a child of the fork server."""
        from llm2clip.cli import main

        tempfile.tempdir = str(temporary(self.out))
        return main(list(self.argv))

    def clear(self) -> None:
        """Remove what earlier runs left, temporary files too."""
        for place in (self.out, temporary(self.out)):
            shutil.rmtree(place, ignore_errors=True)
        temporary(self.out).mkdir()


def temporary(out: Path) -> Path:
    """Where commands put temporary files: beside `out`, so that faults reach them."""
    return out.parent / "tmp"


NAMES = (
    "data",
    "finetune-llm",
    "embed",
    "embed-images",
    "train",
    "evaluate",
    "evaluate-retrieval",
    "export",
    "search",
)


def build(root: Path) -> dict[str, Scenario]:
    """Write models and data below `root`, and load all modules that the commands need into this process."""
    temporary(root / "out" / "any").mkdir(parents=True)

    def fixtures() -> int:
        make_kit(root / "kit")
        build_search_kit(root / "search")
        write_set(root / "many" / "train-000000.tar", caption_records(48))
        package(root / "package.deb")
        return 0

    built = run(fixtures, root / "build.log")
    assert built.code == 0, built.shown()
    found = {scenario.name: scenario for scenario in _scenarios(root)}
    assert tuple(found) == NAMES
    preload([scenario.work for scenario in found.values()], root / "preload.log")
    return found


def _scenarios(root: Path) -> list[Scenario]:
    kit, tiny, out = Kit(root / "kit"), root / "search", root / "out"
    many = str(root / "many" / "train-000000.tar")
    llm, clip = kit.root / "llm", tiny / "first"
    captions = ["data.captions.short=[name]", "data.captions.long=[description]"]
    stages = {
        "finetune-llm": kit.llm_stage(out / "finetune-llm", steps=12, save_every=2),
        # two workers: a kill of the group has to take them along, and a resume to find the same samples without them
        "train": kit.clip_stage(out / "train", {"optim": {"ema": 0.9}}, steps=14, save_every=2, workers=2),
    }
    for name, settings in stages.items():
        (root / f"{name}.yaml").write_text(dump_yaml(settings))
    package_options = ["--tilesets", "Set", "--languages", "de", "--val-share", "0.25"]
    commands: dict[str, tuple[list[str], Callable[[Path], Facts], Callable[[Path], None]]] = {
        "data": (
            ["data", "cataclysm", str(out / "data"), "--package", str(root / "package.deb"), *package_options],
            evidence.files,
            evidence.check_shards,
        ),
        "finetune-llm": (
            ["finetune-llm", "--config", str(root / "finetune-llm.yaml")], evidence.files, evidence.check_run
        ),
        "embed": (
            ["embed", f"data.train=[{many}]", *captions, f"llm.path={llm}", f"out={out / 'embed'}", "commit_rows=8",
             "shard_rows=32", "device=cpu"],
            evidence.stores, evidence.check_stores,
        ),
        "embed-images": (
            ["embed", "images", f"data.train=[{many}]", f"model={tiny / 'clip'}", "views=2", "commit_rows=8",
             "batch_size=8", "shard_rows=32", f"out={out / 'embed-images'}", "device=cpu"],
            evidence.stores, evidence.check_stores,
        ),
        "train": (["train", "--config", str(root / "train.yaml")], evidence.files, evidence.check_run),
        "evaluate": (
            ["evaluate", f"data.val=[{kit.root}/data/val-000000.tar]", *captions, f"llm.path={llm}",
             f"model={clip}", f"store={kit.root / 'store'}", f"out={out / 'evaluate'}", "device=cpu"],
            evidence.files, evidence.check_json,
        ),
        "evaluate-retrieval": (
            ["evaluate", "retrieval", f"data.val=[{many}]", *captions, "samples=1", "resamples=20", "device=cpu",
             f"models={json.dumps({'one': str(clip), 'two': str(tiny / 'second')})}", f"llm.path={tiny / 'llm'}",
             f"out={out / 'evaluate-retrieval'}"],
            evidence.files, evidence.check_json,
        ),
        "export": (
            ["export", f"model={clip}", "layout=huggingface", f"out={out / 'export'}"],
            evidence.files, evidence.check_export,
        ),
        "search": (
            ["search", f"model={clip}", f"images=[{many}]", f"store={tiny / 'store'}", f"llm.path={tiny / 'llm'}",
             "build_only=true", "commit_rows=8", "batch_size=8", f"index={out / 'search'}", "device=cpu"],
            evidence.stores, evidence.check_stores,
        ),
    }  # fmt: skip
    return [
        Scenario(name, tuple(argv), out / name, facts, check)
        for name, (argv, facts, check) in commands.items()
    ]
