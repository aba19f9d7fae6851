"""Where a base model lies, and what to say of a folder or hub id from which none can be loaded."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedlora.errors import ModelError
from fedlora.sections import ModelConfig

TINY = Path(__file__).parent.parent / "tiny"  # the embedded default
MERGE = "fedlora export RUN --as merged"
SAID = 300  # characters of what transformers says in an error


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
    return ""


def _adapter_words(base: str) -> str:
    """The sentence about an adapter that was given as a model; `base` is the model that it names as its own."""
    named = f", {base}," if base else ""
    return (
        f"it holds an adapter, not a model; give --model its base{named} to train a new adapter, "
        f"or to go on from this one put it into the weights first ({MERGE}, or merge_and_unload of PEFT)"
    )


def _base_of_adapter(file: Path) -> str:
    """The base model that an adapter's configuration names; empty where it cannot be read."""
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"] or "")
    except (OSError, ValueError, KeyError, TypeError):
        return ""


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
