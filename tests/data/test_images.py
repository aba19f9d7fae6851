"""Images of any mode and size are what they show, and one that cannot be read is named before the run begins."""

import base64
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedlora.data.federated import load
from fedlora.data.images import encode_image, read_image, why_unreadable
from fedlora.errors import DataError
from fedlora.sections import DataConfig

GREYS = np.linspace(0, 255, 35).astype(np.uint8).reshape(5, 7)  # black to white
ORIENTATION = 0x0112  # an EXIF tag


def stored(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def shown(value: Any, channels: int = 3) -> Any:
    return np.asarray(read_image(value, channels)).astype(int)


@pytest.mark.parametrize(("mode", "kind"), [
    ("L", "PNG"), ("LA", "PNG"), ("RGB", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("CMYK", "TIFF"),
    ("YCbCr", "TIFF"), ("LAB", "TIFF"), ("L", "JPEG"), ("L", "WEBP"), ("P", "GIF"),
])  # fmt: skip
def test_an_image_is_the_same_in_every_mode(mode: str, kind: str) -> None:
    grey = Image.fromarray(GREYS)
    image = grey.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr", "LAB") else grey.convert(mode)
    assert abs(shown(stored(image, kind)) - GREYS[..., None]).max() <= (12 if kind in ("JPEG", "WEBP") else 3)


@pytest.mark.parametrize(("pixels", "kind"), [
    (GREYS.astype(np.uint16) * 257, "PNG"),  # 16 bits
    (GREYS.astype(np.uint16) * 257, "TIFF"),
    (GREYS.astype(np.int32), "TIFF"),  # 32 bits that hold 8
    (GREYS.astype(np.int32) * 257, "TIFF"),  # that hold 16
    (GREYS.astype(np.int32) * 4000 - 90_000, "TIFF"),  # that hold measurements
    (GREYS.astype(np.float32) / 255, "TIFF"),
    (GREYS.astype(np.float32), "TIFF"),
    (GREYS.astype(np.float32) * 10 - 1000, "TIFF"),  # Hounsfield units
])  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grey_of_more_than_eight_bits_is_scaled_and_not_cut_off(pixels: Any, kind: str, channels: int) -> None:
    got = shown(stored(Image.fromarray(pixels), kind), channels).reshape(5, 7, -1)
    assert abs(got[..., 0] - GREYS).max() <= 1


def test_pixels_that_are_no_numbers_are_refused() -> None:
    pixels = np.array([[0.0, np.nan]], np.float32)
    with pytest.raises(DataError, match="infinite or no numbers"):
        read_image(stored(Image.fromarray(pixels), "TIFF"))


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA", "P", "La", "RGBa"])
def test_transparent_pixels_are_white_whatever_lies_below_them(mode: str) -> None:
    drawing = np.zeros((2, 3, 4), np.uint8)  # black, and transparent but for its first row
    drawing[0, :, 3] = 255
    image = Image.fromarray(drawing, "RGBA")
    if mode in ("P", "PA"):
        image = Image.fromarray(np.array([[0] * 3, [1] * 3], np.uint8), "P")  # both black, the second transparent
        image.putpalette([0, 0, 0, 255, 0, 0, 0, 0], "RGBA")
    if mode == "La":
        image = image.convert("LA")
    image = image.convert(mode)
    assert shown(image)[:, :, 0].tolist() == [[0] * 3, [255] * 3]


@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_an_image_stands_upright_as_its_camera_wrote(orientation: int, turn: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    assert (shown(stored(Image.fromarray(GREYS), "PNG", exif=exif), 1) == np.rot90(GREYS, turn)).all()


def test_an_exif_that_is_broken_does_not_matter() -> None:
    assert (shown(stored(Image.fromarray(GREYS), "PNG", exif=b"Exif\x00\x00no exif at all"), 1) == GREYS).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]), st.booleans())
def test_an_image_of_any_size_is_encoded_alike_from_anywhere(w: int, h: int, channels: int, resize: bool) -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    norm = {"image_mean": [0.5] * channels, "image_std": [0.5] * channels}
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, do_resize=resize, **norm)
    image = Image.fromarray(np.random.default_rng(w).integers(0, 256, (h, w, 3), np.uint8))
    data = stored(image, "PNG")
    got = [encode_image(processor, value, channels)["pixel_values"] for value in (image, data, {"bytes": data})]
    assert got[0].shape == (channels, *((8, 8) if resize else (h, w)))
    assert (got[0] == got[1]).all() and (got[0] == got[2]).all()


def _slide(path: Path) -> Any:
    Image.new("1", (20_000, 10_000)).save(path)
    return str(path)


def _cut(path: Path) -> Any:
    whole = stored(Image.effect_noise((64, 64), 50), "JPEG")
    path.write_bytes(whole[: len(whole) // 2])
    return str(path)


@pytest.mark.parametrize(("value", "says"), [
    (_slide, "more pixels than the 178,956,970 that are opened"),
    (_cut, r"x\.png cannot be read as an image: image file is truncated"),
    (lambda path: str(path), "there is no such file"),
    (lambda path: {"bytes": b"no image", "path": None}, "an image of 8 bytes cannot be read as an image"),
    (lambda path: str(path.parent), "cannot be read as an image"),
    (lambda path: base64.b64encode(bytes(10_000)).decode(), "AAAA.{,20} is an image in base64, which is not read"),
    (lambda path: "data:image/png;base64,iVBORw0KGgo", "base64"),
    (lambda path: "https://example.org/a.png", "an address, from which nothing is fetched"),
    (lambda path: 7, "a value of type int cannot be read as an image"),
    (lambda path: {"bytes": None, "path": None}, "cannot be read as an image"),
    (lambda path: "a\0b.png", "cannot be read as an image"),
])  # fmt: skip
def test_what_is_no_image_is_refused_in_a_sentence(tmp_path: Path, value: Callable[[Path], Any], says: str) -> None:
    bad = value(tmp_path / "x.png")
    with pytest.raises(DataError, match=says) as raised:
        read_image(bad)
    assert why_unreadable(bad) == str(raised.value)
    assert len(str(raised.value)) < 400


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"]), st.integers(0, 10_000), st.binary(max_size=9))
def test_a_damaged_image_is_never_a_traceback(kind: str, at: int, damage: bytes) -> None:
    data = stored(Image.fromarray(GREYS), kind)
    at %= len(data)
    with suppress(DataError):
        read_image(data[:at] + damage)


def test_a_broken_image_in_a_parquet_file_is_named_by_its_row(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Image as Picture

    data = [{"bytes": stored(Image.fromarray(GREYS), "PNG"), "path": None} for _ in range(3)]
    data[1] = {"bytes": b"no image", "path": None}
    features = Features({"image": Picture(), "label": Value("int64")})
    path = tmp_path / "x.parquet"
    Dataset.from_dict({"image": data, "label": [0, 1, 0]}, features=features).to_parquet(path)
    with pytest.raises(DataError, match=r'x\.parquet row 2: "image" an image of 8 bytes'):
        load(DataConfig(path=str(path)), "image", clients=1, seed=0)


def test_a_missing_image_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"image": "nowhere.png", "label": 0}\n')
    with pytest.raises(DataError, match=r'x\.jsonl line 1: "image" nowhere\.png cannot be read as an image'):
        load(DataConfig(path=str(path)), "image", clients=1, seed=0)
