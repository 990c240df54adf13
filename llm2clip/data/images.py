"""Encoded bytes to a normalised tensor: robust decoding and the CLIP image transform, on PIL and numpy."""

from __future__ import annotations

import io
import math
import struct
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from llm2clip.errors import BadSampleError

# a fixed list: PIL also knows formats that start other programs or are far easier to attack
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 89_478_485
EXIF_ORIENTATION = 0x0112
WHITE = (255, 255, 255)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def decode_image(
    data: bytes,
    *,
    key: str = "",
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] = WHITE,
    min_side: int = 0,
) -> Image.Image:
    """Decode an image to RGB.

    Transparency is laid over `background`; CMYK, palettes, grey and 16-bit images are converted; of an
    animation the first frame counts; the EXIF orientation is applied.

    Args:
        data: the encoded image.
        key: name of the sample, for errors.
        max_pixels: larger images are refused before any pixel is decoded.
        background: colour behind transparent pixels.
        min_side: a JPEG may be decoded at a half, quarter or eighth of its size as long as both sides
            stay at least this long; 0 decodes at full size.

    Raises:
        BadSampleError: the bytes are no image of a known format, are cut short, or are too large.
    """
    if not data:
        raise BadSampleError(key, "its image is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            # the size is checked against max_pixels below
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise BadSampleError(
                key, f"its image has {width}x{height} pixels, more than the {max_pixels} allowed"
            )
        if min_side and image.format == "JPEG":
            image.draft("RGB", _draft_size(width, height, min_side))
        image.load()
        return _oriented(_to_rgb(image, background))
    except BadSampleError:
        raise
    except UnidentifiedImageError:
        raise BadSampleError(
            key, f"its image is not {'/'.join(FORMATS)} (begins with {data[:12]!r})"
        ) from None
    except Image.DecompressionBombError as error:
        raise BadSampleError(key, f"its image is too large ({error})") from None
    # PIL's readers raise all of these on damaged files
    except (
        OSError,
        ValueError,
        SyntaxError,
        struct.error,
        EOFError,
        IndexError,
        KeyError,
        TypeError,
    ) as error:
        raise BadSampleError(key, f"its image cannot be decoded ({error})") from None
    except (OverflowError, ZeroDivisionError, MemoryError) as error:
        raise BadSampleError(key, f"its image cannot be decoded ({error!r})") from None


def _draft_size(width: int, height: int, min_side: int) -> tuple[int, int]:
    # draft() keeps both sides at least as long as asked for; the ratio must be the image's own
    scale = min(1.0, min_side / min(width, height))
    return math.ceil(width * scale), math.ceil(height * scale)


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        return _from_deep(image)
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        if image.mode in ("La", "RGBa"):
            image = image.convert(image.mode.upper())
        layers = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, background)
        canvas.paste(layers, mask=layers.getchannel("A"))
        canvas.info["exif"] = image.info.get("exif", b"")
        return canvas
    return image.convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """Grey images of 16 or 32 bits or of floats; plain conversion would clip them to white."""
    values = np.asarray(image).astype(np.float64)
    top = float(values.max(initial=0.0))
    if image.mode == "F":
        scale = 255.0 if top <= 1.0 else 1.0
    else:
        scale = 255.0 / 65535.0 if image.mode.startswith("I;16") or top > 255 else 1.0
    grey = np.clip(np.nan_to_num(values) * scale + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _oriented(image: Image.Image) -> Image.Image:
    try:
        if image.getexif().get(EXIF_ORIENTATION, 1) == 1:
            return image
        return ImageOps.exif_transpose(image)
    except Exception:
        # damaged EXIF says nothing about the pixels, which are already decoded
        return image


def normalize_pixels(
    pixels: torch.Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> torch.Tensor:
    """uint8 pixels (..., 3, S, S) to (x / 255 - mean) / std, float32 on the same device."""
    scale = torch.tensor(std, device=pixels.device)
    shift = torch.tensor(mean, device=pixels.device) / scale
    # one multiplication and one subtraction
    return pixels.float().mul_((1.0 / (255.0 * scale))[:, None, None]).sub_(shift[:, None, None])


Box = tuple[float, float, float, float]
_LONGEST = 32  # aspect ratio
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class ImageTransform:
    """Resize to a square and normalise.

    Evaluation takes the whole image (`fit="pad"`: long side to `size`, rest filled with `background`), its centre
    (`fit="crop"`: short side to `size`; the pixels are those of transformers' CLIP processor, which resizes first
    and crops afterwards) or all of it with another aspect (`fit="squash"`). Training takes a random part of that
    and mirrors it if asked to. With `interpolation="adaptive"` images less than half the target size are enlarged
    without smoothing, which keeps pixel art what it is, and everything else is bicubic.

    Attributes:
        size: side S of the result in pixels.
        mean: mean of each channel, of values in [0, 1].
        std: standard deviation of each channel.
        train: random resized crop and mirroring; needs the `rng` argument.
        fit: how an image that is not square becomes square.
        interpolation: how pixels are resampled.
        resize: crop: the short side in pixels before the centre of `size` is cut out; 0: `size`.
        scale: least and largest share of the area that a training crop keeps.
        ratio: narrowest and widest aspect of a training crop.
        flip: probability of mirroring left to right in training; 0 where text or sides matter.
        background: colour of the padding.
    """

    size: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    train: bool = False
    fit: Literal["pad", "crop", "squash"] = "pad"
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "adaptive"] = "adaptive"
    resize: int = 0
    scale: tuple[float, float] = (0.6, 1.0)
    ratio: tuple[float, float] = (0.8, 1.25)
    flip: float = 0.0
    background: tuple[int, int, int] = WHITE

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> torch.Tensor:
        """Return the image as float32 of shape (3, S, S), normalised. Raises as `pixels` does."""
        return normalize_pixels(self.pixels(image, rng), self.mean, self.std)

    @property
    def min_side(self) -> int:
        """Short side in pixels below which an image would be enlarged: what `decode_image` may decode at."""
        least = math.sqrt(self.scale[0] * min(self.ratio[0], 1.0 / self.ratio[1])) if self.train else 1.0
        return math.ceil(self._short() / least)

    def pixels(self, image: Image.Image, rng: np.random.Generator | None = None) -> torch.Tensor:
        """Return the image as uint8 of shape (3, S, S), which `normalize_pixels` normalises: a quarter of the memory.

        Raises:
            ValueError: `train` is set and no `rng` is given.
        """
        mirror = False
        if self.train:
            if rng is None:
                raise ValueError("ImageTransform(train=True) needs a numpy Generator for its random crops")
            part = self._random_part(self._whole(image.width, image.height), rng)
            mirror = rng.random() < self.flip
            square = self._cut(image, part)
        elif self.fit == "crop":
            square = self._centre(image)
        else:
            square = self._cut(image, self._whole(image.width, image.height))
        pixels = np.asarray(square)
        if mirror:
            pixels = pixels[:, ::-1]
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())

    def _whole(self, width: int, height: int) -> Box:
        """The part of the image, or around it, that is shown."""
        if self.fit == "squash":
            return 0.0, 0.0, float(width), float(height)
        side = float(max(width, height))
        if self.fit == "crop":
            side = min(width, height) * self.size / self._short()
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side

    def _short(self) -> int:
        return max(self.resize, self.size)

    def _centre(self, image: Image.Image) -> Image.Image:
        """Resized, then cut; a resize of the part alone gives other pixels where its edges fall between two."""
        width, height, short = image.width, image.height, self._short()
        landscape = width > height
        long = short * max(width, height) // min(width, height)
        if long > _LONGEST * short:
            return self._cut(image, self._whole(width, height))  # the resized whole would not fit in memory
        new_width, new_height = (long, short) if landscape else (short, long)
        whole = image.resize((new_width, new_height), self._method(image))
        left, top = (new_width - self.size) // 2, (new_height - self.size) // 2
        return whole.crop((left, top, left + self.size, top + self.size))

    def _random_part(self, box: Box, rng: np.random.Generator) -> Box:
        left, top, right, bottom = box
        across, down = right - left, bottom - top
        area = rng.uniform(*self.scale)
        aspect = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
        width = min(1.0, math.sqrt(area * aspect)) * across
        height = min(1.0, math.sqrt(area / aspect)) * down
        left += rng.uniform(0.0, across - width) if width < across else 0.0
        top += rng.uniform(0.0, down - height) if height < down else 0.0
        return left, top, left + width, top + height

    def _cut(self, image: Image.Image, box: Box) -> Image.Image:
        """The content of `box` at size S x S; parts of the box outside the image are background."""
        left, top, right, bottom = box
        x0, y0 = max(left, 0.0), max(top, 0.0)
        x1, y1 = min(right, float(image.width)), min(bottom, float(image.height))
        across, down = self.size / (right - left), self.size / (bottom - top)
        place = (round((x0 - left) * across), round((y0 - top) * down))
        extent = (
            max(1, round((x1 - left) * across) - place[0]),
            max(1, round((y1 - top) * down) - place[1]),
        )
        content = image.resize(extent, self._method(image), box=(x0, y0, x1, y1))
        if extent == (self.size, self.size):
            return content
        canvas = Image.new("RGB", (self.size, self.size), self.background)
        canvas.paste(content, place)
        return canvas

    def _method(self, image: Image.Image) -> Image.Resampling:
        if self.interpolation == "adaptive":
            small = max(image.size) * 2 <= self.size
            return Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC
        return RESAMPLING[self.interpolation]


def as_rgb(image: Image.Image, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """An image that another library has decoded, in the form that `decode_image` gives: RGB, upright, opaque."""
    return _oriented(_to_rgb(image, background))
