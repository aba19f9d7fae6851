"""The cost of privacy for a client: a private step against a plain one, in time and in memory.

    python -m benchmarks.privacy [--repeats 21 --steps 2 --threads 1 2] [--only MiniLM]

A shape and a number of threads are a process of their own, in which the methods take turns: a ratio is the median over
the turns of a method's time over that of the plain step of the same turn. Memory is what a fresh process takes at its
peak above the loaded model. Writes privacy.json.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fedlora.client import training as local_training
from fedlora.data.schema import Schema
from fedlora.encoding.encoder import Example
from fedlora.jobs import PrivacyTerms
from fedlora.lora import LoRA
from fedlora.models.model import Model
from fedlora.sections import GradientEngine, LoRAConfig, ModelConfig, Training
from fedlora.strategy import Job

LABEL = Schema("label", ("text", "label"), ("no", "yes"))
TEXT = Schema("text", ("text",))
MINILM: dict[str, Any] = {
    "num_hidden_layers": 6,
    "hidden_size": 384,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
LLAMA: dict[str, Any] = {
    "num_hidden_layers": 8,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "intermediate_size": 1376,
}
TERMS = PrivacyTerms(
    noise=1.0, clip=1.0, head_share=0.5, rate=1.0, steps=1, delta=1e-5
)  # rate 1: all are drawn, as plainly
WARM = 2  # turns that are not counted


@dataclass(frozen=True)
class Shape:
    """A model, the part of it that is trained, and the size of a batch."""

    schema: Schema
    rank: int
    targets: tuple[str, ...]
    trains: str = "ABH"
    batch: int = 32
    length: int = 64

    def net(self) -> Any:
        """A model of this shape with random weights."""
        if self.schema.labels:
            return BertForSequenceClassification(BertConfig(vocab_size=30522, **MINILM))
        return LlamaForCausalLM(LlamaConfig(vocab_size=8192, pad_token_id=0, **LLAMA))


SHAPES = {
    "MiniLM, query and value, r 8": Shape(LABEL, 8, ("query", "value")),
    "MiniLM, query and value, r 8, B only": Shape(LABEL, 8, ("query", "value"), "BH"),
    "MiniLM, all linear, r 8": Shape(LABEL, 8, ("all-linear",)),
    "MiniLM, all linear, r 64": Shape(LABEL, 64, ("all-linear",)),
    "Llama 8 x 512, all linear, r 8": Shape(TEXT, 8, ("all-linear",), batch=8, length=128),
}


@dataclass(frozen=True, eq=False)
class Workload:
    """A model with its adapter, a batch, and the job of a few steps on it."""

    model: Model
    examples: list[Example]
    job: Job

    def private(self, engine: GradientEngine) -> Job:
        """The job with DP-SGD by one of its engines."""
        return replace(self.job, privacy=replace(TERMS, steps=self.job.training.steps, engine=engine))


def workload(name: str, steps: int) -> Workload:
    """The workload of one of the `SHAPES`, with random weights and random tokens."""
    torch.manual_seed(0)
    shape = SHAPES[name]
    with TemporaryDirectory() as folder:
        shape.net().save_pretrained(folder)
        words().save_pretrained(folder)
        lora = LoRAConfig(rank=shape.rank, targets=shape.targets)
        model = Model(ModelConfig(path=folder, max_length=shape.length), lora, shape.schema, seed=0)
    start = model.get_adapter()
    start = LoRA(start.A, {m: torch.randn(b.shape) / 100 for m, b in start.B.items()}, start.H)

    def example(i: int) -> Example:
        ids = torch.randint(4, 8000, (shape.length,))
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.tensor(i % 2) if shape.schema.labels else ids,
        }

    training = Training(lr=1e-4, batch_size=shape.batch, steps=steps)
    return Workload(model, [example(i) for i in range(shape.batch)], Job(start, trains=shape.trains, training=training))


def words() -> Any:
    """A tokenizer that knows how to pad: the examples are numbers already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer: Any = PreTrainedTokenizerFast  # untyped
    return tokenizer(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


def plainly(s: Workload) -> None:
    local_training.train(s.model, s.job, 0, s.examples, LoRA())


def privately(s: Workload, engine: GradientEngine) -> None:
    local_training.train_privately(s.model, s.private(engine), 0, [[e] for e in s.examples], LoRA())


def by_opacus(s: Workload, ghost: bool) -> None:
    """Opacus's own module and optimizer, with its ordinary noise; ghost: norms first, and a second backward pass."""
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    s.model.set_adapter(s.job.start)
    parameters = s.model.set_trainable(s.job.trains)
    s.model.net.train()
    clips = {"max_grad_norm": TERMS.clip} if ghost else {}
    made: Any = GradSampleModuleFastGradientClipping if ghost else GradSampleModule
    module = made(s.model.net, strict=False, **clips)
    adam = torch.optim.AdamW(parameters, lr=s.job.training.lr)
    steps: Any = (DPOptimizerFastGradientClipping if ghost else DPOptimizer)(
        adam, noise_multiplier=TERMS.noise, max_grad_norm=TERMS.clip, expected_batch_size=len(s.examples)
    )
    for _ in range(s.job.training.steps):
        losses = s.model.losses(s.model.encoder.collate(s.examples))
        loss: Any = DPTensorFastGradientClipping(module, steps, losses, "mean") if ghost else losses.mean()
        loss.backward()
        steps.step()
        steps.zero_grad(set_to_none=True)
    module.cleanup()
    s.model.get_adapter()


METHODS: dict[str, Callable[[Workload], None]] = {
    "plain": plainly,
    "one pass": partial(privately, engine="lora"),
    "hooks in our step": partial(privately, engine="hooks"),
    "Opacus, hooks": partial(by_opacus, ghost=False),
    "Opacus, ghost": partial(by_opacus, ghost=True),
    "one at a time": partial(privately, engine="one"),
}


def timed(shape: str, threads: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step by every method, and over those of the plain step in the same turn."""
    torch.set_num_threads(threads)
    s, load = workload(shape, args.steps), []
    wall: dict[str, list[float]] = {m: [] for m in METHODS}
    cpu: dict[str, list[float]] = {m: [] for m in METHODS}
    for _ in range(WARM + args.repeats):
        for name, method in METHODS.items():
            began, worked = time.perf_counter(), time.process_time()
            method(s)
            wall[name].append((time.perf_counter() - began) / args.steps)
            cpu[name].append((time.process_time() - worked) / args.steps)
        load.append(os.getloadavg()[0])
    wall = {name: took[WARM:] for name, took in wall.items()}
    cpu = {name: took[WARM:] for name, took in cpu.items()}

    def ratio(took: dict[str, list[float]], name: str) -> float:
        return median(x / plain for x, plain in zip(took[name], took["plain"], strict=True))

    rows = {m: {"wall": median(wall[m]), "wall_ratio": ratio(wall, m), "cpu_ratio": ratio(cpu, m)} for m in METHODS}
    return {"load": [round(min(load), 1), round(max(load), 1)], "methods": rows}


def measured(shape: str, method: str, args: argparse.Namespace) -> float:
    """The most memory above the loaded model, in MB, that a few steps take."""
    torch.set_num_threads(1)
    s = workload(shape, args.steps)
    Path("/proc/self/clear_refs").write_text("5")  # from here on; what loading took does not count
    before = _memory("VmRSS")
    METHODS[method](s)
    return (_memory("VmHWM") - before) / 1e3


def _memory(key: str) -> int:
    """kB, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=21, help="turns")
    parser.add_argument("--steps", type=int, default=2, help="in a turn, of every method")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--fresh", type=int, default=3, help="processes for one figure of memory; 0: none")
    parser.add_argument("--only", default="", help="shapes whose names begin so; others keep what they have")
    args = parser.parse_args()
    path = Path(__file__).with_suffix(".json")
    for shape in (n for n in SHAPES if n.startswith(args.only)):
        for key, found in rows(shape, args):
            print(shape, key, json.dumps(found), flush=True)
            record(path, args, shape, key, found)
    show(json.loads(path.read_text()))


def rows(shape: str, args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """All that is measured of a shape, each from a fresh process."""

    def fresh(work: Callable[..., Any], *which: Any) -> Any:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(work, *which, args).result()

    if args.fresh:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back, else figures scatter by a fifth
        yield "memory", {m: median(fresh(measured, shape, m) for _ in range(args.fresh)) for m in METHODS}
    os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)
    for threads in args.threads:
        yield f"{threads} threads", fresh(timed, shape, threads)


def record(path: Path, args: argparse.Namespace, shape: str, key: str, found: Any) -> None:
    """Put a figure in its place among those of the same shapes and machine; others are not kept beside it."""
    about = {
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "shapes": {n: str(asdict(s)) for n, s in SHAPES.items()},
    }
    known = json.loads(path.read_text()) if path.exists() else {}
    if known.get("about") != about:
        known = {"about": about, "found": {}}
    entry = {"date": date.today().isoformat(), "repeats": args.repeats, "steps": args.steps, "value": found}
    known["found"].setdefault(shape, {})[key] = entry
    path.write_text(json.dumps(known, indent=1) + "\n")


def show(results: dict[str, Any]) -> None:
    """A table as Markdown."""
    table = Table(
        "shape", "method", "wall, 1 thread", "CPU, 1 thread", "wall, 2 threads", "peak MB", "peak", box=box.MARKDOWN
    )
    for shape, found in results["found"].items():
        for method in METHODS:
            table.add_row(shape if method == "plain" else "", method, *_times(found, method), *_peak(found, method))
    Console(width=160, highlight=False).print(table)


def _times(found: Mapping[str, Any], method: str) -> list[str]:
    """A method's time over that of the plain step: wall and CPU on one thread, wall on two; empty if not measured."""
    columns = (("1 threads", "wall_ratio"), ("1 threads", "cpu_ratio"), ("2 threads", "wall_ratio"))
    return [f"{found[t]['value']['methods'][method][ratio]:.2f}" if t in found else "" for t, ratio in columns]


def _peak(found: Mapping[str, Any], method: str) -> tuple[str, str]:
    """A method's peak of memory in MB, and over that of the plain step; empty if not measured."""
    if "memory" not in found:
        return "", ""
    peaks = found["memory"]["value"]
    return f"{peaks[method]:.0f}", f"{peaks[method] / peaks['plain']:.2f}"


if __name__ == "__main__":
    main()
