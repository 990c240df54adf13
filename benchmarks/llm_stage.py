"""The LLM stage on OpenStax: caption retrieval among 500 held-out figures, for the recipe and its ablations.

python -m benchmarks.llm_stage --data DIR --llm models/SmolLM2-135M --minilm DIR --out runs/llm-stage --minutes 55

Every row embeds the printed caption and the long description of the same 500 figures, from books that training never
sees, and looks for the one with the other: R@1, R@10 and mean reciprocal rank in both directions, ties counted
against the model. Rows that train read `--config` and change what their name says. `--minutes` sets the number of steps
of each from the speed of its first ones, so that training ends within that time; without it the steps are `--steps` or
those of the configuration. A row that is done is not run again; one that was stopped goes on. Results:
`<out>/results.json`, and a table on the screen.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import captions, harness
from llm2clip.config import from_tree, read_yaml
from llm2clip.data.sources import open_source
from llm2clip.files import read_json, write_json
from llm2clip.models import CaptionEncoder
from llm2clip.settings import FinetuneLLMSettings
from llm2clip.training.metrics import read_metrics
from llm2clip.training.pair_sources import pair_source
from llm2clip.training.precision import autocast_of
from llm2clip.training.run import finetune_llm
from llm2clip_kernels import l2_normalize, retrieval_metrics, similarity_rank

GALLERY = 500
_CALIBRATION_STEPS = 6
_CALIBRATED_ON = 4  # of these the last, which are not slowed by the start
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "llm" / "smollm2-openstax.yaml"

Tree = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: shown.
        change: settings that differ from the configuration's; None: nothing is trained.
        llm: how an encoder without training differs from the configuration's.
        first: a row whose adapter training starts from; its minutes count too.
    """

    what: str
    change: Tree | None = None
    llm: Tree = field(default_factory=dict)
    first: str = ""


_MNTP = {"objective": "mntp", "llm": {"bidirectional": True, "pooling": "mean"}, "optim": {"lr": 5.0e-4}}
ROWS = {
    "raw-causal": Row("no LoRA, causal, mean", llm={"bidirectional": False, "pooling": "mean"}),
    "raw-bidirectional": Row("no LoRA, bidirectional, mean", llm={"bidirectional": True, "pooling": "mean"}),
    "raw-weighted": Row(
        "no LoRA, causal, weighted mean", llm={"bidirectional": False, "pooling": "weighted_mean"}
    ),
    "minilm": Row("all-MiniLM-L6-v2"),
    "cc": Row("CC, the recipe (causal, weighted mean)", {}),
    "mntp": Row("MNTP only, bidirectional, mean", _MNTP),
    "cc-causal": Row("CC, causal, mean", {"llm": {"bidirectional": False, "pooling": "mean"}}),
    "cc-bidirectional": Row("CC, bidirectional, mean", {"llm": {"bidirectional": True, "pooling": "mean"}}),
    "cc-eos": Row("CC, bidirectional, eos", {"llm": {"bidirectional": True, "pooling": "eos"}}),
    "cc-causal-eos": Row("CC, causal, eos", {"llm": {"bidirectional": False, "pooling": "eos"}}),
    "mntp-cc": Row(
        "MNTP + CC, bidirectional, mean", {"llm": {"bidirectional": True, "pooling": "mean"}}, first="mntp"
    ),
}


def held_out(folder: Path) -> list[tuple[str, str]]:
    """500 pairs of caption and description, evenly spread over the held-out books; no text occurs twice."""
    tree = {"data": {"train": [str(folder / "*val*.tar")]}}
    source = pair_source(open_source(tree["data"]["train"]), from_tree(FinetuneLLMSettings, tree), show=False)
    found: list[tuple[str, str]] = []
    seen: set[str] = set()
    for index in range(len(source)):
        texts = source[index].captions
        pair = texts["caption"][0], texts["alt"][0]
        if seen.isdisjoint(pair):
            found.append(pair)
            seen.update(pair)
    chosen = np.linspace(0, len(found) - 1, min(GALLERY, len(found))).round().astype(int)
    return [found[i] for i in chosen]


def scores(short: Tensor, long: Tensor) -> dict[str, float]:
    """R@1, R@10 (in %) and mean reciprocal rank of both directions."""
    values: dict[str, float] = {}
    ranks = similarity_rank(l2_normalize(short), l2_normalize(long))
    for name, rank in zip(("caption_to_alt", "alt_to_caption"), ranks, strict=True):
        metrics = retrieval_metrics(rank, ks=(1, 10))
        values |= {f"{name}_r{k}": round(100 * metrics["recall"][k], 1) for k in (1, 10)}
        values[f"{name}_mrr"] = round(metrics["mrr"], 3)
    return values


