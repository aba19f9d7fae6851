"""What can be seen of files from outside."""

from pathlib import Path


def open_to_others(folder: Path) -> list[str]:
    """The folder, and all that is in it, as far as anybody but its owner can read, write or enter it."""
    return [f"{path}: {path.stat().st_mode & 0o777:o}" for path in (folder, *folder.rglob("*")) if _is_open(path)]


def _is_open(path: Path) -> bool:
    return path.stat().st_mode & 0o077 != 0
