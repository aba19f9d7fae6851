"""A PEFT adapter as llama.cpp's GGUF, by llama.cpp's own converter, which comes with its source and in no package."""

import shutil
import subprocess
import sys
from pathlib import Path

from fedlora.config import Config
from fedlora.errors import ConfigError, ExportError
from fedlora.models.source import source_of

SCRIPT = "convert_lora_to_gguf.py"
ADAPTER = "adapter.gguf"
NAMED = "federated-adapter"  # the folder that is converted, after which llama.cpp names the model
SAID = 300  # characters of what the converter says as it fails


def check_convertible(config: Config) -> None:
    """Raise `ConfigError` for an adapter that llama.cpp does not read."""
    if config.lora.kind != "lora":
        raise ConfigError(f"--as gguf: llama.cpp reads no adapter of lora.kind = {config.lora.kind}; use --as adapter")
    if config.model.task not in ("auto", "lm", "preference"):
        raise ConfigError(
            f"--as gguf: llama.cpp runs causal language models, and model.task = {config.model.task}; use --as adapter"
        )


def converter(run: Path, base: str, folder: Path | None) -> Path:
    """The converter's script: in `folder`, in llama.cpp here or in the home folder, or on the PATH.

    Raises `ExportError` with the commands that come to the same where there is none.
    """
    places = [folder] if folder else [Path("llama.cpp"), Path.home() / "llama.cpp"]
    found = [place / SCRIPT for place in places if (place / SCRIPT).is_file()]
    on_path = shutil.which(SCRIPT)
    if found or (on_path and not folder):
        return found[0] if found else Path(str(on_path))
    looked = folder or "llama.cpp, ~/llama.cpp or on the PATH"
    raise ExportError(
        f"--as gguf: {SCRIPT} is not in {looked}; name the folder of llama.cpp with --llama-cpp, or have it convert "
        f"the run's adapter: git clone https://github.com/ggml-org/llama.cpp; pip install ./llama.cpp/gguf-py; "
        f"python llama.cpp/{SCRIPT} {run / 'adapter'} {' '.join(_base(base))} --outfile {ADAPTER}"
    )


def convert(place: Path, base: str, folder: Path | None) -> None:
    """Replace the PEFT adapter in `place` by `ADAPTER`; `base` is the run's model.path.

    Raises `ExportError` where the converter fails, with the end of what it says.
    """
    script, source = converter(place, base, folder), place / NAMED
    files = list(place.iterdir())
    source.mkdir()
    for path in files:
        path.rename(source / path.name)
    words = [sys.executable, str(script), str(source), *_base(base), "--outfile", str(place / ADAPTER)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode or not _is_gguf(place / ADAPTER):
        said = " ".join((done.stderr or done.stdout).split())[-SAID:]
        raise ExportError(f"{script} made no GGUF of this adapter (exit code {done.returncode}): {said}")
    shutil.rmtree(source)


def _base(path: str) -> list[str]:
    """The converter's options that say which base the adapter is for."""
    source = source_of(path)
    return ["--base", source] if Path(source).is_dir() else ["--base-model-id", source]


def _is_gguf(path: Path) -> bool:
    """Whether a file is there and begins as GGUF does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"
