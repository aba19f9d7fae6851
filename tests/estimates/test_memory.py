"""The memory that is estimated is held to the peak of a process that really runs."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from fedlora.api import checked_settings, simulate
from fedlora.estimates.estimate import estimate
from tests.support.forked import FORKS, preload
from tests.support.models import tokenizer

preload("tests.estimates.test_memory", "fedlora.server.run", "fedlora.simulations.stacked", "torch.utils.tensorboard")
SETTINGS = {
    "clients": 2,
    "cohort": 2,
    "rounds": 1,
    "threads": 1,
    "train.steps": 1,
    "train.batch_size": 16,
    "data.eval_share": 0.1,
    "data.eval_limit": 8,
    "model.max_length": 64,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of ten million numbers, and rows that are as long as it takes."""
    folder = tmp_path_factory.mktemp("site")
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=8000, max_position_embeddings=64, pad_token_id=0, **shape)).save_pretrained(
        folder / "model"
    )
    tokenizer().save_pretrained(folder / "model")
    rows = [{"text": " ".join(f"w{(i * n) % 59}" for n in range(62))} for i in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(place: Path, engine: str) -> dict[str, Any]:
    return SETTINGS | {"model.path": str(place / "model"), "data.path": str(place / "data.jsonl"), "engine": engine}


def in_process(do: Callable[..., None], *args: Any) -> Any:
    """What a function writes as JSON to the path that it is given last, in a process of its own."""
    out = Path(args[0]) / f"{do.__name__}-{args[1]}.json"
    process = FORKS.Process(target=do, args=(*args, out))
    process.start()
    process.join()
    assert process.exitcode == 0
    return json.loads(out.read_text())


def run(place: Path, engine: str, out: Path) -> None:
    """Run it, and write the peak of this process's memory, in bytes."""
    simulate(settings(place, engine), out=place / f"run-{engine}", progress=False)
    status = Path("/proc/self/status").read_text()
    out.write_text(str(1024 * int(status.partition("VmHWM:")[2].split()[0])))


def plan(place: Path, engine: str, out: Path) -> None:
    found = estimate(checked_settings(settings(place, engine), {}))
    out.write_text(json.dumps(found.record()))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read as Linux tells it")
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_the_peak_of_a_run_is_as_estimated_within_a_fifth(engine: str, place: Path) -> None:
    found, took = in_process(plan, place, engine), in_process(run, place, engine)
    assert abs(found["peaks"]["simulation"] - took) < 0.2 * took
    training, begins = found["memory"]["step"], found["memory"]["begins"]
    assert training > 80e6 and abs(training - (took - begins)) < 0.4 * (took - begins), "not the libraries' share alone"
