"""What a client keeps on its own disk: the sides it trains and does not share, by round, and its last answer.

Every file is written whole or not at all, and holds a hash of its numbers: one that was cut short or altered is seen,
told, and the one before it is used.
"""

import json
import logging
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedlora.jobs import PrivacySpent, Update
from fedlora.lora import LoRA
from fedlora.vectors import content_hash, flatten, unflatten

from .files import write_durably

DAMAGE = SafetensorError, OSError, ValueError, LookupError, TypeError
log = logging.getLogger("fedlora")


class ClientState:
    """A folder of one client's. The last two rounds stay, so that a round which is done again starts as it did."""

    def __init__(self, folder: Path, name: str = "kept") -> None:
        self.folder, self._name = folder, name

    def before(self, round: int) -> LoRA:
        """What was kept in the latest round before this one; empty where there was none."""
        for path in sorted(self.folder.glob(f"{self._name}-*.safetensors"), reverse=True):
            if int(path.stem.removeprefix(f"{self._name}-")) < round:
                try:
                    return read(path)[0]
                except DAMAGE as e:
                    log.warning("%s is damaged (%s); what was kept before it is used", path, e)
        return LoRA()

    def keep(self, round: int, lora: LoRA) -> None:
        """Write what this round left, whole or not at all."""
        if not lora:
            return
        write(self.folder / f"{self._name}-{round:06d}.safetensors", lora, {})
        for old in sorted(self.folder.glob(f"{self._name}-*.safetensors"))[:-2]:
            old.unlink(missing_ok=True)


class CachedReply:
    """A client's last answer: a job that comes again, as after a crash of the server, is not done twice."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "answer.safetensors"

    def keep(self, job: str, update: Update) -> None:
        """Write the answer to the job of this digest; from then on it may be sent."""
        spent = [update.spent.epsilon, update.spent.charges] if update.spent else None
        write(
            self.path,
            update.lora,
            {"job": job, "examples": str(update.examples), "loss": json.dumps(update.loss), "spent": json.dumps(spent)},
        )

    def to(self, job: str) -> Update | None:
        """The answer to this job, if it was worked out already, and is whole."""
        try:
            lora, told = read(self.path)
            spent = json.loads(told["spent"])
            if told["job"] != job:
                return None
            return Update(
                lora,
                int(told["examples"]),
                json.loads(told["loss"]),
                PrivacySpent(epsilon=spent[0], charges=spent[1]) if spent else None,
            )
        except DAMAGE:
            return None


def write(path: Path, lora: LoRA, told: dict[str, str]) -> None:
    """An adapter as a file, with a hash of its numbers and whatever else is to be told beside them."""
    flat = flatten(lora)
    content = save({"numbers": flat.vector}, metadata={"manifest": flat.manifest, "name": flat.name, **told})
    write_durably(path, content)


def read(path: Path) -> tuple[LoRA, dict[str, str]]:
    """The adapter of a file, and what is told beside it. Raises one of `DAMAGE` for a file that is not as written."""
    with safe_open(path, framework="pt") as f:
        told = f.metadata()
        vector = f.get_tensor(f.keys()[0])
    if "name" in told and content_hash(vector, told["manifest"]) != told["name"]:  # earlier versions wrote none
        raise ValueError("its numbers are not those that were written")
    return unflatten(vector, told["manifest"]), told
