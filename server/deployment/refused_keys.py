"""Who asked to take part with a key that the gateway does not take: for the server's screen, once each."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from fedlora.deployment.provision import names_by_fingerprint

MOST = 20  # keys that are said; a stranger can make as many as he likes
WORDS = {  # the gateway's reason -> what the screen says
    "unknown key": "has a key that is not registered here, and was refused",
    "old signature": "was refused, as its clock is not this machine's; it must set it (NTP)",
    "false signature": "was refused, as its signature is not that of its key",
}


class RefusedKeys:
    """Reads the gateway's log for keys that were refused, and knows the names of those that ever had one."""

    def __init__(self, credentials: Path) -> None:
        """`credentials` is the server's folder of `fedlora provision`. Raises `ConfigError` for a damaged one."""
        self._names = names_by_fingerprint(credentials)
        self._said = set[tuple[str, str]]()

    def news(self, lines: str) -> list[str]:
        """What there is to say by the lines that are new in the gateway's log."""
        return [words for line in lines.splitlines() if (words := self._about(_entry(line)))]

    def _about(self, entry: Mapping[str, str]) -> str:
        reason, key = entry.get("reason", ""), entry.get("key", "")
        if reason not in WORDS or not key or (key, reason) in self._said or len(self._said) > MOST:
            return ""
        self._said.add((key, reason))
        if len(self._said) > MOST:
            return "more keys were refused; gate.log has them all"
        name = self._names.get(key, "")
        who = name or f"a client that nobody knows here, from {entry.get('peer', '')}, key {key},"
        if name and reason == "unknown key":
            return f"{name}, which was removed, asked to take part and was refused"
        return f"{who} {WORDS[reason]}"


def _entry(line: str) -> Mapping[str, str]:
    """The entry in a line of the log; an empty one for a line that is none."""
    with suppress(ValueError):
        entry = json.loads(line)
        if isinstance(entry, dict) and entry.get("event") == "refused":
            return {name: str(value) for name, value in entry.items()}
    return {}
