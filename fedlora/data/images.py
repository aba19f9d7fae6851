"""Images read from files, bytes and memory: any mode that Pillow opens, upright, in the channels that a model takes."""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fedlora.errors import DataError, cut

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's mode, by the channels that a model takes
WHITE = (255, 255, 255, 255)  # what shows through where an image is transparent
DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # grey of more than 8 bits, which Pillow would cut off at 255
WHITES = (255.0, 65535.0)  # of the deep images whose file does not say which number is white
BITS_PER_SAMPLE = 258  # a TIFF tag
LONGEST_NAME = 200  # letters of a file's name that an error repeats
BASE64 = re.compile(r"data:image/|[A-Za-z0-9+/\s]{200}")  # no file has such a name


def image_channels(config: Any) -> int:
    """The channels of the images that the model with this configuration takes; 3 where it says nothing of images."""
    channels = getattr(getattr(config, "vision_config", config), "num_channels", 3)
    return int(channels) if channels in MODES else 3


def encode_image(processor: Any, value: Any, channels: int = 3) -> dict[str, Tensor]:
    """What a model's image processor makes of one image, such as pixel_values (channels, height, width).

    Each image is processed by itself, so that it depends on no other. Raises `DataError` for a value that cannot be
    read as an image, or that the processor cannot take.
    """
    image = read_image(value, channels)
    try:
        made = processor(images=[image], return_tensors="pt")
    except Exception as e:  # every model has a processor of its own, and each its own kinds
        raise DataError(
            f"{_named(value)}, of {image.width} x {image.height} pixels, is refused by the model's image processor: "
            f"{cut(str(e))}"
        ) from e
    return {key: tensor[0] for key, tensor in made.items()}


def read_image(value: Any, channels: int = 3) -> Image.Image:
    """The image, upright, in grey (1 channel), RGB (3) or RGBA (4), from a file's name, bytes, or an open image.

    Transparent pixels show white. Grey of more than 8 bits is scaled to 8: see `_eight_bits`. Raises `DataError` for
    what cannot be read.
    """
    with _readable(value), _open(value) as image:
        upright = _upright(image)
        grey = upright.mode in DEEP
        return (_eight_bits(upright) if grey else _opaque(upright, keep=channels == 4)).convert(MODES[channels])


@dataclass(frozen=True)
class ImageFacts:
    """What the file of an image says of it."""

    size: tuple[int, int]  # width and height in pixels, as it is stored
    mode: str  # Pillow's name
    frames: int  # 2 stands for any number of several
    brightest: float | None  # of an image of 16 bits, its largest number as a share of white


def image_facts(value: Any) -> ImageFacts:
    """The facts about an image; its pixels are looked at only if they have 16 bits.

    Raises `DataError` for what cannot be read.
    """
    with _readable(value), _open(value) as image:
        frames = 2 if getattr(image, "is_animated", False) else 1
        brightest = _brightest(image) if image.mode.startswith("I;16") else None
        return ImageFacts(image.size, image.mode, frames, brightest)


def why_unreadable(value: Any) -> str:
    """The reason why a value is no image, in words that follow a column's name; empty for one that can be read whole.

    A JPEG is read at an eighth of its size, by which what is broken or cut off is found too.
    """
    try:
        with _readable(value), _open(value) as image:
            image.draft("L", (1, 1))
            image.load()
    except DataError as e:
        return str(e)
    return ""


@contextmanager
def _readable(value: Any) -> Iterator[None]:
    """Turn whatever Pillow raises for a value into a `DataError`, and keep its warnings to itself."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd files that can be read all the same
            yield
    except DataError:
        raise
    except Exception as e:  # its readers raise SyntaxError, struct.error and others for broken files
        raise DataError(f"{_named(value)} cannot be read as an image: {_why(e)}") from e


def _why(error: Exception) -> str:
    """What Pillow raised, in words, and what can be done about it."""
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more pixels than the {2 * (Image.MAX_IMAGE_PIXELS or 0):,} that are opened; scale it down"
    if isinstance(error, UnidentifiedImageError):
        return "it is of no kind that Pillow knows, or broken"
    if isinstance(error, FileNotFoundError):
        return "there is no such file; its name is taken from the current folder"
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return cut(said) or type(error).__name__


def _open(value: Any) -> Image.Image:
    """The image that a value holds or names, not decoded yet."""
    if isinstance(value, Image.Image):
        return value.copy()  # closed after use, which the caller's must not be
    if isinstance(value, np.ndarray):
        return Image.fromarray(value)
    source = value
    if isinstance(value, Mapping):  # as datasets keeps an image that it has not decoded
        source = value.get("bytes") or value.get("path")
    if isinstance(source, str):
        _check_name(source)
    return Image.open(BytesIO(source) if isinstance(source, bytes) else source)


def _check_name(name: str) -> None:
    """Raise `DataError` for a text that is an image, or an address, and no name of a file."""
    if BASE64.match(name):
        raise DataError(
            f"{cut(name, 20)} is an image in base64, which is not read; keep images as files, or as bytes in Parquet"
        )
    if name.startswith(("http://", "https://")):
        raise DataError(f"{_named(name)} is an address, from which nothing is fetched; keep images as files")


def _named(value: Any) -> str:
    """A value in a few words: the name of a file, or what it is."""
    path, data = (value.get("path"), value.get("bytes")) if isinstance(value, Mapping) else (value, value)
    if isinstance(path, str) and path:
        return cut(path, LONGEST_NAME)
    return f"an image of {len(data)} bytes" if isinstance(data, bytes) else f"a value of type {type(value).__name__}"


def _upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation has it shown; one whose EXIF cannot be read stays as it is."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # of a broken EXIF; a broken image raises once more where it is converted
        return image


def _opaque(image: Image.Image, *, keep: bool) -> Image.Image:
    """The image on white where it is transparent; as it is if its transparency is to be kept."""
    if keep or not image.has_transparency_data:
        return image
    straight = image.convert("LA") if image.mode == "La" else image
    shown = straight.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", shown.size, WHITE), shown)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, scaled to 8: from 0, which is black, to the number that is white.

    White is what the bits can hold. Where they do not say (32 bits, and floats), it is 1 for floats between 0 and 1,
    else 255 or 65535, whichever all pixels are up to; an image beyond that, or with negative numbers, is scaled from
    its least number to its largest. Raises `DataError` for pixels that are no numbers.
    """
    pixels = np.asarray(image).astype(np.float64)
    if not np.isfinite(pixels).all():
        raise DataError(f"an image of mode {image.mode} has pixels that are infinite or no numbers; replace them")
    black, white = _black_and_white(image, pixels)
    scaled = (pixels - black) * (255 / (white - black or 1))
    return Image.fromarray(np.rint(scaled).astype(np.uint8), "L")


def _brightest(image: Image.Image) -> float:
    """The largest number of an image of 16 bits, as a share of white."""
    pixels = np.asarray(image).astype(np.float64)
    return float(pixels.max()) / _black_and_white(image, pixels)[1]


def _black_and_white(image: Image.Image, pixels: "np.ndarray[Any, Any]") -> tuple[float, float]:
    """The numbers that are black and white in an image of more than 8 bits."""
    if image.mode.startswith("I;16"):
        bits: Any = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))
        return 0.0, float(2 ** bits[0] - 1)
    least, most = float(pixels.min()), float(pixels.max())
    whites = (1.0, *WHITES) if image.mode == "F" else WHITES
    return next(((0.0, white) for white in whites if least >= 0 and most <= white), (least, most))
