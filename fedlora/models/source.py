"""Where a base model lies, and what to say of a folder or hub id from which none can be loaded."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedlora.errors import ModelError
from fedlora.lfs import is_lfs_pointer
from fedlora.sections import ModelConfig

TINY = Path(__file__).parent.parent / "tiny"  # the embedded default
MERGE = "fedlora export RUN --as merged"
TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json", "merges.txt")  # files of some tokenizer
SAID = 300  # characters of what transformers says in an error
FINGERPRINT = "fedlora-fingerprint:"  # before one; no hub id has a colon, so nobody can put a model there


@dataclass(frozen=True)
class BaseName:
    """What a base model is called where others read of it: never by the folder in which it lies here."""

    hub_id: str  # empty for a folder that is not the hub's own cache
    revision: str  # of the hub's; empty: the newest
    fingerprint: str  # as `base_model.fingerprint` has it

    def __str__(self) -> str:
        return self.hub_id or f"{FINGERPRINT}{self.fingerprint}"


def base_name(config: ModelConfig, fingerprint: str) -> BaseName:
    """The name of a base model with this fingerprint; a folder in the hub's cache is known by its hub id."""
    folder = Path(config.path).expanduser()
    if config.path and not folder.is_dir():
        return BaseName(config.path, config.revision, fingerprint)
    cached_model, snapshots, commit = ("", "", "", *folder.absolute().parts)[-3:]
    if snapshots == "snapshots" and cached_model.startswith("models--"):
        return BaseName(cached_model.removeprefix("models--").replace("--", "/"), commit, fingerprint)
    return BaseName("", "", fingerprint)


def source_of(path: str) -> str:
    """The folder or hub id to load; of an empty path, the embedded model.

    Raises `ModelError` for a folder that is missing, and for one in which there can be no model.
    """
    if not path:
        return str(TINY)
    folder = Path(path).expanduser()
    if folder.is_dir():
        if wrong := _no_model(folder):
            raise ModelError(f"model {path}: {wrong}")
        return str(folder)
    if folder.is_file():
        raise ModelError(f"model {path}: this is a file; give --model the folder with config.json, or a hub id")
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise ModelError(f"model {path}: there is no such folder; give --model a folder with config.json, or a hub id")
    return path


def _no_model(folder: Path) -> str:
    """Why a folder holds no base model that could be loaded, and the remedy; empty if it may hold one."""
    if (folder / "adapter_config.json").exists():
        return _adapter_words(_base_of_adapter(folder / "adapter_config.json"))
    if (folder / "rounds.jsonl").exists():
        return f"the folder holds a run of fedlora; to go on from its model, {MERGE} and give --model what that writes"
    if not (folder / "config.json").exists():
        return "the folder has no config.json; give --model a folder as save_pretrained of transformers writes it"
    if not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
        return (
            "it could not be loaded, as its weights are in .bin files alone, which are pickles and may hold code; "
            "have transformers save it anew as safetensors"
        )
    if any(map(is_lfs_pointer, folder.glob("*.safetensors"))):
        return "its weights are pointers of Git LFS, and not the files themselves; run git lfs pull in its folder"
    return ""


def refuse_without_tokenizer(source: str) -> None:
    """Raise `ModelError` for a folder in which no file is a tokenizer's."""
    folder = Path(source)
    if folder.is_dir() and not any(path for name in TOKENIZERS for path in folder.glob(name)):
        raise ModelError(
            f"model {source}: the folder has no tokenizer; put that of the model beside its weights (tokenizer.json "
            "and tokenizer_config.json, as save_pretrained of transformers writes them)"
        )


def _adapter_words(base: str) -> str:
    """The sentence about an adapter that was given as a model; `base` is the model that it names as its own."""
    named = f", {base}," if base else ""
    return (
        f"it holds an adapter, not a model; give --model its base{named} to train a new adapter, "
        f"or to go on from this one put it into the weights first ({MERGE}, or merge_and_unload of PEFT)"
    )


def _base_of_adapter(file: Path) -> str:
    """The base model that an adapter's configuration names; empty where it names none that could be loaded."""
    try:
        named = str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"] or "")
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return "" if named.startswith(FINGERPRINT) else named


def refuse_adapter(net: Any, source: str) -> None:
    """Raise `ModelError` where transformers has loaded an adapter of the hub with its base."""
    if getattr(net, "_hf_peft_config_loaded", False):
        raise ModelError(f"model {source}: {_adapter_words(net.config.name_or_path)}")


@contextmanager
def readable(path: str, part: str) -> Iterator[None]:
    """Turn the errors with which transformers fails to load a part of a model into a `ModelError` of one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, SafetensorError) as e:
        said = " ".join(str(e).split()) or type(e).__name__
        where = "" if Path(path).expanduser().is_dir() else " as a folder or, over the network, as a hub id"
        raise ModelError(f'{part} of model "{path}" could not be loaded{where}: {said[:SAID]}') from e


def revision(config: ModelConfig) -> dict[str, Any]:
    return {"revision": config.revision} if config.revision else {}


@cache
def cached(source: str) -> dict[str, Any]:
    """Options for transformers to load from its cache if the hub is out of reach: it would retry for a minute."""
    from huggingface_hub import HfApi, constants

    if Path(source).is_dir() or constants.HF_HUB_OFFLINE:
        return {}
    try:
        HfApi().model_info(source, timeout=10)
    except Exception:  # the network, the hub and the server each have their own kinds; a cached copy still does
        return {"local_files_only": True}
    return {}
