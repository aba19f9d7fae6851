"""The parts of jobs that a client holds, so that a frozen matrix or an old residual crosses the wire once."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from fedlora.lora import LoRA
from fedlora.messages.codec import IncomingJob
from fedlora.storage.files import replace_file
from fedlora.vectors import FlatAdapter, content_hash, unflatten

# Parts of this process's last job, whoever's it was. That the next client's are the same objects tells the model that
# it wears the same offset already.
_recent: dict[str, LoRA] = {}


class PartStore:
    """A folder of one client's with a file a part, named by its hash. A cache: what is damaged counts as lacking."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self, order: IncomingJob) -> tuple[dict[str, LoRA], tuple[str, ...]]:
        """The order's parts, and the names of those it lacks. Where none is lacking, all others are dropped."""
        for flat in order.sent.values():
            self._write(flat)
        found = {name: self._find(name, order.sent.get(name)) for name in dict.fromkeys(order.names)}
        parts = {name: lora for name, lora in found.items() if lora is not None}
        lacks = tuple(name for name, lora in found.items() if lora is None)
        if not lacks:
            self._drop_all_but(parts)
            _recent.clear()
            _recent.update(parts)
        return parts, lacks

    def _find(self, name: str, sent: FlatAdapter | None) -> LoRA | None:
        flat = sent or self._read(name)
        if flat is None:
            return None
        return _recent.get(name) or unflatten(flat.vector, flat.manifest)

    def _read(self, name: str) -> FlatAdapter | None:
        try:
            with safe_open(self._path(name), framework="pt") as f:
                flat = FlatAdapter(f.get_tensor("part"), f.metadata()["manifest"], name)
        except (SafetensorError, OSError, KeyError, TypeError):
            return None
        return flat if content_hash(flat.vector, flat.manifest) == name else None

    def _write(self, flat: FlatAdapter) -> None:
        """Keep a part. There is no wait for the disk, as the hash tells what a crash left."""
        content = to_bytes({"part": flat.vector}, metadata={"manifest": flat.manifest})
        replace_file(self._path(flat.name), content, wait_for_disk=False)

    def _drop_all_but(self, names: dict[str, LoRA]) -> None:
        for path in self.folder.glob("*.part"):
            if path.stem not in names:
                path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.part"
