"""How much memory there is, and what to say where a run needs more."""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from fedlora.errors import ConfigError

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)\s*", re.IGNORECASE)
CGROUP = Path("/sys/fs/cgroup")  # version 2: a container's own limit


def amount(text: str) -> int:
    """The bytes that a text such as 16GB writes. Raises `ConfigError` for any other."""
    found = AMOUNT.fullmatch(text)
    if not found:
        raise ConfigError(f"--memory {text[:40]}: write an amount of memory as 16GB or 800MB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def free(device: torch.device) -> int:
    """Bytes that a run which starts when this process has ended may take here: of a GPU, or of memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    own = psutil.Process().memory_info().rss
    return int(min(psutil.virtual_memory().available, *_left_in_container(), float("inf")) + own)


def _left_in_container() -> Iterator[float]:
    """Yield what a container's limit leaves, where there is one."""
    with suppress(OSError, ValueError):
        most = (CGROUP / "memory.max").read_text().strip()
        used = (CGROUP / "memory.current").read_text().strip()
        yield float(most) - float(used)


def words(nbytes: float) -> str:
    """Bytes for people: `812 MB`, `3.1 GB`."""
    for unit, least in (("GB", 0.9995e9), ("MB", 0.9995e6)):
        if nbytes >= least:
            return f"{nbytes / UNITS[unit]:.3g} {unit}"
    return f"{nbytes / 1e3:.3g} kB"
