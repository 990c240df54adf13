"""Decoding every kind of image, refusing what is none, and the transform against direct computation."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from llm2clip.data.images import ImageTransform, decode_image
from llm2clip.errors import BadSampleError
from tests.data_files import image_bytes


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_modes_become_rgb_of_the_right_colour() -> None:
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 0, 200, 0])
    deep = Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16))
    cases = [
        (encoded(half), (255, 127, 127)),
        (encoded(Image.new("LA", (4, 4), (0, 0))), (255, 255, 255)),
        (encoded(palette), (0, 200, 0)),
        (encoded(palette, transparency=1), (255, 255, 255)),
        (encoded(deep), (128, 128, 128)),
        (encoded(Image.new("L", (4, 4), 77)), (77, 77, 77)),
        (encoded(Image.new("1", (4, 4), 1)), (255, 255, 255)),
        (encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100), (254, 0, 0)),
        (encoded(Image.new("RGB", (4, 4), (9, 8, 7)), "WEBP", lossless=True), (9, 8, 7)),
        (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), (128, 128, 128)),
    ]
    for data, color in cases:
        image = decode_image(data)
        assert image.mode == "RGB"
        difference = np.abs(np.asarray(image, dtype=int) - np.asarray(color))
        assert difference.max() <= 2, color


def test_transparency_takes_the_given_background() -> None:
    clear = encoded(Image.new("RGBA", (2, 2), (5, 5, 5, 0)))
    assert decode_image(clear, background=(1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (3, 3), color) for color in ((250, 0, 0), (0, 250, 0))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data).getpixel((1, 1)) == (250, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_exif_orientation_is_applied(kind: str) -> None:
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert decode_image(encoded(image, kind, exif=exif)).size == (20, 40)
    transparent = image.convert("RGBA")
    assert decode_image(encoded(transparent, "PNG", exif=exif)).size == (20, 40)


def bomb(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"this is a text file called photo.jpg", "not JPEG"),
        (b"", "0 bytes"),
        (image_bytes(kind="JPEG", size=(64, 64))[:-200], "cannot be decoded"),
        (image_bytes(size=(300, 300))[:200], "cannot be decoded"),
        (bomb(12000, 12000), "more than the 89478485 allowed"),
        (bomb(60000, 60000), "too large"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not JPEG"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "image"),
    ],
)
def test_refused_images_name_the_sample(data: bytes, reason: str) -> None:
    with pytest.raises(BadSampleError, match=reason) as caught:
        decode_image(data, key="shard/7")
    assert caught.value.key == "shard/7"


def test_random_damage_never_escapes() -> None:
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        noise = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
        good = np.frombuffer(encoded(noise, kind), dtype=np.uint8)
        for _ in range(60):
            damaged = good.copy()
            damaged[rng.integers(0, len(good), 4)] = rng.integers(0, 255, 4)
            with contextlib.suppress(BadSampleError):
                assert decode_image(damaged.tobytes(), max_pixels=1 << 20).mode == "RGB"


def test_draft_keeps_the_short_side() -> None:
    data = image_bytes(kind="JPEG", size=(1000, 400))
    image = decode_image(data, min_side=64)
    assert image.size == (250, 100)


def test_evaluation_transform_is_the_definition() -> None:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    transform = ImageTransform(32, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    got = transform(Image.fromarray(pixels))
    expected = (pixels / 255.0 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.6, 0.7])
    assert got.shape == (3, 32, 32) and got.dtype == torch.float32 and got.is_contiguous()
    np.testing.assert_allclose(got.numpy(), expected.transpose(2, 0, 1), atol=2e-6)


UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def test_pad_and_crop() -> None:
    wide = Image.new("RGB", (20, 10), (255, 0, 0))
    wide.paste((0, 0, 255), (5, 0, 15, 10))
    padded = ImageTransform(40, **UNIT, fit="pad", background=(0, 255, 0))(wide)
    assert padded[:, 0, 20].tolist() == [0, 1, 0] and padded[:, 39, 20].tolist() == [0, 1, 0]
    assert padded[:, 20, 0].tolist() == [1, 0, 0] and padded[:, 20, 20].tolist() == [0, 0, 1]
    cropped = ImageTransform(40, **UNIT, fit="crop")(wide)
    assert (cropped[2] == 1).all() and (cropped[0] == 0).all()


def test_pixel_art_is_enlarged_without_new_colours() -> None:
    art = Image.fromarray(np.random.default_rng(2).choice([0, 255], (16, 16, 3)).astype(np.uint8))
    assert set(ImageTransform(64, **UNIT)(art).unique().tolist()) == {0.0, 1.0}
    photo = ImageTransform(24, **UNIT)(art)
    assert len(photo.unique()) > 2


def test_training_crops_come_from_the_generator() -> None:
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (50, 30, 3), dtype=np.uint8))
    for fit in ("pad", "crop"):
        transform = ImageTransform(32, train=True, fit=fit, flip=0.5)
        one, again = (transform(image, np.random.default_rng(5)) for _ in range(2))
        other = transform(image, np.random.default_rng(6))
        assert torch.equal(one, again) and not torch.equal(one, other)
        assert one.shape == (3, 32, 32) and bool(one.isfinite().all())
    with pytest.raises(ValueError, match="Generator"):
        ImageTransform(32, train=True)(image)


def test_flip_mirrors() -> None:
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    plain = ImageTransform(32, train=True, flip=0.0, **whole)(image, np.random.default_rng(0))
    mirrored = ImageTransform(32, train=True, flip=1.0, **whole)(image, np.random.default_rng(0))
    assert torch.equal(mirrored, plain.flip(2)) and not torch.equal(mirrored, plain)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2), (128, 128)])
def test_extreme_shapes(size: tuple[int, int]) -> None:
    for fit in ("pad", "crop"):
        for seed in range(5):
            transform = ImageTransform(16, train=True, fit=fit)
            assert transform(Image.new("RGB", size), np.random.default_rng(seed)).shape == (3, 16, 16)
            assert ImageTransform(16, fit=fit)(Image.new("RGB", size)).shape == (3, 16, 16)
