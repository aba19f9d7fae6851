"""Files that survive a crash: replaced whole or not at all, lines added durably, and locks between processes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOSPC
from hashlib import file_digest
from pathlib import Path
from secrets import token_hex

from filelock import FileLock, Timeout

from fedlora.errors import CheckpointError, ConfigError

LOCK = "lock"  # the file in a folder by whose lock one process alone writes there


def write_durably(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Replace a file's content, so that after any crash the file holds the old content or the new one, whole.

    When this returns, the new content is on the disk. Raises `CheckpointError`, for example on a full disk.
    """
    try:
        replace_file(path, content, mode=mode)
    except OSError as e:
        size, remedy = len(content) / 1e6, "remove that folder" if path.is_dir() else "make room"
        raise CheckpointError(
            f"{path} ({size:.1f} MB) could not be written: {e.strerror}; what was there is untouched: {remedy}"
        ) from e


def replace_file(path: Path, content: bytes, *, mode: int = 0o666, wait_for_disk: bool = True) -> None:
    """Write a temporary file beside `path` and rename it to `path`. Raises `OSError`; then the old file is untouched.

    Missing folders are made. The file has its `mode` before a byte is in it (0o600: nobody but its owner ever reads
    it). Without `wait_for_disk` a crash of the machine, not of the program, may leave an empty file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{token_hex(4)}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as f:
            f.write(content)
            f.flush()
            if wait_for_disk:
                os.fsync(f.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if wait_for_disk:
        _sync_folder(path.parent)


def append_durably(path: Path, line: bytes, *, mode: int = 0o666) -> None:
    """Add a line, which ends with a line break, to a file; when this returns, the line is on the disk.

    A file that is made has this `mode`. Raises `OSError`; then nothing of the line is in the file.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, mode)
    try:
        append_line(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(descriptor: int, line: bytes) -> None:
    """Add a line to a file that is open for reading and appending: the whole line or, on a full disk, nothing.

    If a crash cut the file's last line short, a line break closes that one first. Raises `OSError`.
    """
    size = os.fstat(descriptor).st_size
    is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
    whole = b"\n" + line if is_torn else line
    if os.write(descriptor, whole) < len(whole):
        os.ftruncate(descriptor, size)
        raise OSError(ENOSPC, os.strerror(ENOSPC))


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal. Raises `OSError`."""
    with path.open("rb") as f:
        return file_digest(f, "sha256").hexdigest()


@contextmanager
def hold_lock(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock file `path` inside a `with`; the lock is free again when the process ends, however it ends.

    Where another process holds the lock, `wait` for it, or raise `ConfigError`.
    """
    lock = FileLock(path, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout as e:
        raise ConfigError(f"another fedlora is at work in {path.parent}; end it first, or choose another folder") from e
    except OSError as e:
        raise ConfigError(f"{path} cannot be locked: {e.strerror}; remove it, or choose another folder") from e
    try:
        yield
    finally:
        lock.release()


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Be the only process that writes into a folder, which is made where it is missing.

    A folder in which nothing was written is removed again. Raises `ConfigError` where another process has the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"{folder} cannot be made: {e.strerror}; choose another folder") from e
    with hold_lock(folder / LOCK, wait=False):
        try:
            yield
        finally:
            if [p.name for p in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()


def file_lock(path: Path) -> FileLock:
    """Return a lock between processes that one object may hold several times; its file is its owner's alone."""
    return FileLock(path, mode=0o600)


def secret_key(path: Path) -> bytes:
    """Return the random key of 32 bytes that lies in this file, which is made first where it is missing.

    Raises `CheckpointError` for a file that holds something else.
    """
    if not path.exists():
        write_durably(path, f"{token_hex(32)}\n".encode(), mode=0o600)
    try:
        key = bytes.fromhex(path.read_text(encoding="ascii"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} cannot be read as a key ({e}); put it back from a copy") from e
    if len(key) != 32:
        raise CheckpointError(f"{path} holds {len(key)} bytes, and a key has 32; put it back from a copy")
    return key


def _sync_folder(folder: Path) -> None:
    """Wait until a folder's entries are on the disk: only then a rename in the folder survives a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
