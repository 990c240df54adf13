"""Builder of the `cataclysm` data set: game sprites with a name, a description and translations."""

from __future__ import annotations

import hashlib
import io
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llm2clip.data.debian import download_package, unpack_package
from llm2clip.data.game_data import (
    Entity,
    Tileset,
    clean_text,
    cut_sprites,
    depicted_entity,
    read_entities,
    read_tileset,
    read_translations,
    translate,
)
from llm2clip.data.shards import ShardWriter
from llm2clip.errors import DataError
from llm2clip.files import make_directory, read_json, temporary_directory, write_json, write_text
from llm2clip.progress import Progress

PACKAGE = "cataclysm-dda-data"
LICENSE = "CC-BY-SA-3.0"
ATTRIBUTION = "Cataclysm: Dark Days Ahead contributors; tileset {tileset}"
LANGUAGES = ("de", "fr", "es", "pl", "ru", "zh", "ja", "pt", "hu", "ko")
# in this order, the first tileset that has a picture of an entity keeps it
TILESETS = (
    "UltimateCataclysm",
    "ChibiUltica",
    "MshockXotto+",
    "Cuteclysm",
    "BrownLikeBears",
    "ChestHole16Tileset",
    "HoderTileset",
)
# a sprite that stands for more ids than this is a placeholder, not a picture of any of them
MAX_SHARED = 3
LICENSE_TEXT = """\
These shards hold sprites, names, descriptions and translations of the game
Cataclysm: Dark Days Ahead (https://github.com/CleverRaven/Cataclysm-DDA), as packaged by Debian in
{package}. Copyright: Kevin Granade, the authors of the tilesets and many other contributors; each
sample's JSON names its tileset, and the copyright file of the package is copied below.

Licence: Creative Commons Attribution-ShareAlike 3.0 Unported,
https://creativecommons.org/licenses/by-sa/3.0/

Changes made: sprites were cut out of their sheets; colour tags and extra white space were removed
from the texts. What you derive from these shards and pass on must carry the same licence.

{copyright}"""


@dataclass(slots=True)
class _Picture:
    tile: str
    entity: Entity
    tileset: str
    png: bytes
    content: bytes


def build_cataclysm(
    out: str | Path,
    *,
    package: str | Path | None = None,
    languages: Sequence[str] = LANGUAGES,
    tilesets: Sequence[str] = TILESETS,
    val_share: float = 0.1,
    shard_samples: int = 1000,
) -> dict[str, Any]:
    """Build `train-*.tar`, `val-*.tar` and `dataset.json` in `out` and return the content of the latter.

    A finished `out` is left alone. Entities that share a name, a description or a sprite form one
    group, and groups as wholes are held out, so nothing in `val` was seen in training. The bytes
    written depend on the package and the arguments alone.

    Args:
        out: directory of the shards.
        package: a downloaded .deb file; None asks apt for the package `cataclysm-dda-data`.
        languages: translations to include, as far as the package has them.
        tilesets: folders of the package's `gfx/`.
        val_share: share of the groups that is held out, between 0 and 1.
        shard_samples: samples per shard.

    Raises:
        DataError: the package cannot be had or read, or `out` holds a data set built otherwise.
    """
    if not 0.0 < val_share < 1.0:
        raise DataError(
            f"val_share is the share of held-out groups and must lie between 0 and 1, got {val_share}"
        )
    out = Path(out)
    options = {"languages": list(languages), "tilesets": list(tilesets), "val_share": val_share,
               "shard_samples": shard_samples}  # fmt: skip
    if (out / "dataset.json").exists():
        finished: dict[str, Any] = read_json(out / "dataset.json", DataError)
        if finished.get("options") != options:
            raise DataError(
                f"{out} already holds a data set built with other options ({finished.get('options')}, "
                f"now {options}); choose another directory or remove that one"
            )
        return finished
    with temporary_directory() as work:
        file = Path(package) if package is not None else download_package(PACKAGE, work)
        count = unpack_package(file, work / "files", _needed)
        roots = sorted((work / "files").rglob("tile_config.json"))
        if not count or not roots:
            raise DataError(f"{file} has no tilesets inside; expected the Debian package {PACKAGE}")
        return _build(out, work / "files", file.name, options)


