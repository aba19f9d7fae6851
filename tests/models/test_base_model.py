"""A base model is weights and a configuration; code that comes with one is never run."""

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPForImageClassification

from fedlora.data.schema import Schema
from fedlora.errors import ModelError
from fedlora.models.base_model import head_modules, load_base_model
from fedlora.sections import ModelConfig
from tests.support.models import TEXT, make

LABEL = Schema("label", ("text", "label"), ("a", "b", "c"))


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


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as refused:
        load_base_model(ModelConfig(path=str(folder)), TEXT, seed=0)
    return str(refused.value)


@pytest.mark.parametrize("beside", [(), ("config.json", "model.safetensors"), ("tokenizer.json",)])
def test_an_adapter_is_no_base_model(model: Path, tmp_path: Path, beside: tuple[str, ...]) -> None:
    """transformers would load its base and the adapter, and the second training would not be what is delivered."""
    for name in beside:
        shutil.copy(model / name, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "the/base"}))
    said = refusal(tmp_path)
    assert "holds an adapter" in said
    assert "the/base" in said
    assert "--as merged" in said


def test_a_run_directory_is_no_base_model(tmp_path: Path) -> None:
    (tmp_path / "rounds.jsonl").touch()
    assert "a run of fedlora" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", "{", "could not be loaded"),
        ("tokenizer.json", None, "the tokenizer of model"),
        ("model.safetensors", "x", "the weights of model"),
    ],
)
def test_what_is_damaged_or_missing_is_named_in_one_sentence(
    model: Path, tmp_path: Path, name: str, content: str | None, says: str
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    said = refusal(folder)
    assert says in said
    assert "\n" not in said
    assert not said.endswith(":")


@pytest.mark.parametrize(("schema", "lost"), [(TEXT, "layers.1.mlp"), (LABEL, "model.")], ids=["lm", "classifier"])
def test_layers_without_weights_are_not_drawn_at_random(tmp_path: Path, schema: Schema, lost: str) -> None:
    folder = make("llama" if schema is TEXT else "llama-cls", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if lost not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no weights, .* for model\.layers\.[01], of which it says to consist"):
        load_base_model(ModelConfig(path=str(folder)), schema, seed=0)


def test_pointers_in_the_place_of_weights_are_named(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:a\n")
    assert "pointers of Git LFS, and not the files themselves; run git lfs pull" in refusal(folder)


def test_a_folder_without_a_tokenizer_is_told_what_is_missing(model: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model / name, tmp_path)
    assert "the folder has no tokenizer; put that of the model beside its weights" in refusal(tmp_path)


def test_an_architecture_that_is_no_language_model_is_refused_by_its_name(tmp_path: Path) -> None:
    make("vit", tmp_path)
    with pytest.raises(ModelError, match="of the architecture vit, of which transformers has no AutoModelForCausalLM"):
        load_base_model(ModelConfig(path=str(tmp_path)), TEXT, seed=0)


def test_a_backbone_whose_name_is_not_the_models_own_is_no_head() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    net = CLIPForImageClassification(CLIPConfig(vision_config=sizes | {"image_size": 8, "patch_size": 4}))
    assert head_modules(net, []) == ["classifier"]


def test_a_new_output_layer_can_begin_larger(tmp_path: Path) -> None:
    """So that a head which nobody trains, as under privacy, does not ask the model for changes ten times as large."""
    folder, two = make("bert", tmp_path), Schema("label", ("text", "label"), ("no", "yes"))
    plain, larger = (load_base_model(ModelConfig(path=str(folder), head_scale=k), two, seed=0)[0] for k in (1, 10))
    was, now = plain.state_dict(), larger.state_dict()
    assert [name for name in was if not torch.equal(was[name], now[name])] == ["classifier.weight"]
    torch.testing.assert_close(now["classifier.weight"], 10 * was["classifier.weight"])


@pytest.mark.parametrize(("kind", "schema"), [("bert", LABEL), ("gpt2", TEXT)], ids=["trained", "none"])
def test_a_head_that_is_not_new_is_not_scaled(tmp_path: Path, kind: str, schema: Schema) -> None:
    folder = make(kind, tmp_path)
    with pytest.raises(ModelError, match=r"model\.head_scale = 10, and no head of model .* is new"):
        load_base_model(ModelConfig(path=str(folder), head_scale=10), schema, seed=0)
