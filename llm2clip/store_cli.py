"""`llm2clip store`: look at an embedding store, verify it, repair it, write it in another precision."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from llm2clip.files import write_json
from llm2clip.settings import StoreDtype


def add_store_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the command `store` with its sub-commands to the command line's parser."""
    store = subparsers.add_parser(
        "store", help="look at, verify, repair an embedding store", description=__doc__
    )
    commands = store.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="what a store holds, its size and who made it")
    info.add_argument("path", help="directory of the store")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(handler=_info)

    verify = commands.add_parser(
        "verify", help="read every byte and compare checksums; names damaged shards and rows (exit status 1)"
    )
    verify.add_argument("path", help="directory of the store")
    verify.add_argument("--quick", action="store_true", help="only presence, sizes and headers")
    verify.add_argument("--json", metavar="FILE", help="also write the report here")
    verify.set_defaults(handler=_verify)

    repair = commands.add_parser(
        "repair",
        help="drop what is damaged and, with the settings of `embed`, compute only that again",
        description="Drops damaged rows. With settings (data, llm) as for `llm2clip embed` their captions are then "
        "embedded again; without, the next `llm2clip embed` does it.",
    )
    repair.add_argument("path", help="directory of the store")
    repair.add_argument("--quick", action="store_true", help="do not compare checksums")
    repair.add_argument("--config", help="YAML file with the settings of `llm2clip embed`")
    repair.add_argument(
        "overrides", nargs="*", metavar="name=value", help="settings, e.g. llm.path=models/llama"
    )
    repair.set_defaults(handler=_repair)

    convert = commands.add_parser(
        "convert", help="write a store again in another precision or with fewer dimensions; needs no LLM"
    )
    convert.add_argument("path", help="directory of the store")
    convert.add_argument("out", help="directory of the new store")
    convert.add_argument("--dtype", choices=get_args(StoreDtype), help="precision of the new store")
    convert.add_argument(
        "--dim", type=int, help="keep the first so many values of each embedding (Matryoshka)"
    )
    convert.set_defaults(handler=_convert)


def _info(args: argparse.Namespace) -> int:
    from llm2clip.data.store_check import stray_files
    from llm2clip.data.store_format import INDEX_NAME, StoreIndex

    root = Path(args.path)
    index = StoreIndex.load(root)
    size = sum(entry.bytes for entry in index.shards)
    table = index.lookup
    stray = [file.name for file in stray_files(root, index)]
    facts = {
        "captions": index.rows,
        "dim": index.dim,
        "dtype": index.dtype,
        "complete": index.complete,
        "shards": len(index.shards),
        "bytes": size,
        "bytes_per_caption": round(size / index.rows, 1) if index.rows else 0,
        "lookup_captions": table.rows if table else 0,
        "lookup_bytes": table.bytes if table else 0,
        "index_bytes": (root / INDEX_NAME).stat().st_size,
        "generation": index.generation,
        "stray_files": stray,
        "fingerprint": index.fingerprint,
    }
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return 0
    state = "complete" if index.complete else "unfinished"
    print(f"{root}: {index.rows} captions, dim {index.dim}, {index.dtype}, {state}")
    print(
        f"  {len(index.shards)} shards, {size / 2**30:.3f} GiB, {facts['bytes_per_caption']} bytes a caption"
    )
    if table:
        print(
            f"  table of addresses: {table.rows} captions, {table.bytes / 2**20:.1f} MiB, mapped when opened"
        )
    if late := index.rows - (table.rows if table else 0):
        print(
            f"  {late} captions outside a table: about {late * 21 / 2**20:.1f} MiB in every process that opens it"
        )
    for name in stray:
        print(f"  left over from an interrupted write, ignored: {name}")
    for name, value in index.fingerprint.items():
        print(f"  encoder {name}: {value!r}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from llm2clip.data.store import verify_store

    report = verify_store(args.path, checksums=not args.quick)
    print(report)
    if report.damaged:
        print(f"  repair it: llm2clip store repair {report.path}, with the settings of llm2clip embed")
    if args.json:
        damaged = {
            file: {"reason": damage.reason, "rows": damage.rows, "captions": damage.count}
            for file, damage in report.damaged.items()
        }
        counts = {"rows": report.rows, "shards": report.shards, "bytes": report.bytes}
        write_json(
            args.json,
            {"ok": report.ok, "complete": report.complete, **counts, "duplicates": report.duplicates,
             "damaged": damaged, "stray": report.stray},
        )  # fmt: skip
    return 0 if report.ok else 1


def _repair(args: argparse.Namespace) -> int:
    from llm2clip.config import load_settings
    from llm2clip.data.store import repair_store
    from llm2clip.data.store_format import StoreIndex, check_fingerprint
    from llm2clip.embed import embed
    from llm2clip.settings import EmbedSettings

    index = StoreIndex.load(Path(args.path))
    encoder = None
    if args.config or args.overrides:
        settings: EmbedSettings = load_settings(EmbedSettings, args.config, args.overrides)
        settings = replace(settings, out=args.path, dtype=index.dtype)
        from llm2clip.models.caption_encoder import CaptionEncoder
        from llm2clip.training.world import resolve_device

        # nothing is dropped before it is certain that this encoder can make it again
        encoder = CaptionEncoder.from_settings(settings.llm, resolve_device(settings.device))
        check_fingerprint(Path(args.path), index.fingerprint, encoder.fingerprint())
    report = repair_store(args.path, checksums=not args.quick)
    print(report)
    if not report.damaged:
        return 0
    lost = sum(damage.count for damage in report.damaged.values())
    if encoder is None:
        print(
            f"dropped {lost} captions; run `llm2clip embed` with the settings of this store to embed them again"
        )
        return 0
    store = embed(settings, encoder)
    missing = report.rows - len(store)
    print(f"dropped {lost} captions and embedded them again; the store has {len(store)}")
    if missing > 0:
        print(f"{missing} of them are not in the data given, so they are gone")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from llm2clip.data.store import EmbeddingStore
    from llm2clip.data.store_repair import convert_store

    convert_store(args.path, args.out, dtype=args.dtype, dim=args.dim)
    print(EmbeddingStore.open(args.out))
    return 0