def minilm(folder: Path) -> Callable[[Sequence[str]], Tensor]:
    """all-MiniLM-L6-v2 as sentence-transformers runs it."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    return lambda texts: torch.from_numpy(np.asarray(model.encode(list(texts)))).float()


def settings_of(row: Row, options: argparse.Namespace, name: str) -> FinetuneLLMSettings:
    """The configuration with this run's paths and the row's changes."""
    tree = read_yaml(options.config)
    data = {"train": [str(options.data / "*train*.tar")]}
    paths: Tree = {"data": data, "llm": {"path": str(options.llm)}, "run": {"out": str(options.out / name)}}
    if row.first:
        paths["llm"]["adapter"] = str(options.out / row.first / "result")
    for part in (paths, row.change or {}, {"llm": row.llm}):
        for group, values in part.items():
            tree[group] = {**tree.get(group, {}), **values} if isinstance(values, dict) else values
    if options.batch:
        tree["run"]["batch_size"] = options.batch
    if options.steps:
        tree["run"]["steps"] = options.steps
        tree["optim"]["warmup_steps"] = min(tree["optim"].get("warmup_steps", 0), options.steps // 5)
    return from_tree(FinetuneLLMSettings, tree, where=str(options.config))


def calibrated(settings: FinetuneLLMSettings, minutes: float) -> FinetuneLLMSettings:
    """The settings with as many steps as fit into the minutes, from the time of the first few."""
    out = Path(settings.run.out)
    if (out / "config.yaml").exists():  # begun: its steps stay
        return replace(
            settings, run=replace(settings.run, steps=read_yaml(out / "config.yaml")["run"]["steps"])
        )
    trial = replace(
        settings.run, out=str(out) + "-speed", steps=_CALIBRATION_STEPS, log_every=1, save_every=1000
    )
    finetune_llm(replace(settings, run=trial))
    lines = [line for line in read_metrics(Path(trial.out) / "metrics.jsonl") if "samples_per_second" in line]
    speed = sorted(line["samples_per_second"] for line in lines[-_CALIBRATED_ON:])[_CALIBRATED_ON // 2 - 1]
    steps = max(1, int(60 * minutes * speed / settings.run.batch_size))
    return replace(settings, run=replace(settings.run, steps=steps))


def trained(name: str, row: Row, options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Train a row, or find it done; its adapter, and what it took."""
    settings = settings_of(row, options, name)
    if options.minutes:
        settings = calibrated(settings, options.minutes)
    result = finetune_llm(settings)
    summary = read_json(Path(settings.run.out) / "summary.json")
    spent = {
        "steps": summary["steps"],
        "pairs": summary["samples"],
        "minutes": round(summary["seconds"] / 60, 1),
    }
    if row.first:
        first = read_json(options.out / row.first / "summary.json")
        spent["minutes"] = round(spent["minutes"] + first["seconds"] / 60, 1)
    return result, spent


def embed(
    name: str, row: Row, options: argparse.Namespace, texts: Sequence[str]
) -> tuple[Tensor, dict[str, Any]]:
    """Embeddings of the texts by a row's encoder, trained first where it is to be."""
    if name == "minilm":
        return minilm(options.minilm)(texts), {}
    adapter, spent = trained(name, row, options) if row.change is not None else (None, {})
    settings = settings_of(row, options, name)
    llm = replace(settings.llm, adapter=str(adapter) if adapter else None)
    with warnings.catch_warnings():
        # captions are evaluated whole, whatever they were cut to in training
        warnings.filterwarnings("ignore", message="max_length=")
        encoder = CaptionEncoder.from_settings(replace(llm, max_length=512))
    with autocast_of(settings.run.precision, torch.device("cpu"))():
        return encoder.encode(texts), spent


def table(results: dict[str, dict[str, Any]]) -> str:
    """The rows that are done as Markdown."""
    lines = [
        "| | caption → alt R@1 | R@10 | alt → caption R@1 | R@10 | steps | pairs seen | minutes |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    columns = ("caption_to_alt_r1", "caption_to_alt_r10", "alt_to_caption_r1", "alt_to_caption_r10")
    for name in ROWS:
        if name in results:
            values = [results[name].get(column, "") for column in (*columns, "steps", "pairs", "minutes")]
            lines.append(f"| {ROWS[name].what} | " + " | ".join(map(str, values)) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=captions.OPENSTAX, help="folder of train and val tars")
    parser.add_argument("--llm", type=Path, required=True, help="SmolLM2-135M as a transformers directory")
    parser.add_argument(
        "--minilm", type=Path, help="all-MiniLM-L6-v2 as a directory; without it the row is left out"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/llm-stage"))
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="training time of a row; 0: the steps of the file"
    )
    parser.add_argument("--steps", type=int, default=0, help="of a row; 0: those of the file")
    parser.add_argument("--batch", type=int, default=0, help="pairs of a step; 0: as in the file")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)

    pairs = held_out(options.data)
    texts = [text for pair in pairs for text in pair]
    file = options.out / "results.json"
    results: dict[str, dict[str, Any]] = read_json(file)["rows"] if file.exists() else {}
    wanted = [name for name in options.rows if name != "minilm" or options.minilm]
    for name in wanted:
        if name in results:
            continue
        needed = ROWS[name].first
        if needed and needed not in results and needed not in wanted[: wanted.index(name)]:
            sys.exit(f"row {name} starts from row {needed}; name both")
        begin = time.monotonic()
        embeddings, spent = embed(name, ROWS[name], options, texts)
        results[name] = scores(embeddings[::2], embeddings[1::2]) | spent
        results[name]["wall_minutes"] = round((time.monotonic() - begin) / 60, 1)
        write_json(file, {"gallery": len(pairs), "environment": harness.environment(), "rows": results})
        print(json.dumps({name: results[name]}), flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
