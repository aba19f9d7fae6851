"""What the commands share of their options: settings by dotted keys, options as key=value."""

from collections.abc import Sequence
from typing import Any

from fedlora.errors import ConfigError


def pair(text: str) -> tuple[str, str]:
    """`key=value` as a pair."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--option {text}: write it as key=value")
    return key.strip(), value.strip()


def dotted(words: Sequence[str]) -> dict[str, Any]:
    """Settings by their dotted keys: `--lora.rank 16`, `--lora.rank=16`, or `--lora.rslora` alone for true."""
    given: dict[str, Any] = {}
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f'"{word}" belongs to no option; settings are written --train.lr 2e-3')
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else "true"
        given[key] = value
    return given
