"""Ways in which a file on a disk is damaged, for tests of what is then seen."""

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

FOREIGN = b"\x93NUMPY\x01\x00v\x00{'descr'"  # how a file of another kind begins


def cut(path: Path) -> None:
    """Half of the file is gone."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def turn(path: Path) -> None:
    """One bit is another, a third into the file."""
    content = bytearray(path.read_bytes() or b"\x00")
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def fold(path: Path) -> None:
    """A folder has the file's place."""
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": cut,
    "random": lambda path: path.write_bytes(Random(0).randbytes(max(path.stat().st_size, 16))),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": Path.unlink,
    "one bit": turn,
    "head": lambda path: path.write_bytes(FOREIGN + path.read_bytes()[len(FOREIGN) :]),
    "folder": fold,
}


def damaged_copy(folder: Path, copy: Path, name: str, how: str) -> Path:
    """A copy of a folder in which one file is damaged."""
    shutil.copytree(folder, copy)
    DAMAGE[how](copy / name)
    return copy
