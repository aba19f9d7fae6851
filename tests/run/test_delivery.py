"""The adapter in the run directory, loaded afresh, is what was evaluated, or the run says that it is not."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from fedlora import config as configuration
from fedlora.api import simulate
from fedlora.errors import ExportError, FedloraError
from fedlora.lora import LoRA, scale
from fedlora.run.delivery import check_adapter
from fedlora.run.directory import RunDirectory
from fedlora.run.setup import prepare
from fedlora.storage.client_state import ClientState
from tests.cli.test_simulate import fedlora
from tests.support.models import make
from tests.support.small_run import begin, site

SMALL = {"strategy": "fedavg", "rounds": 1, "lora": {"rank": 2}, "threads": 1}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return site(tmp_path)


def verdict(run: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "adapter_check.json").read_text())
    return found


@pytest.mark.parametrize("share", [0.2, 0], ids=["evaluation", "a client's examples"])
def test_a_run_ends_with_its_adapter_loaded_afresh(
    place: Path, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin(place, place / "run", **{"data.eval_share": share, "strategy": "fedex_lora", "rounds": 1})
    found = verdict(run)
    assert found["verified"]
    difference = found["difference"]
    assert isinstance(difference, float)
    assert difference < 1e-5


def test_an_adapter_that_is_not_the_evaluated_one_is_said(place: Path) -> None:
    run = RunDirectory(begin(place, place / "run", **SMALL))
    setup = prepare(configuration.build(run.config()))
    other = LoRA(setup.start.A, {m: torch.ones_like(b) for m, b in setup.start.B.items()})
    with pytest.raises(ExportError, match=r"adapter is not what was evaluated: .* differ from the run's"):
        check_adapter(setup, other, run)
    assert not verdict(run.path)["verified"]


def test_a_base_that_is_gone_at_the_end_says_nothing_of_the_adapter(place: Path) -> None:
    run = RunDirectory(begin(place, place / "run", **SMALL))
    setup = prepare(configuration.build(run.config()))
    (place / "model" / "config.json").unlink()
    check_adapter(setup, setup.start, run)
    assert not verdict(run.path)["verified"] and str(verdict(run.path)["said"]).startswith("not loaded afresh: ")


def test_what_a_client_keeps_of_a_round_that_was_cut_off_is_not_evaluated(place: Path) -> None:
    run = RunDirectory(begin(place, place / "run", **{"data.holdout": 0.3}))
    whole = fedlora("evaluate", str(run.path), "--json")
    for client in (0, 1):
        kept = ClientState(run.clients / str(client))
        kept.keep(3, scale(kept.before(3), 5.0))  # rounds are counted from 0 here: the fourth
    again = fedlora("evaluate", str(run.path), "--json")
    assert whole.returncode == 0 and "clients" in whole.stdout and again.stdout == whole.stdout


def test_a_base_that_gives_no_numbers_for_the_data_is_refused_before_a_round(place: Path) -> None:
    """The made-up example does not have the word that the weights cannot stand."""
    folder = make("llama", place / "model")
    net = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        net.model.embed_tokens.weight[5] = torch.inf  # of w1
    net.save_pretrained(folder)
    with pytest.raises(FedloraError, match=r"the weights of model.embed_tokens.weight in the base model hold nan"):
        begin(place, place / "run", **SMALL)
    assert not (place / "run").exists()
    with pytest.raises(FedloraError, match="the loss is nan before any step: the weights of"):
        begin(place, place / "blind", **SMALL | {"data.eval_share": 0.0})


def test_a_resumed_run_is_verified_too(place: Path) -> None:
    run = begin(place, place / "run", **SMALL)
    (run / "adapter_check.json").unlink()
    simulate(resume=run, rounds=2, progress=False)
    assert verdict(run)["verified"]
