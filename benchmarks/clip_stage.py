"""The CLIP stage on OpenStax: one tower taught by the tuned LLM, by the raw one, and by a ready sentence encoder.

python -m benchmarks.held_out --out runs/openstax
python -m benchmarks.clip_stage --data runs/openstax --llm models/SmolLM2-135M --adapter runs/llm-stage/cc/result \
    --minilm DIR --out runs/clip-stage

All towers of a row are trained with the same settings and steps, with each of `--seeds`; only the embeddings of the
captions differ. Evaluated by `llm2clip evaluate retrieval` on books and figures that no stage has seen:

- `books`: all figures of the held-out books, their captions (short) and descriptions (long);
- `whole`, `first-77`: those of them whose description is longer than 77 tokens, with all of it and with its first 77;
- `physics`: 300 held-out figures of a book of training (`benchmarks.held_out`) in English, Spanish and Polish;
  `centred`: the same with `center=true`.

What is done is not done again. Results: `<out>/results.json`, and tables on the screen.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn import functional

from benchmarks import harness, held_out
from benchmarks.clip_recipe import caption_texts
from benchmarks.clip_stage_tables import TEACHERS, TOWERS, tables
from llm2clip.config import from_tree, load_settings, read_yaml
from llm2clip.data.store import EmbeddingStore
from llm2clip.data.store_writer import StoreWriter
from llm2clip.embed import embed
from llm2clip.evaluation.benchmark_retrieval import evaluate_retrieval
from llm2clip.evaluation.sentence_encoder import SentenceEncoder
from llm2clip.files import write_json
from llm2clip.progress import Progress
from llm2clip.settings import EmbedSettings, RetrievalSettings, TrainSettings
from llm2clip.training.run import train_clip

CLIP_TOKENS = 77
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "llm" / "smollm2-openstax.yaml"
# a small ViT, since it starts from random weights and sees five thousand images
_VIT = {
    "model_type": "vit", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6,
    "num_attention_heads": 4, "patch_size": 16, "image_size": 64,
}  # fmt: skip
_TRANSLATIONS = {
    f"{language}_{field}": f"{language}.{field}"
    for language in held_out.LANGUAGES
    for field in ("alt", "caption")
}
Tree = dict[str, Any]


def long_only(data: Path, out: Path, llm: Path) -> None:
    """Write `whole` and `first-77`: the held-out figures whose description is longer than CLIP could read."""
    if (out / "first-77" / "openstax-val-000000.tar").exists():
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llm, local_files_only=True)
    whole: list[held_out.Member] = []
    cut: list[held_out.Member] = []
    for path in sorted(data.glob("openstax-val-*.tar")):
        for _, members, record in held_out.samples(path):
            ids = tokenizer(record.get("alt") or "", add_special_tokens=False)["input_ids"]
            if len(ids) <= CLIP_TOKENS:
                continue
            short = json.dumps({**record, "alt": tokenizer.decode(ids[:CLIP_TOKENS])}).encode()
            whole += members
            cut += [(name, short if name.endswith(".json") else content) for name, content in members]
    held_out.write(out / "whole" / "openstax-val-000000.tar", whole)
    held_out.write(out / "first-77" / "openstax-val-000000.tar", cut)


def llm_store(options: argparse.Namespace, teacher: str) -> str:
    """Every caption by the LLM: training, held-out books, cut ones, and physics with its translations."""
    out = options.out / f"store-{teacher}"
    tree = read_yaml(options.config)["llm"] | {"path": str(options.llm), "max_length": 512}
    if teacher == "tuned":
        tree["adapter"] = str(options.adapter)
    held = {"val": [str(options.data / "openstax-val-*.tar")]}
    parts: list[Tree] = [{"train": [str(options.data / "openstax-train-*.tar")], **held}]
    if teacher == "tuned":
        cut = [str(options.out / "first-77" / "*.tar")]
        physics = [str(options.data / held_out.PHYSICS)]
        parts.append({"val": [*cut, *physics], "captions": {"translations": _TRANSLATIONS}})
    for data in parts:
        # what the store has is not embedded again
        embed(from_tree(EmbedSettings, {"data": data, "llm": tree, "out": str(out), "dtype": "fp16"}))
    return str(out)


def minilm_store(options: argparse.Namespace) -> str:
    """The captions of training and of the held-out books by the sentence encoder."""
    out = options.out / "store-minilm"
    if (out / "embed.json").exists():
        return str(out)
    texts = caption_texts([str(options.data / f"openstax-{split}-*.tar") for split in ("train", "val")])
    with Progress(len(texts), "all-MiniLM-L6-v2", "captions") as shown:
        encoder = SentenceEncoder(options.minilm, torch.device("cpu"))
        encoded = encoder.encode(texts, shown)
    with StoreWriter(
        out, dim=encoded.embeddings.shape[1], dtype="fp16", fingerprint={"features": "all-MiniLM-L6-v2"}
    ) as writer:
        writer.add(texts, encoded.embeddings)
        writer.finish()
    write_json(out / "embed.json", {"captions": len(texts), "truncated": encoded.truncated})
    return str(out)


def spread(options: argparse.Namespace, store: str) -> float:
    """Root mean square distance of the training captions' unit embeddings from their mean."""
    texts = caption_texts([str(options.data / "openstax-train-*.tar")])
    unit = functional.normalize(EmbeddingStore.open(store).get(texts).float(), dim=1)
    return float((unit - unit.mean(0)).square().sum(1).mean().sqrt())


