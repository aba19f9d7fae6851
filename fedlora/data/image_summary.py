"""The images of a run as their files say: sizes and modes, and what looks wrong in them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from fedlora.errors import DataError

from .images import ImageFacts, image_facts
from .rows import Rows
from .schema import Schema

DARK = 0.1  # share of white that the brightest pixel of all 16-bit images stays below


@dataclass(frozen=True)
class ImageSummary:
    """The training images of one side of a run."""

    images: int
    smallest: tuple[int, int]  # width and height in pixels
    largest: tuple[int, int]
    modes: Mapping[str, int]  # Pillow's name of a mode -> images of it
    several_frames: int  # images that have more than the one that is used
    brightest: float  # of all images of more than 8 bits, as a share of white; 1 where there are none

    def line(self) -> str:
        """The sizes and modes in words."""
        sizes = " to ".join(dict.fromkeys(f"{w} x {h}" for w, h in (self.smallest, self.largest)))
        modes = ", ".join(f"{mode} {count:,}" for mode, count in self.modes.items())
        return f"images: {self.images:,} of {sizes} pixels; modes: {modes}"

    def warnings(self) -> Iterator[str]:
        """Yield a sentence for whatever looks wrong."""
        if self.several_frames:
            yield f"{self.several_frames:,} of {self.images:,} images have several frames or pages; the first is used"
        if self.brightest < DARK:
            yield (
                f"the images of more than 8 bits are dark: the brightest pixel has {self.brightest:.1%} of white; "
                "scale them up to the numbers that their files can hold"
            )


def summarise_images(schema: Schema, parts: Sequence[Rows], processor: Any) -> ImageSummary | None:
    """The summary of the images in these rows; None where there are none.

    Raises `DataError` where they are of several sizes, and the model's image processor leaves sizes as they are.
    """
    found = list(_facts(schema, parts))
    if not found:
        return None
    by_size = sorted((fact.size for fact in found), key=lambda size: (size[0] * size[1], size))
    _check_sizes(by_size, processor)
    return ImageSummary(
        images=len(found),
        smallest=by_size[0],
        largest=by_size[-1],
        modes=dict(Counter(fact.mode for fact in found).most_common()),
        several_frames=sum(fact.frames > 1 for fact in found),
        brightest=max((fact.brightest for fact in found if fact.brightest is not None), default=1.0),
    )


def _facts(schema: Schema, parts: Iterable[Rows]) -> Iterator[ImageFacts]:
    return (image_facts(row[schema.columns[0]]) for row in chain.from_iterable(parts))


def _check_sizes(sizes: Sequence[tuple[int, int]], processor: Any) -> None:
    """Raise `DataError` for images of several sizes that would stay so."""
    changes = any(getattr(processor, name, None) for name in ("do_resize", "do_center_crop", "do_pad"))
    if changes or len(set(sizes)) == 1:
        return
    (w, h), (width, height) = sizes[0], sizes[-1]
    raise DataError(
        f"the images have {w} x {h} to {width} x {height} pixels, and the model's image processor leaves sizes as they "
        "are; give images of one size, or set do_resize in its preprocessor_config.json"
    )
