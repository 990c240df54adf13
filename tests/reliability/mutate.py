"""Damaged files out of good ones, without coverage: what `make test` runs in seconds, and where atheris is absent."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

_EXTREMES = [
    value.to_bytes(width, "little", signed=value < 0)
    for width in (1, 2, 4, 8)
    for value in (0, 1, -1, 2 ** (8 * width - 1) - 1, -(2 ** (8 * width - 1)))
]
_NUMBERS = [b"-1", b"0", b"9" * 20, b"9" * 5000, b"1e999", b"nan", b"null", b"[]", b"{}", b'""', b"../x"]


def mutants(seeds: Sequence[bytes], chance: random.Random) -> Iterator[bytes]:
    """Endless variants of `seeds`: one to three of a turned bit, a cut, an extreme number, a doubled or moved part."""
    while True:
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.choice((1, 1, 2, 3))):
            _mutate(data, seeds, chance)
        yield bytes(data)


def _mutate(data: bytearray, seeds: Sequence[bytes], chance: random.Random) -> None:
    place = chance.randrange(len(data) + 1)
    width = min(len(data) - place, 1 << chance.randrange(10))
    kind = chance.randrange(7)
    if kind == 0 and place < len(data):
        data[place] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        del data[place : place + width]
    elif kind == 3:
        data[place:place] = data[place : place + width] * chance.choice((1, 2, 50))
    elif kind == 4:
        extreme = chance.choice(_EXTREMES)
        data[place : place + len(extreme)] = extreme
    elif kind == 5:
        _replace_number(data, chance)
    else:
        other = chance.choice(seeds)
        start = chance.randrange(len(other) + 1)
        data[place : place + width] = other[start : start + width]


def _replace_number(data: bytearray, chance: random.Random) -> None:
    """Another number or value in the place of a run of digits, as text formats have them."""
    digits = [index for index, byte in enumerate(data) if 48 <= byte < 58]
    if digits:
        start = stop = chance.choice(digits)
        while start and 48 <= data[start - 1] < 58:
            start -= 1
        while stop < len(data) and 48 <= data[stop] < 58:
            stop += 1
        data[start:stop] = chance.choice(_NUMBERS)
