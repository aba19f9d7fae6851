"""What a client keeps on its own disk: the sides it trains and does not share, by round."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from . import checkpoint
from .flat import flatten, unflatten
from .lora import LoRA


class Store:
    """A folder of one client's. The last two rounds stay, so that a round which is done again starts as it did."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def before(self, round: int) -> LoRA:
        """What was kept in the latest round before this one; empty where there was none."""
        for path in sorted(self.folder.glob("kept-*.safetensors"), reverse=True):
            if int(path.stem.removeprefix("kept-")) < round:
                try:
                    with safe_open(path, framework="pt") as f:
                        return unflatten(f.get_tensor("kept"), f.metadata()["manifest"])
                except (SafetensorError, OSError, ValueError, KeyError):
                    continue
        return LoRA()

    def keep(self, round: int, lora: LoRA) -> None:
        """Write what this round left, whole or not at all."""
        if not lora:
            return
        flat = flatten(lora)
        content = save({"kept": flat.vector}, metadata={"manifest": flat.manifest})
        checkpoint.write(self.folder / f"kept-{round:06d}.safetensors", content)
        for old in sorted(self.folder.glob("kept-*.safetensors"))[:-2]:
            old.unlink(missing_ok=True)
