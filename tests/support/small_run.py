"""A run of three rounds whose clients keep B for themselves, to be resumed to a fourth."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fedlora import Result, simulate
from tests.support.models import make

Outcome = tuple[dict[str, list[Any]], list[Any]]


def site(folder: Path) -> Path:
    """A folder with a tiny model and the data of two clients."""
    make("llama", folder / "model")
    for client in (0, 1):
        rows = [{"text": f"w{i % 7} w{i % (3 + client)} w{i % 5}"} for i in range(12)]
        (folder / f"client_{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def begin(place: Path, out: Path, **more: Any) -> Path:
    """The directory of a run of three rounds, by the model and the data of a site."""
    settings = {
        "strategy": "fedsa_lora",
        "cohort": 2,
        "rounds": 3,
        "threads": 1,
        "train": {"lr": 0.05, "steps": 1, "batch_size": 4},
        "lora": {"rank": 2},
        "messages": {"up": "int8"},
        "data.eval_share": 0.2,
    }
    made = simulate(model=place / "model", data=place / "client_*.jsonl", out=out, progress=False, **(settings | more))
    return made.folder


def resume(run: Path, rounds: int = 4) -> Result:
    """The run, gone on with."""
    return simulate(resume=run, rounds=rounds, progress=False)


UNLIKE = "seconds", "bytes_down"  # a run that is resumed sends its clients once more what they hold


def outcome(result: Result) -> Outcome:
    """The adapter's numbers, and what the rounds say, but for what differs in every run that is resumed."""
    numbers = {name: t.tolist() for name, t in load_file(result.adapter / "adapter_model.safetensors").items()}
    return numbers, [{key: value for key, value in record.items() if key not in UNLIKE} for record in result.rounds]
