"""Every architecture's two rounds, and whether the adapter that they deliver gives the evaluated numbers by PEFT alone.

    OMP_NUM_THREADS=1 python -m benchmarks.architectures [llama bert ...] [--out benchmarks/architectures.json]

Each is tiny and random (`tiny_models.py`), learns what it can be used for, and runs by FedAvg with the usual targets
and by FedEx-LoRA, which has an offset, on all linear layers. The delivered adapter is then loaded by PEFT on a base
that transformers has loaded afresh, and asked about one row at a time: what comes out must be the run's evaluation,
which is made of batches. A model that cannot do so must be refused in a sentence before the first round. Writes the
JSON after every run, where what is right is not done again, and the table in docs/models.md when all are done.
"""

import argparse
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tiny_models import ARCHITECTURES, AUTO, SIDE, WORDS, Architecture, Task, save
from fedlora import Result, simulate
from fedlora.errors import FedloraError
from fedlora.run.directory import RunDirectory
from fedlora.run.setup import mute_transformers

CLASSES = ("no", "yes")
RUNS: Mapping[str, Mapping[str, Any]] = {  # what is run of every model, by the heading of its column
    "FedAvg": {"strategy": "fedavg"},
    "FedEx-LoRA, all-linear": {"strategy": "fedex_lora", "lora.targets": ("all-linear",)},
}
SETTINGS: Mapping[str, Any] = {
    "clients": 2,
    "cohort": 2,
    "rounds": 2,
    "threads": 1,
    "lora.rank": 2,
    "train.lr": 0.02,
    "train.batch_size": 4,
    "model.max_length": 32,
    "data.partition": "iid",
}
LIMIT = 1e-4  # of the loss, by which two computations in float32 may differ
OUTCOMES = Path(__file__).with_suffix(".json")
DOCS = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- made by python -m benchmarks.architectures -->\n", "<!-- end -->\n"

Verdict = Literal["right", "refused", "wrong"]


@dataclass(frozen=True)
class ArchitectureResult:
    """What became of one model in one run."""

    model: str  # transformers' class
    architecture: str
    task: Task
    run: str
    verdict: Verdict
    says: str = ""  # why it was refused, or what is wrong
    before: float = 0.0  # the loss that the run told before the first round
    after: float = 0.0  # the loss that it told after the last
    delivered: float = 0.0  # the loss of the delivered adapter by transformers and PEFT alone

    @property
    def key(self) -> tuple[str, Task, str]:
        return (self.architecture, self.task, self.run)


def try_model(architecture: Architecture, task: Task, run: str, place: Path) -> ArchitectureResult:
    """Save the model in `place`, run it there, and compare what was delivered with what was evaluated."""
    folder = save(architecture, task, place / "model")
    train, heldout = _data(task, place)
    out = place / run
    known: dict[str, Any] = {"architecture": architecture.name, "task": task, "run": run, "model": _name(folder, task)}
    try:
        result = _simulate(folder, train, heldout, out, RUNS[run])
    except FedloraError as e:
        begun = (out / "rounds.jsonl").exists() and RunDirectory(out).records()
        return ArchitectureResult(**known, verdict="wrong" if begun else "refused", says=_without(place, str(e)))
    except Exception as e:  # a traceback is what this table looks for
        return ArchitectureResult(**known, verdict="wrong", says=f"{type(e).__name__}: {e}")
    return _compared(known, result, delivered_loss(folder, result, heldout, task))


def _without(place: Path, says: str) -> str:
    """The sentence without the temporary folder that it names."""
    return says.replace(f" {place / 'model'}", "").replace(f"{place}/", "")


def _simulate(folder: Path, train: Path, heldout: Path, out: Path, more: Mapping[str, Any]) -> Result:
    where: dict[str, Any] = {"model.path": folder, "data.path": train, "data.eval": heldout}
    return simulate(out=out, progress=False, **SETTINGS, **where, **more)


def _compared(known: Mapping[str, Any], result: Result, delivered: float) -> ArchitectureResult:
    before, after = result.before["loss"], result.evaluation["loss"]
    losses: dict[str, Any] = {"before": before, "after": after, "delivered": delivered}
    if abs(delivered - after) > LIMIT * after:
        return ArchitectureResult(**known, **losses, verdict="wrong", says="the delivered adapter gives another loss")
    if abs(before - after) <= LIMIT * after:
        return ArchitectureResult(**known, **losses, verdict="wrong", says="nothing was learned")
    return ArchitectureResult(**known, **losses, verdict="right")


@torch.no_grad()
def delivered_loss(folder: Path, result: Result, heldout: Path, task: Task) -> float:
    """The mean loss over the targets of these rows, one row at a time, by transformers and PEFT alone."""
    import transformers
    from peft import PeftModel

    classes = _labels(result)
    options = {"num_labels": len(classes), "ignore_mismatched_sizes": True} if classes else {}
    torch.manual_seed(1)  # a head that was not delivered is another one
    base = getattr(transformers, AUTO[task]).from_pretrained(folder, **options)
    loading: Any = PeftModel  # untyped
    net = loading.from_pretrained(base, str(result.adapter)).eval()
    losses = [_losses(net, *_asked(folder, row, classes, task)) for row in _read(heldout)]
    return float(torch.cat(losses).mean())


