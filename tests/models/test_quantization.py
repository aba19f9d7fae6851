"""A base model in 8 or 4 bits trains, is delivered and loads again, on a CPU too; skipped without bitsandbytes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import BertConfig, BertForMaskedLM

from fedlora import simulate
from fedlora.config import build
from fedlora.errors import ModelError
from fedlora.models import base_model
from fedlora.models.model import Model
from fedlora.models.peft_files import load_peft, save_peft
from fedlora.run.directory import RunDirectory
from fedlora.run.export import export
from fedlora.run.setup import reopen
from fedlora.sections import LoRAConfig, ModelConfig
from tests.support.models import FORMS, batch, logits, make, plain_logits, random_adapter, tokenizer

pytestmark = pytest.mark.optional_library("bitsandbytes")
BITS = ("8bit", "4bit")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(kind, tmp_path_factory.mktemp(kind)) for kind in FORMS}


def settings(folder: Path, bits: str, **more: Any) -> ModelConfig:
    return ModelConfig(path=str(folder), quantize=bits, device="cpu", **more)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", FORMS)
def test_the_delivered_adapter_gives_the_trained_logits(
    folders: dict[str, Path], kind: str, bits: str, tmp_path: Path
) -> None:
    """GPT-2's Conv1D and an encoder's head among them, with an offset beside the weights."""
    config = settings(folders[kind], bits)
    model = Model(config, LoRAConfig(rank=3), FORMS[kind], seed=1)
    trained = random_adapter(model, 4, rank=7)
    save_peft(model, trained, tmp_path)
    model.set_adapter(trained)
    bare, *_ = base_model.load_base_model(config, FORMS[kind], seed=99)
    loaded: Any = PeftModel.from_pretrained(bare, str(tmp_path))
    assert_close(plain_logits(loaded, kind), logits(model, kind), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("lora", [{"kind": "dora"}, {"kind": "vera"}, {"init": "olora"}, {"init": "orthonormal"}])
def test_every_kind_and_start_of_an_adapter_goes_with_it(
    folders: dict[str, Path], lora: dict[str, Any], bits: str, tmp_path: Path
) -> None:
    """A start that is taken from the weights leaves these as they were."""
    config = settings(folders["llama"], bits)
    model = Model(config, LoRAConfig(rank=3, **lora), FORMS["llama"], seed=1)
    trained = random_adapter(model, 4)
    save_peft(model, trained, tmp_path)
    model.set_adapter(trained)
    bare, *_ = base_model.load_base_model(config, FORMS["llama"], seed=99)
    loaded: Any = PeftModel.from_pretrained(bare, str(tmp_path))
    assert_close(plain_logits(loaded, "llama"), logits(model, "llama"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_a_base_computes_what_its_weights_say_in_training_and_in_evaluation(
    folders: dict[str, Path], bits: str
) -> None:
    """Close to the base in full precision, the same in both modes, and a row the same whatever is beside it."""
    whole = Model(ModelConfig(path=str(folders["llama"])), LoRAConfig(rank=3), FORMS["llama"], seed=1)
    model = Model(settings(folders["llama"], bits), LoRAConfig(rank=3), FORMS["llama"], seed=1)
    far = (logits(model, "llama") - logits(whole, "llama")).norm() / logits(whole, "llama").norm()
    assert 0 < far < {"8bit": 0.02, "4bit": 0.3}[bits]
    model.net.train()
    assert_close(model.logits(batch("llama"))[0], logits(model, "llama"), rtol=1e-5, atol=1e-6)
    first = {k: v[:1] for k, v in batch("llama").items()}
    model.net.eval()
    assert_close(model.logits(first)[0], logits(model, "llama")[: len(model.logits(first)[0])], rtol=1e-4, atol=1e-6)
    assert model.size == whole.size


@pytest.mark.parametrize("bits", BITS)
def test_what_is_trained_whole_is_never_quantised(folders: dict[str, Path], bits: str, tmp_path: Path) -> None:
    """An encoder that was saved for something else lacks its pooler too, which is then learned from nothing."""
    whole: Any = BertForMaskedLM(BertConfig.from_pretrained(folders["bert"]))
    whole.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = Model(settings(tmp_path, bits), LoRAConfig(rank=3), FORMS["bert"], seed=1)
    heads = {name: p.dtype for name, p in model.heads.items()}
    assert len(heads) == 4 and {*heads.values()} == {torch.float32}
    again = Model(settings(tmp_path, bits), LoRAConfig(rank=3), FORMS["bert"], seed=1)
    assert torch.equal(logits(model, "bert"), logits(again, "bert")) and model.fingerprint == again.fingerprint


@pytest.mark.parametrize("bits", BITS)
def test_a_checkpoint_that_is_quantised_already_is_opened_as_it_is(
    folders: dict[str, Path], bits: str, tmp_path: Path
) -> None:
    net, processor, _ = base_model.load_base_model(settings(folders["llama"], bits), FORMS["llama"], seed=1)
    net.save_pretrained(tmp_path)  # type: ignore[operator]
    processor.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"is stored in {bits}; set model.quantize = {bits}"):
        base_model.load_base_model(ModelConfig(path=str(tmp_path)), FORMS["llama"], seed=1)
    again = base_model.load_base_model(settings(tmp_path, bits), FORMS["llama"], seed=1)[0]
    assert_close(plain_logits(again, "llama"), plain_logits(net, "llama"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("bits", "privacy"), [("8bit", {}), ("4bit", {"dp.noise": 1.0})])
def test_a_run_trains_on_it_and_delivers_what_was_evaluated(
    folders: dict[str, Path], bits: str, privacy: dict[str, Any], tmp_path: Path
) -> None:
    """With a strategy whose offset stays beside weights that can take nothing in."""
    rows = [{"text": f"w{i % 7} w{i % 3} w{i % 5} w{i % 4}"} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = simulate(
        model=folders["llama"],
        data=tmp_path / "rows.jsonl",
        out=tmp_path / "run",
        strategy="fedex_lora",
        clients=2,
        cohort=2,
        rounds=2,
        progress=False,
        **{"model.quantize": bits, "model.device": "cpu", "lora.rank": 2, "train.lr": 0.05, "train.batch_size": 4},
        **privacy,
    )
    assert privacy or run.rounds[-1]["eval"]["loss"] < run.rounds[0]["eval"]["loss"]
    export(run.folder, "adapter")
    model = Model(settings(folders["llama"], bits, max_length=128), LoRAConfig(rank=2), FORMS["llama"], seed=0)
    model.set_adapter(load_peft(model, run.adapter))
    held = reopen(RunDirectory(run.folder), build(RunDirectory(run.folder).config())).evaluation
    assert model.metrics(held).values()["loss"] == pytest.approx(run.rounds[-1]["eval"]["loss"], rel=1e-5)


@pytest.mark.parametrize("method", ["gptq", "awq", "mxfp4"])
def test_other_quantised_checkpoints_are_refused_by_name(folders: dict[str, Path], method: str, tmp_path: Path) -> None:
    shutil.copytree(folders["llama"], tmp_path, dirs_exist_ok=True)
    stored = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": method}}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ModelError, match=f"is quantised by {method}, on which nothing is trained here"):
        base_model.load_base_model(ModelConfig(path=str(tmp_path)), FORMS["llama"], seed=1)
