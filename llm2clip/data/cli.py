"""`llm2clip data`: build the built-in data sets, check any source."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from llm2clip.errors import DataError
from llm2clip.files import write_json


def add_data_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the command `data` with its sub-commands to the command line's parser."""
    data = subparsers.add_parser("data", help="build a data set, or check one", description=__doc__)
    data.set_defaults(handler=run_data)
    commands = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND")

    cataclysm = commands.add_parser(
        "cataclysm", help="game sprites with names, descriptions and translations (CC BY-SA 3.0)"
    )
    cataclysm.add_argument("out", help="directory of the shards")
    cataclysm.add_argument("--package", metavar="FILE.deb", help="a downloaded cataclysm-dda-data package")
    cataclysm.add_argument("--languages", type=_names, metavar="A,B", help="translations to include")
    cataclysm.add_argument("--tilesets", type=_names, metavar="A,B", help="tilesets to use")
    cataclysm.add_argument(
        "--val-share", type=float, default=0.1, help="share of held-out groups (%(default)s)"
    )

    openstax = commands.add_parser(
        "openstax", help="textbook figures with captions and descriptions (CC BY 4.0)"
    )
    openstax.add_argument("out", help="directory of the shards")
    openstax.add_argument("--books", type=_names, metavar="A,B", help="repositories to use; all by default")
    openstax.add_argument(
        "--side", type=int, default=256, help="short side of the images in pixels (%(default)s)"
    )

    check = commands.add_parser("check", help="read every sample of a source and report what is in it")
    check.add_argument("source", nargs="+", help="shards, folder, .jsonl, .csv or .parquet")
    check.add_argument("--limit", type=int, help="read only the first so many samples")
    check.add_argument(
        "--json", metavar="FILE", help="also write the full report here; `-` prints it instead"
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def run_data(args: argparse.Namespace) -> int:
    """Run the chosen sub-command; 0 on success, 1 when `check` found bad samples.

    Raises:
        UserError: what the user can act on; the command line prints it.
    """
    if args.data_command == "cataclysm":
        return _cataclysm(args)
    return _openstax(args) if args.data_command == "openstax" else _check(args)


def _cataclysm(args: argparse.Namespace) -> int:
    from llm2clip.data.cataclysm import LANGUAGES, TILESETS, build_cataclysm

    summary = build_cataclysm(
        args.out,
        package=args.package,
        languages=args.languages or LANGUAGES,
        tilesets=args.tilesets or TILESETS,
        val_share=args.val_share,
    )
    _announce(args.out, summary)
    return 0


def _openstax(args: argparse.Namespace) -> int:
    from llm2clip.data.openstax import BOOKS, build_openstax

    books = BOOKS
    if args.books:
        names = [book.repository for book in BOOKS]
        unknown = [name for name in args.books if name not in names]
        if unknown:
            raise DataError(f"unknown book {', '.join(unknown)}; known are {', '.join(names)}")
        books = tuple(book for book in BOOKS if book.repository in args.books)
    _announce(args.out, build_openstax(args.out, books=books, side=args.side))
    return 0


def _announce(out: str, summary: dict[str, Any]) -> None:
    print(json.dumps(summary["counts"], indent=2, ensure_ascii=False))
    print(f"{out}: complete, {summary['license']} (see {os.path.join(out, 'LICENSE.txt')})")
    splits = [split for split, shards in summary["shards"].items() if shards]
    print("  use: " + " ".join(f"data.{split}=[{os.path.join(out, split)}-*.tar]" for split in splits))


def _check(args: argparse.Namespace) -> int:
    from llm2clip.data.check import check_source
    from llm2clip.data.sources import open_source

    source = open_source(args.source, mixed_splits=True)
    report = check_source(source, limit=args.limit)
    if args.json == "-":
        print(report.to_json())
    else:
        print(report.render())
    if args.json and args.json != "-":
        write_json(args.json, report.to_dict())
    return 1 if report.bad else 0
