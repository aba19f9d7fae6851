"""Pointers of Git LFS: what lies in a repository in place of a large file until it is fetched."""

from pathlib import Path

BEGINS = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(path: Path) -> bool:
    """Is the file a pointer, and not the file itself? Raises `OSError` for one that cannot be read."""
    with path.open("rb") as file:
        return file.read(len(BEGINS)) == BEGINS