def _needed(path: str) -> bool:
    return (
        ("/gfx/" in path and path.endswith((".png", ".json")))
        or ("/json/" in path or "/mods/" in path) and path.endswith(".json")
        or path.endswith((".mo", "/copyright"))
    )  # fmt: skip


def _build(out: Path, files: Path, package: str, options: dict[str, Any]) -> dict[str, Any]:
    game = next(iter(sorted(path.parent for path in files.rglob("gfx") if path.is_dir())))
    entities = read_entities(game)
    catalogues = read_translations(next(iter(files.rglob("locale")), files), tuple(options["languages"]))
    pictures = _pictures(game / "gfx", entities, options["tilesets"])
    groups = _groups(pictures)
    translated: dict[str, dict[str, Any]] = {}
    for tile in {picture.entity.tile for picture in pictures}:
        translated[tile] = _record(entities[tile], groups[tile], catalogues)
    # a fixed pseudo-random order mixes kinds and tilesets within every shard
    pictures.sort(key=lambda picture: _hash(f"{picture.tile}\0{picture.tileset}"))
    val_groups = _held_out(set(groups.values()), options["val_share"])
    make_directory(out)
    for stale in [*out.glob("train-*.tar"), *out.glob("val-*.tar")]:
        stale.unlink()
    writers = {split: ShardWriter(out, split, options["shard_samples"]) for split in ("train", "val")}
    with Progress(len(pictures), "writing shards", "samples") as progress:
        for picture in progress.track(pictures):
            split = "val" if groups[picture.entity.tile] in val_groups else "train"
            record = translated[picture.entity.tile] | {
                "tileset": picture.tileset,
                "license": LICENSE,
                "attribution": ATTRIBUTION.format(tileset=picture.tileset),
            }
            writers[split].add(_key(picture.tile, picture.tileset), picture.png, "png", record)
    shards = {split: [path.name for path in writer.close()] for split, writer in writers.items()}
    copyright_file = next(iter(sorted(files.rglob("copyright"))), None)
    notice = copyright_file.read_text(encoding="utf-8", errors="replace") if copyright_file else ""
    write_text(out / "LICENSE.txt", LICENSE_TEXT.format(package=package, copyright=notice))
    summary = {
        "name": "cataclysm",
        "package": package,
        "license": LICENSE,
        "attribution": ATTRIBUTION.format(tileset=", ".join(options["tilesets"])),
        "captions": {"short": ["name"], "long": ["description"]},
        "translations": {language: f"{language}.description" for language in catalogues},
        "shards": shards,
        "counts": _counts(pictures, groups, val_groups, translated, catalogues),
        "options": options,
    }
    # written last: its presence says that everything before it is complete
    write_json(out / "dataset.json", summary)
    return summary


def _pictures(gfx: Path, entities: Mapping[str, Entity], names: Iterable[str]) -> list[_Picture]:
    names = list(names)
    present = sorted(path.name for path in gfx.iterdir() if (path / "tile_config.json").is_file())
    unknown = [name for name in names if name not in present]
    if unknown:
        raise DataError(f"the package has no tileset {', '.join(unknown)}; it has {', '.join(present)}")
    tilesets = [read_tileset(gfx / name) for name in names]
    owners = [_owners(tileset, entities) for tileset in tilesets]
    total = sum(len(tiles) for sprites in owners for tiles in sprites.values())
    pictures: list[_Picture] = []
    known: set[tuple[str, bytes]] = set()
    with Progress(total, "cutting sprites", "sprites") as progress:
        for tileset, sprites in zip(tilesets, owners, strict=True):
            for sprite, image in cut_sprites(tileset, set(sprites)):
                png, content = _encode(image)
                for tile, entity in sprites[sprite]:
                    # tilesets borrow from each other; the same picture of the same thing counts once
                    if (entity, content) not in known:
                        known.add((entity, content))
                        pictures.append(_Picture(tile, entities[entity], tileset.name, png, content))
                progress.update(len(sprites[sprite]))
    shared = Counter(picture.content for picture in pictures)
    return [picture for picture in pictures if shared[picture.content] <= MAX_SHARED]


