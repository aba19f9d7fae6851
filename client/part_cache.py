"""The parts of jobs that a client holds, so that a frozen matrix or an old residual crosses the wire once."""

from collections.abc import Container
from contextlib import suppress
from pathlib import Path
from shutil import rmtree

from fedlora.lora import LoRA
from fedlora.messages.codec import IncomingJob
from fedlora.messages.parts import FlatAdapter, content_hash, unflatten
from fedlora.storage.files import replace_file

# The parts of this process's last job, of whichever client. Where the next client's are the same objects, the model
# sees that it has the same offset already.
_recent: dict[str, LoRA] = {}


class PartStore:
    """A client's folder with a file for every part, named by its hash. A cache: a damaged file counts as missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self, incoming: IncomingJob) -> tuple[dict[str, LoRA], tuple[str, ...]]:
        """The parts of a job by name, and the names of those that are missing.

        Parts that came with the job are kept for the next one; once none is missing, those that it lacks are deleted.
        """
        parts, missing = {}, []
        for name in dict.fromkeys(incoming.names):
            content = self._content(name, incoming.sent.get(name))
            if content is None:
                missing.append(name)
            else:
                parts[name] = _recent.get(name) or unflatten(content)
        for part in incoming.sent.values():
            if self._path(part.name).is_dir():  # damage, as a part is a file
                rmtree(self._path(part.name))
            replace_file(self._path(part.name), part.content, wait_for_disk=False)  # the hash tells what a crash left
        if not missing:
            self._drop_all_but(parts)
            _recent.clear()
            _recent.update(parts)
        return parts, tuple(missing)

    def _content(self, name: str, sent: FlatAdapter | None) -> bytes | None:
        """The bytes of a part, from the message or else from the folder; none where they are in neither."""
        if sent:
            return sent.content
        try:
            content = self._path(name).read_bytes()
        except OSError:
            return None
        return content if content_hash(content) == name else None

    def _drop_all_but(self, names: Container[str]) -> None:
        for path in self.folder.glob("*.part"):
            if path.stem not in names:
                with suppress(OSError):
                    path.unlink()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.part"
