"""What is delivered can be read: by PEFT, and by readers that know one alpha and one rank."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.testing import assert_close

from fedlora.errors import ModelError
from fedlora.lora import LoRA, delta
from fedlora.models.model import Model
from fedlora.models.peft_files import check_loads, load_adapter, load_peft, save_peft
from fedlora.sections import LoRAConfig, ModelConfig
from tests.support.models import FORMS, TEXT, logits, make, plain_logits, random_adapter

PATTERNS = {"rank_pattern": "layers.0.q_proj=5", "alpha_pattern": "v_proj=12"}


def build(folder: Path, model: str = "llama", **lora: Any) -> Model:
    return Model(ModelConfig(path=str(folder)), LoRAConfig(rank=3, **lora), FORMS[model], seed=1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("llama"))


def unlike_ranks(model: Model) -> LoRA:
    """A random adapter whose modules have ranks of their own."""
    ranks = {m: 2 + i for i, m in enumerate(model.adapted)}
    parts = {rank: random_adapter(model, rank, rank) for rank in ranks.values()}
    return LoRA({m: parts[r].A[m] for m, r in ranks.items()}, {m: parts[r].B[m] for m, r in ranks.items()})


@pytest.mark.parametrize("lora", [{}, PATTERNS, {"rslora": True, "alpha": 5.0}, {"alpha": 5.0}], ids=str)
def test_a_reader_of_one_alpha_and_one_rank_computes_the_runs_products(
    llama: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    """Such a reader takes alpha over r from the configuration, or over the rank that a matrix has; both are s."""
    model = build(llama, **lora)
    adapter = unlike_ranks(model)
    save_peft(model, adapter, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    for module, product in delta(adapter).items():
        a, b = (file[f"base_model.model.{module}.lora_{letter}.weight"] for letter in "AB")
        assert a.shape[0] == b.shape[1] == config["r"]
        assert_close(config["lora_alpha"] / config["r"] * b @ a, model.scales[module] * product, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def patterned(llama: Path) -> Model:
    return build(llama, **PATTERNS)


@settings(max_examples=25, deadline=None)
@given(ranks=st.lists(st.integers(1, 7), min_size=4, max_size=4), zeros=st.integers(0, 3))
def test_whatever_the_ranks_an_adapter_opens_as_it_was_written(patterned: Model, ranks: list[int], zeros: int) -> None:
    """Also where a module has not been trained, so that its B, or a column of it, is zero."""
    parts = [random_adapter(patterned, i, rank) for i, rank in enumerate(ranks)]
    names = [*patterned.adapted]
    B = {m: part.B[m] * (i >= zeros) for i, (m, part) in enumerate(zip(names, parts, strict=True))}
    adapter = LoRA({m: part.A[m] for m, part in zip(names, parts, strict=True)}, B)
    with TemporaryDirectory() as place:
        save_peft(patterned, adapter, Path(place))
        assert_close(vars(load_peft(patterned, Path(place))), vars(adapter), rtol=1e-6, atol=1e-7)


def test_saving_leaves_the_adapter_in_the_model_as_it_was(llama: Path, tmp_path: Path) -> None:
    model = build(llama, **PATTERNS)
    adapter = unlike_ranks(model)
    save_peft(model, adapter, tmp_path)
    assert_close(vars(model.get_adapter()), vars(adapter), rtol=0, atol=0)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("adapter", ["lora", "dora", "vera"])
def test_an_adapter_that_loads_is_let_through(tmp_path: Path, kind: str, adapter: str) -> None:
    check_loads(build(make(kind, tmp_path), kind, kind=adapter))


def test_an_adapter_that_does_not_arrive_whole_is_refused_before_the_start(llama: Path) -> None:
    """The architecture that the configuration describes has one layer less than the model."""
    model = build(llama)
    model.net.config.num_hidden_layers = 1
    with pytest.raises(ModelError, match=r"there is no place for .*layers.1.self_attn.q_proj.lora_A"):
        check_loads(model)


class TestATiedOutputLayer:
    """`lm_head` has the weight of the input embedding."""

    @pytest.fixture
    def model(self, tmp_path: Path) -> Model:
        folder = make("llama-tied", tmp_path / "model")
        return Model(ModelConfig(path=str(folder)), LoRAConfig(rank=3, targets=("lm_head", "q_proj")), TEXT, seed=1)

    def test_an_offset_goes_into_the_output_alone(self, model: Model, tmp_path: Path) -> None:
        """As a file loaded afresh, in which it is an adapter, and so in nothing else."""
        part = random_adapter(model, 2)
        zero = LoRA(part.A, {m: torch.zeros_like(b) for m, b in part.B.items()})
        model.set_adapter(zero, (part,))
        with_offset = logits(model, "llama")
        assert set(model.adapted) == {"lm_head", *(f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))}
        save_peft(model, part, tmp_path / "adapter")
        fresh = load_adapter(ModelConfig(path=str(tmp_path / "model")), TEXT, tmp_path / "adapter")
        assert_close(with_offset, plain_logits(fresh, "llama"), rtol=1e-4, atol=1e-5)

    def test_the_base_s_embedding_is_not_in_the_file(self, model: Model, tmp_path: Path) -> None:
        save_peft(model, random_adapter(model, 2), tmp_path / "adapter")
        names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert all("lora_" in name for name in names)