def train_tower(options: argparse.Namespace, tower: str, teacher: str, store: str, seed: int) -> str:
    """One training run; its model directory."""
    vision: Tree = {"kind": "efficientnet-lite0", "image_size": 64}
    if tower == "vit":
        config = options.out / "vit.json"
        config.write_text(json.dumps(_VIT))
        vision = {"kind": "transformers", "path": str(config), "image_size": 64}
    tree: Tree = {
        "data": {"train": [str(options.data / "openstax-train-*.tar")]},
        "store": store,
        "model": {"vision": vision, "embed_dim": 512, "adapter_depth": 1},
        "optim": {"lr": 1.0e-3, "warmup_steps": options.steps // 4},
        "run": {
            "out": str(options.out / f"{tower}-{teacher}-{seed}"),
            "steps": options.steps,
            "batch_size": options.batch,
            "seed": seed,
            "log_every": 4,
            "save_every": options.steps,
            "peak_tflops": 0,
        },
    }
    if options.noise:
        tree["model"]["adapter_noise"] = round(options.noise * spread(options, store), 4)
    if tower != "vit":
        tree["optim"]["lr_scales"] = {"vision": 0.3}
    recipe = options.out / f"{tower}-{teacher}-{seed}.yaml"  # as `llm2clip train --config` takes it
    recipe.write_text(yaml.safe_dump(tree, sort_keys=False))
    return str(train_clip(load_settings(TrainSettings, recipe, options.set)))


def evaluate(
    options: argparse.Namespace, place: str, data: Tree, models: Tree, stores: Iterable[str]
) -> Tree:
    """Rows of `llm2clip evaluate retrieval`: model and captions -> R@1 and R@10 in %, of both directions."""
    tree = data | {
        "models": models,
        "stores": list(stores),
        "out": str(options.out / "evaluation" / place),
        "samples": 0,
    }
    found: Tree = {}
    for row in evaluate_retrieval(from_tree(RetrievalSettings, tree))["retrieval"]:
        scores, kind = row["scores"], f"{row['model']} {row['captions']}"
        found.setdefault(kind, {"gallery": scores["gallery"], "queries": scores["queries"]})
        for k in ("1", "10"):
            found[kind].setdefault(f"chance_r{k}", round(100 * scores["chance"][k], 2))
            found[kind].setdefault(f"r{k}", []).append(round(100 * scores["recall"][k], 2))
    return found


def measure(options: argparse.Namespace, tower: str, seed: int, stores: Tree) -> Tree:
    """Train the towers of one seed and evaluate them."""
    models = {name: train_tower(options, tower, name, store, seed) for name, store in stores.items()}
    place = f"{tower}-{seed}"

    def english(folder: Path) -> Tree:
        return {"data": {"val": [str(folder / "openstax-val-*.tar")]}}

    found = {"books": evaluate(options, place, english(options.data), models, stores.values())}
    if "tuned" in models:
        tuned, store = {"tuned": models["tuned"]}, [stores["tuned"]]
        for name in ("whole", "first-77"):
            found[name] = evaluate(options, f"{place}-{name}", english(options.out / name), tuned, store)
        physics = {"datasets": {"openstax": str((options.data / held_out.PHYSICS).parent)}}
        for name, center in (("physics", False), ("centred", True)):
            found[name] = evaluate(options, f"{place}-{name}", physics | {"center": center}, tuned, store)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=Path("runs/openstax"), help="folder of benchmarks.held_out"
    )
    parser.add_argument("--llm", type=Path, required=True, help="SmolLM2-135M as a transformers directory")
    parser.add_argument("--adapter", type=Path, required=True, help="adapter of the LLM stage")
    parser.add_argument("--minilm", type=Path, help="all-MiniLM-L6-v2 as a directory; else left out")
    parser.add_argument("--config", type=Path, default=CONFIG, help="settings of the LLM stage")
    parser.add_argument("--out", type=Path, default=Path("runs/clip-stage"))
    parser.add_argument("--towers", nargs="+", default=list(TOWERS), choices=TOWERS)
    parser.add_argument("--teachers", nargs="+", default=list(TEACHERS), choices=TEACHERS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=250, help="of a training run")
    parser.add_argument("--batch", type=int, default=256, help="images of a step")
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        help="of training on a teacher's embeddings, as a share of their spread, which differs between teachers",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="settings of a training run, over the recipe's",
    )
    parser.add_argument("--stores-only", action="store_true", help="embed, and stop")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    long_only(options.data, options.out, options.llm)
    wanted = [name for name in options.teachers if name != "minilm" or options.minilm]
    stores = {
        name: minilm_store(options) if name == "minilm" else llm_store(options, name) for name in wanted
    }
    if options.stores_only:
        return
    runs: list[Tree] = []
    for tower in options.towers:
        for seed in options.seeds:
            runs.append({"tower": tower, "seed": seed, **measure(options, tower, seed, stores)})
            write_json(
                options.out / "results.json",
                {
                    "steps": options.steps,
                    "batch": options.batch,
                    "noise": options.noise,
                    "set": options.set,
                    "environment": harness.environment(),
                    "runs": runs,
                },
            )
    print(tables(runs))


if __name__ == "__main__":
    main()
