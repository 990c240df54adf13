"""Entities, translations and sprites of the game Cataclysm: Dark Days Ahead, read from its data files."""

from __future__ import annotations

import gettext
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from llm2clip.errors import DataError

ITEM_TYPES = (
    "AMMO", "ARMOR", "BATTERY", "BIONIC_ITEM", "BOOK", "COMESTIBLE", "ENGINE", "GENERIC", "GUN", "GUNMOD",
    "MAGAZINE", "PET_ARMOR", "TOOL", "TOOLMOD", "TOOL_ARMOR", "WHEEL",
)  # fmt: skip
# type in the game's files -> namespace of its ids; item types share one
KINDS = dict.fromkeys(ITEM_TYPES, "item") | {
    "MONSTER": "monster",
    "terrain": "terrain",
    "furniture": "furniture",
    "vehicle_part": "vehicle_part",
}
# tiles of vehicle parts carry a prefix that the entity's id does not have
TILE_PREFIX = {"vehicle_part": "vp_"}
COLOUR_TAG = re.compile(r"</?color[^>]*>")


@dataclass(frozen=True, slots=True)
class Phrase:
    """A translatable text of the game."""

    text: str
    plural: str = ""
    context: str = ""


@dataclass(frozen=True, slots=True)
class Entity:
    """A thing of the game that has a name and a description."""

    tile: str
    kind: str
    name: Phrase
    description: Phrase


def clean_text(text: str) -> str:
    """Drop colour tags and fold white space."""
    return " ".join(COLOUR_TAG.sub("", text).split())


def _phrase(value: Any) -> Phrase | None:
    if isinstance(value, str):
        return Phrase(value) if clean_text(value) else None
    if isinstance(value, dict):
        text = value.get("str") or value.get("str_sp")
        if isinstance(text, str) and clean_text(text):
            plural = value.get("str_pl") or value.get("str_sp") or ""
            return Phrase(text, str(plural), str(value.get("ctxt", "")))
    return None


def read_entities(root: Path) -> dict[str, Entity]:
    """Entities with a name and a description, by tile id; `root` holds `json/` and `mods/`.

    Missing names and descriptions are inherited along `copy-from`. A mod's version of something that
    the core game defines is left out.
    """
    records: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in _entries(root):
        kind = KINDS.get(str(entry.get("type")))
        name = entry.get("id", entry.get("abstract"))
        if kind is not None and isinstance(name, str):
            records.setdefault((kind, name), entry)
    entities: dict[str, Entity] = {}
    for (kind, name), entry in records.items():
        if "id" not in entry:
            continue
        title = _phrase(_inherited(records, kind, entry, "name"))
        description = _phrase(_inherited(records, kind, entry, "description"))
        tile = TILE_PREFIX.get(kind, "") + name
        if title is not None and description is not None and tile not in entities:
            entities[tile] = Entity(tile, kind, title, description)
    return entities


def _entries(root: Path) -> Iterator[dict[str, Any]]:
    core = sorted((root / "json").rglob("*.json"))
    mods = [path for path in sorted((root / "mods").rglob("*.json")) if "TEST_DATA" not in path.parts]
    for path in core + mods:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        for entry in content if isinstance(content, list) else [content]:
            if isinstance(entry, dict):
                yield entry


def _inherited(
    records: Mapping[tuple[str, str], dict[str, Any]], kind: str, entry: dict[str, Any], name: str
) -> Any:
    seen: set[int] = set()
    current: dict[str, Any] | None = entry
    # an entry of a mod may copy from its own id in the core game, which is not an endless chain here
    while current is not None and id(current) not in seen:
        if name in current:
            return current[name]
        seen.add(id(current))
        current = records.get((kind, str(current.get("copy-from"))))
    return None


def read_translations(root: Path, languages: tuple[str, ...]) -> dict[str, gettext.GNUTranslations]:
    """Translation catalogues below `root` (`<locale>/LC_MESSAGES/*.mo`) for those languages that have one.

    `pt` finds `pt_BR`, `es` prefers `es_ES`: the exact name first, then `xx_XX`, then the first variant.
    """
    found: dict[str, Path] = {
        path.parent.parent.name: path for path in sorted(root.glob("*/LC_MESSAGES/*.mo"))
    }
    catalogues: dict[str, gettext.GNUTranslations] = {}
    for language in languages:
        exact = (language, f"{language}_{language.upper()}", f"{language}_CN")
        names = [name for name in exact if name in found]
        names += [name for name in found if name.startswith(f"{language}_")]
        if names:
            with open(found[names[0]], "rb") as handle:
                catalogues[language] = gettext.GNUTranslations(handle)
    return catalogues


