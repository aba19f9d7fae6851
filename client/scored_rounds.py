"""The last round in which a client told scores on its held-out examples: once a round, or stage, of one model."""

import json
from pathlib import Path

from fedlora.errors import LedgerError, PolicyRefusal
from fedlora.message_types import Stage
from fedlora.storage.files import write_durably


class ScoredRounds:
    """A file that holds the last round of which scores were told, and the job for which."""

    def __init__(self, folder: Path, stage: Stage = "round") -> None:
        self._path = folder / ("scored.json" if stage == "round" else f"scored-{stage}.json")

    def note(self, round: int, job: str) -> None:
        """Write down, before anything is evaluated, that this job of this round (from 0) is.

        Raises `PolicyRefusal` for another job of that round or of an earlier one: a server that may have a model of its
        choice scored as often as it likes learns of single examples.
        """
        last, done = self._read()
        if round < last or (round == last and job != done):
            raise PolicyRefusal(
                f"the server asks for scores of round {round + 1}, and those of round {last + 1} were told; scores are "
                "told once a round"
            )
        if round > last:
            write_durably(self._path, json.dumps({"round": round, "job": job}).encode(), mode=0o600)

    def _read(self) -> tuple[int, str]:
        if not self._path.exists():
            return -1, ""
        try:
            said = json.loads(self._path.read_text(encoding="utf-8"))
            return int(said["round"]), str(said["job"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise LedgerError(
                f"{self._path} is damaged or cannot be read; put it back from a copy, or leave the run"
            ) from e