def _owners(tileset: Tileset, entities: Mapping[str, Entity]) -> dict[int, list[tuple[str, str]]]:
    """Sprite -> (tile, entity) pairs, without the sprites that stand for too many different things."""
    uses: dict[int, set[str]] = defaultdict(set)
    owners: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for tile, sprite in tileset.tiles.items():
        entity = depicted_entity(tile, entities)
        uses[sprite].add(entity or tile)
        if entity is not None:
            owners[sprite].append((tile, entity))
    return {sprite: tiles for sprite, tiles in owners.items() if len(uses[sprite]) <= MAX_SHARED}


def _encode(image: Image.Image) -> tuple[bytes, bytes]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    # what the eye sees: the colour of fully transparent pixels does not count
    visible = Image.new("RGBA", image.size)
    visible.paste(image, mask=image.getchannel("A"))
    digest = hashlib.blake2b(visible.tobytes(), digest_size=16, salt=repr(image.size).encode()[:16])
    return buffer.getvalue(), digest.digest()


def _groups(pictures: Sequence[_Picture]) -> dict[str, str]:
    """Entity -> smallest id of its group: entities linked by an equal name, description or sprite."""
    parent: dict[str, str] = {picture.entity.tile: picture.entity.tile for picture in pictures}

    def find(tile: str) -> str:
        while parent[tile] != tile:
            parent[tile] = tile = parent[parent[tile]]
        return tile

    first: dict[tuple[str, str | bytes], str] = {}
    for picture in pictures:
        entity = picture.entity
        for mark in (
            ("name", clean_text(entity.name.text).lower()),
            ("description", clean_text(entity.description.text).lower()),
            ("sprite", picture.content),
        ):
            one, other = find(first.setdefault(mark, entity.tile)), find(entity.tile)
            parent[max(one, other)] = min(one, other)
    return {tile: find(tile) for tile in parent}


def _held_out(groups: set[str], share: float) -> set[str]:
    # ordered by a hash of the name: the split of an entity does not move when others are added
    count = max(1, round(share * len(groups)))
    return set(sorted(groups, key=_hash)[:count])


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _key(tile: str, tileset: str) -> str:
    name = f"{tile}--{tileset}"
    safe = re.sub(r"[^A-Za-z0-9_+-]", "_", name)
    # the part before the first dot names a sample, and two ids must not fall together
    return safe if safe == name else f"{safe}-{_hash(name).hex()[:8]}"


def _record(entity: Entity, group: str, catalogues: Mapping[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "group": group,
        "entity": entity.tile,
        "kind": entity.kind,
        "name": clean_text(entity.name.text),
        "description": clean_text(entity.description.text),
    }
    for language, catalogue in catalogues.items():
        texts = {
            "name": translate(catalogue, entity.name),
            "description": translate(catalogue, entity.description),
        }
        present = {name: text for name, text in texts.items() if text}
        if present:
            record[language] = present
    return record


def _counts(
    pictures: Sequence[_Picture],
    groups: Mapping[str, str],
    val_groups: set[str],
    records: Mapping[str, Mapping[str, Any]],
    catalogues: Mapping[str, Any],
) -> dict[str, Any]:
    sizes = Counter(groups.values())
    val = sum(groups[picture.entity.tile] in val_groups for picture in pictures)
    lengths: Callable[[str], list[int]] = lambda name: sorted(  # noqa: E731
        len(str(record[name]).split()) for record in records.values()
    )
    return {
        "entities": len(groups),
        "samples": {"train": len(pictures) - val, "val": val},
        "groups": {"train": len(set(groups.values()) - val_groups), "val": len(val_groups)},
        "largest_group": max(sizes.values()),
        "kinds": dict(sorted(Counter(str(record["kind"]) for record in records.values()).items())),
        "tilesets": dict(Counter(picture.tileset for picture in pictures)),
        "words": {
            name: {
                "median": statistics.median(values),
                "p95": values[int(0.95 * (len(values) - 1))],
                "max": values[-1],
            }
            for name, values in (("name", lengths("name")), ("description", lengths("description")))
        },
        "translated": {
            language: sum("description" in record.get(language, {}) for record in records.values())
            for language in catalogues
        },
    }