def translate(catalogue: gettext.GNUTranslations, phrase: Phrase) -> str | None:
    """The translation of `phrase`, or None where the catalogue has none."""
    plural = phrase.plural or phrase.text + "s"
    if phrase.context:
        texts = [
            catalogue.npgettext(phrase.context, phrase.text, plural, 1),
            catalogue.pgettext(phrase.context, phrase.text),
        ]
    else:
        texts = [catalogue.ngettext(phrase.text, plural, 1), catalogue.gettext(phrase.text)]
    for text in texts:
        if text and text not in (phrase.text, plural):
            return clean_text(text) or None
    return None


def depicted_entity(tile: str, entities: Mapping[str, Entity]) -> str | None:
    """The entity that a tile shows: its own id, that of a season or of a variant of a vehicle part."""
    base = tile.partition("_season_")[0]
    if base in entities or not base.startswith("vp_"):
        return base if base in entities else None
    # vp_frame_horizontal_front is a frame: drop words from the end until an entity is left
    while base.count("_") > 1:
        base = base.rpartition("_")[0]
        if base in entities:
            return base
    return None


@dataclass(slots=True)
class Tileset:
    """The sprites of one tileset: tile id -> sprite index, over all sheets in order."""

    name: str
    sheets: list[tuple[int, Path, int, int]] = field(default_factory=list)  # first index, file, width, height
    tiles: dict[str, int] = field(default_factory=dict)


def read_tileset(directory: Path) -> Tileset:
    """Read `tile_config.json`; sheets that are missing end the tileset, since indices run over them."""
    try:
        config = json.loads((directory / "tile_config.json").read_text(encoding="utf-8"))
        width, height = (int(config["tile_info"][0][side]) for side in ("width", "height"))
        sections = config["tiles-new"]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(f"the tileset {directory.name} cannot be read ({error!r}); leave it out") from error
    tileset = Tileset(directory.name)
    first = 0
    for section in sections:
        path = directory / str(section.get("file", ""))
        if not path.is_file():
            break
        sprite_width = int(section.get("sprite_width", width))
        sprite_height = int(section.get("sprite_height", height))
        with Image.open(path) as sheet:
            count = (sheet.width // sprite_width) * (sheet.height // sprite_height)
        tileset.sheets.append((first, path, sprite_width, sprite_height))
        first += count
    for section in sections:
        for tile in section.get("tiles", ()):
            sprite = _sprite_index(tile.get("fg"))
            if sprite is None or not 0 <= sprite < first:
                continue
            names = tile.get("id")
            for name in names if isinstance(names, list) else [names]:
                if isinstance(name, str) and not name.startswith("overlay_"):
                    tileset.tiles.setdefault(name, sprite)
    return tileset


def _sprite_index(value: Any) -> int | None:
    """`fg` is an index, a list of rotations, or weighted variants; the first (or likeliest) counts."""
    if isinstance(value, list):
        if not value:
            return None
        if all(isinstance(item, dict) for item in value):
            likeliest = max(value, key=lambda item: item.get("weight", 1))
            return _sprite_index(likeliest.get("sprite"))
        return _sprite_index(value[0])
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def cut_sprites(tileset: Tileset, wanted: set[int]) -> Iterator[tuple[int, Image.Image]]:
    """Yield (index, RGBA image) of the wanted sprites that are not empty, sheet by sheet."""
    for number, (first, path, width, height) in enumerate(tileset.sheets):
        last = tileset.sheets[number + 1][0] if number + 1 < len(tileset.sheets) else None
        indices = sorted(index for index in wanted if index >= first and (last is None or index < last))
        if not indices:
            continue
        with Image.open(path) as handle:
            sheet = handle.convert("RGBA")
        columns = sheet.width // width
        for index in indices:
            row, column = divmod(index - first, columns)
            sprite = sheet.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))
            if sprite.getchannel("A").getbbox() is not None:
                yield index, sprite
