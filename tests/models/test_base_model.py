"""A base model is weights and a configuration; code that comes with one is never run."""

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedlora.errors import ModelError
from fedlora.models.base_model import load_base_model
from fedlora.sections import ModelConfig
from tests.support.models import TEXT, make


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("gpt2", tmp_path_factory.mktemp("gpt2"))


def test_code_that_comes_with_a_model_is_not_run_and_nobody_is_asked(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", StringIO("y\n"))  # what somebody might answer to transformers' own question
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    config["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(ModelError, match="could not be loaded"):
        load_base_model(ModelConfig(path=str(folder)), TEXT, seed=0)
    assert not (tmp_path / "ran").exists()


def test_weights_in_a_pickle_are_not_read(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="could not be loaded"):
        load_base_model(ModelConfig(path=str(folder)), TEXT, seed=0)
