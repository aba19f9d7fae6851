"""The figures of many examples as few characters: a bit each where all are 0 or 1, else three digits."""

from collections.abc import Mapping, Sequence
from typing import Any


def pack(figures: Sequence[float]) -> dict[str, Any]:
    """The figures as JSON holds them; other figures than 0 and 1 are rounded to three digits."""
    if not set(figures) <= {0.0, 1.0}:
        return {"values": [round(figure, 3) for figure in figures]}
    bits = "".join(str(int(figure)) for figure in figures)
    return {"count": len(bits), "bits": f"{int(f'0{bits}', 2):x}"}


def unpack(packed: Mapping[str, Any]) -> list[float]:
    """The figures again."""
    if "values" in packed:
        return [float(value) for value in packed["values"]]
    count = int(packed["count"])
    return [float(bit) for bit in f"{int(packed['bits'], 16):0{count}b}"] if count else []