def _labels(result: Result) -> tuple[str, ...]:
    """The classes in the order of the model's outputs."""
    return tuple(RunDirectory(result.folder).config().get("data.labels", ()))


def _asked(
    folder: Path, row: Mapping[str, str], classes: Sequence[str], task: Task
) -> tuple[dict[str, Tensor], Tensor]:
    """A row's inputs and what is to be predicted, by transformers' own processors."""
    from PIL import Image
    from transformers import AutoImageProcessor, AutoTokenizer

    if task == "image":
        loading: Any = AutoImageProcessor  # untyped
        pixels = loading.from_pretrained(folder)(images=[Image.open(row["image"])], return_tensors="pt")
        return dict(pixels), torch.tensor([classes.index(row["label"])])
    inputs = dict(AutoTokenizer.from_pretrained(folder)(row["text"], return_tensors="pt"))
    target = torch.tensor([classes.index(row["label"])]) if classes else inputs["input_ids"][0, 1:]
    return inputs, target


def _losses(net: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
    """The loss at each target: one of a classifier, one of every token but the first of a language model."""
    scores = net(**inputs).logits.float()
    return F.cross_entropy(scores if scores.dim() == 2 else scores[0, :-1], targets, reduction="none")


def _name(folder: Path, task: Task) -> str:
    """The name of the class that transformers would load this folder as; where it has none, of that which was saved."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    auto: Any = getattr(transformers, AUTO[task])
    known: dict[Any, Any] = auto._model_mapping
    if type(config) not in known:
        return str(config.architectures[0])
    found = known[type(config)]  # several for DeiT, of which the first is made
    return str((found[0] if isinstance(found, tuple) else found).__name__)


def _data(task: Task, place: Path) -> tuple[Path, Path]:
    """A file to train on and one to evaluate on, of rows of unlike lengths."""
    return _write(place / "train.jsonl", _examples(task, place, 12)), _write(
        place / "eval.jsonl", _examples(task, place, 7)
    )


def _examples(task: Task, place: Path, n: int) -> Iterator[dict[str, str]]:
    draw = Random(n)
    for i in range(n):
        label = {"label": CLASSES[i % 2]}
        if task == "image":
            yield {"image": str(_picture(place / f"{n}-{i}.png", draw))} | label
        else:
            yield {"text": " ".join(draw.choices(WORDS, k=3 + 2 * i))} | (label if task == "classify" else {})


def _picture(path: Path, draw: Random) -> Path:
    from PIL import Image

    Image.frombytes("RGB", (SIDE, SIDE), draw.randbytes(3 * SIDE * SIDE)).save(path)
    return path


def _write(path: Path, rows: Iterable[Mapping[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(outcomes: Sequence[ArchitectureResult]) -> str:
    """The outcomes in Markdown, a line for every model that was run."""
    lines = [f"| {' | '.join(('model', *RUNS))} |", f"|{'---|' * (1 + len(RUNS))}"]
    models = dict.fromkeys((o.architecture, o.task, o.model) for o in outcomes)
    found = {o.key: o for o in outcomes}
    for architecture, task, model in models:
        cells = [_cell(found.get((architecture, task, run))) for run in RUNS]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(outcome: ArchitectureResult | None) -> str:
    if outcome is None:
        return ""
    return "runs" if outcome.verdict == "right" else f"{outcome.verdict}: {outcome.says}".replace("|", "\\|")


def _all(names: Sequence[str]) -> Iterator[tuple[Architecture, Task, str]]:
    """Yield what is to be tried: of all architectures, or of those that are named."""
    for architecture in ARCHITECTURES:
        if not names or architecture.name in names:
            yield from ((architecture, task, run) for task in architecture.tasks for run in RUNS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures as transformers names them; none: all")
    parser.add_argument("--out", type=Path, default=OUTCOMES)
    options = parser.parse_args()
    mute_transformers()
    warnings.simplefilter("ignore")
    outcomes = {o.key: o for o in kept(options.out)}
    for architecture, task, run in _all(options.names):
        key = (architecture.name, task, run)
        if key not in outcomes or outcomes[key].verdict != "right":
            with TemporaryDirectory() as place:
                outcomes[key] = o = try_model(architecture, task, run, Path(place))
            print(
                f"{o.verdict:8} {o.model:40} {run:24} {o.before:.4f} {o.after:.4f} {o.delivered:.4f} {o.says}",
                flush=True,
            )
            options.out.write_text(
                json.dumps([asdict(o) for o in outcomes.values()], indent=1) + "\n", encoding="utf-8"
            )
    if not options.names:
        write_docs(list(outcomes.values()))


def kept(path: Path) -> list[ArchitectureResult]:
    """The outcomes of earlier runs; none where there is no file."""
    if not path.exists():
        return []
    return [ArchitectureResult(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def write_docs(outcomes: Sequence[ArchitectureResult]) -> None:
    """Put the table in its place in docs/models.md."""
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    DOCS.write_text(before + BEGIN + "\n" + table(outcomes) + "\n" + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
