"""The pages for those who come from other libraries name what these libraries, and fedlora, have."""

import dataclasses
import inspect
import re
from pathlib import Path

import flwr.client.mod
import flwr.server.workflow
import flwr.serverapp.strategy
import peft
import pytest
import transformers
from flwr.serverapp.strategy import FedAvg

from fedlora.config import SHORT, section_meanings, settings

DOCS = Path(__file__).parent.parent / "docs"
KEYS = {setting.key for setting in settings()}


def columns(page: str) -> list[tuple[str, str]]:
    """The first two cells of each row of the page's table of names."""
    rows = re.findall(r"^\| (.+?) \| (.+?) \|", (DOCS / page).read_text(), re.MULTILINE)
    return [row for row in rows if "---" not in row[0]]


@pytest.mark.parametrize("page", ["from-trl.md", "from-flower.md", "from-nvflare.md"])
def test_the_settings_that_a_page_names_are_settings(page: str) -> None:
    cells = " ".join(ours for _, ours in columns(page))
    dotted = set(re.findall(r"`([a-z]+\.[a-z_]+)", cells))
    named = {key for key in dotted if key.partition(".")[0] in section_meanings()}
    assert named and named <= KEYS
    assert set(re.findall(r"`--([a-z_]+)", cells)) <= {*KEYS, *SHORT, "out", "resume", "config"}


def test_the_names_of_transformers_and_peft_are_theirs() -> None:
    theirs = {
        f.name for library in (transformers.TrainingArguments, peft.LoraConfig) for f in dataclasses.fields(library)
    }
    of_trl = {"lora_r", "max_length", "beta", "load_in_4bit", "compute_metrics", "peft_config", "get_peft_model"}
    named = {name for cell, _ in columns("from-trl.md") for name in re.findall(r"`([a-z_0-9]+)", cell)}
    assert named <= theirs | of_trl, named - theirs - of_trl


def test_the_names_of_flower_are_its_own() -> None:
    cells = " ".join(cell for cell, _ in columns("from-flower.md"))
    parameters = inspect.signature(FedAvg.__init__).parameters
    assert set(re.findall(r"`(min_\w+|\w+_aggr_fn)`", cells)) <= set(parameters)
    assert {"configure_train", "aggregate_train"} <= set(dir(flwr.serverapp.strategy.Strategy))
    for module, name in (
        (flwr.client.mod, "LocalDpMod"),
        (flwr.server.workflow, "SecAggPlusWorkflow"),
        (flwr.serverapp.strategy, "DifferentialPrivacyServerSideFixedClipping"),
    ):
        assert f"`{name}`" in cells and hasattr(module, name)
