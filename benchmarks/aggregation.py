"""The cost of the server's step in factors, against the same step on dense matrices, at the size of a 7B model.

    python -m benchmarks.aggregation [--clients 50 --rank 16 --modules 64 --dense-modules 1] [--only FLoRIST]

Every row is a process of its own, which draws the uploads and then, in turn, runs the strategy's `aggregate` on the
whole model and the same step on dense matrices, on few modules and extrapolated to all. Writes aggregation.json.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import dense
from benchmarks.uploads import KINDS, D, Module
from fedlora.lora import LoRA, delta
from fedlora.server.aggregation import WeightedSum
from fedlora.strategy import Client, Strategy, load

REPEATS = 3
PATIENCE = 120.0  # seconds of a dense step on the dense modules, above which it is measured once


@dataclass(frozen=True)
class Case:
    """A strategy, the same step on dense matrices, and the place of the result in the strategy's state."""

    name: str
    dense: Callable[[Module, Any], LoRA]
    part: Callable[[Any], LoRA]
    options: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ("trained",)  # of uploads: all where the work depends on what is in them


CASES = {
    "FedEx-LoRA, residual": Case("fedex_lora", dense.fedex, lambda s: s.parts[-1]),
    "FedEx-LoRA, residual in factors": Case("fedex_lora", dense.fedex_in_factors, lambda s: s.parts[-1]),
    "FedEx-LoRA, residual of rank 16": Case(
        "fedex_lora", dense.fedex_truncated, lambda s: s.parts[-1], {"rank": 16}, tuple(KINDS)
    ),
    "FedSVD": Case("fedsvd", dense.fedsvd, lambda s: s.lora),
    "FlexLoRA": Case("flexlora", dense.flexlora, lambda s: s.lora, kinds=tuple(KINDS)),
    "FLoRIST": Case("florist", dense.florist, lambda s: s.parts[-1], kinds=tuple(KINDS)),
    "LoRA-FAIR, least squares": Case("lora_fair", dense.fair, lambda s: s),
    "LoRA-FAIR, cosine": Case("lora_fair", dense.fair_cosine, lambda s: s, {"form": "cosine"}),
    "FLoRA": Case("flora", dense.flora, lambda s: s.stacks[-1]),
}
STREAMED = {"FedIT": "fedavg", "FFA-LoRA": "ffa_lora", "FedSA-LoRA": "fedsa_lora", "FedSVD": "fedsvd"}


@dataclass(frozen=True)
class Row:
    """A line of the first table: a strategy on one kind of uploads, in factors and dense."""

    strategy: str
    uploads: str
    seconds: float  # of `aggregate` on the whole model, median
    dense_seconds: float  # median, of the dense modules times their share in all
    faster: float
    peak: float  # memory of the uploads and all that `aggregate` holds, over that of the uploads
    error: float  # relative Frobenius distance of the first module's products, with --double from a step in float64
    dense_error: float | None  # with --double: of the dense step in float32 from that


@dataclass(frozen=True)
class Stream:
    """A line of the second table: memory where updates are summed as they arrive."""

    strategy: str
    clients: int
    upload_mb: float  # of one client
    peak_mb: float  # above what the process held before the first


def compared(label: str, kind: str, args: argparse.Namespace) -> Row:
    """One row of the first table."""
    case, before = CASES[label], _resident()
    strategy = load(case.name, **case.options)
    modules, state, sent = uploads(strategy, kind, args)
    upload_bytes = sum(_bytes(upload) for upload in sent)

    def in_factors() -> Any:
        return strategy.aggregate(state, sent, modules[0].p)

    def densely() -> list[LoRA]:
        return [case.dense(module, strategy) for module in modules]

    after = case.part(in_factors())
    peak = (_resident() - before) / upload_bytes  # before anything dense is built
    got = LoRA({"": after.A["layer.0"]}, {"": after.B["layer.0"]})
    del after
    seconds, dense_seconds, built = _in_turn(in_factors, densely)
    dense_seconds *= args.modules / len(modules)
    exact = delta(case.dense(modules[0].double(), strategy) if args.double else built[0])[""]
    return Row(
        strategy=label,
        uploads=kind,
        seconds=seconds,
        dense_seconds=dense_seconds,
        faster=dense_seconds / seconds,
        peak=peak,
        error=_apart(got, exact),
        dense_error=_apart(built[0], exact) if args.double else None,
    )


def _in_turn(ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[float, float, Any]:
    """Median seconds of two calls that take turns, and the second one's last result; a slow one runs once."""
    seconds: list[float] = []
    their_seconds: list[float] = []
    for _ in range(REPEATS):
        seconds.append(_timed(ours)[0])
        if not their_seconds or their_seconds[0] < PATIENCE:
            took, result = _timed(theirs)
            their_seconds.append(took)
    return median(seconds), median(their_seconds), result


def uploads(strategy: Strategy[Any], kind: str, args: argparse.Namespace) -> tuple[list[Module], Any, list[LoRA]]:
    """The modules that are done densely too, a fresh state, and what each client sends: the sides it shares."""
    shared = strategy.client_init(strategy.init(LoRA()), Client(id=0, examples=1, rank=args.rank)).shares
    clients = [LoRA({}, {}) for _ in range(args.clients)]
    p = [float(x) for x in torch.linspace(1, 2, args.clients) / (1.5 * args.clients)]
    start, densely = {}, []
    for i in range(args.modules):
        module = KINDS[kind](torch.Generator().manual_seed(i), p, args.rank)
        start[f"layer.{i}"] = module.start
        drawn = [LoRA({f"layer.{i}": a}, {f"layer.{i}": b}) for a, b in zip(module.A, module.B, strict=True)]
        clients = [new.only(shared).over(client) for new, client in zip(drawn, clients, strict=True)]
        if i < args.dense_modules:
            densely.append(module)
    state = strategy.init(LoRA(start, {m: torch.zeros(D, args.rank) for m in start}))
    return densely, state, clients


def streamed(label: str, clients: int, args: argparse.Namespace) -> Stream:
    """One row of the second table: every update is summed as it arrives and forgotten, as in the round loop."""
    before = _resident()
    strategy = load(STREAMED[label])
    total = WeightedSum()
    names = [f"layer.{i}" for i in range(args.modules)]

    def draw(sides: str) -> LoRA:
        A, B = ({m: torch.randn(shape) for m in names} for shape in ((args.rank, D), (D, args.rank)))
        return LoRA(A, B).only(sides)

    state = strategy.init(draw("AB"))
    shared = strategy.client_init(state, Client(id=0, examples=1, rank=args.rank)).shares
    upload_bytes = 0
    for _ in range(clients):
        update = draw(shared)
        total.add(update, 1.0)
        upload_bytes = _bytes(update)
        del update
    strategy.aggregate(state, [total.mean()], [total.weight])
    return Stream(label, clients, upload_mb=upload_bytes / 1e6, peak_mb=(_resident() - before) / 1e6)


def _apart(got: LoRA, exact: torch.Tensor) -> float:
    """The relative Frobenius distance of a product from the exact one."""
    return float((delta(got)[""] - exact).norm() / exact.norm())


def _bytes(lora: LoRA) -> int:
    return sum(t.nbytes for _, _, t in lora.matrices())


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and its result."""
    began = time.perf_counter()
    done = work()
    return time.perf_counter() - began, done


def _resident() -> int:
    """The most memory that this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"clients": 50, "rank": 16, "modules": 64, "dense-modules": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="of uploads")
    parser.add_argument("--double", action="store_true", help="compare with a dense step in float64: minutes a row")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose names begin so; others stay as they are")
    args = parser.parse_args()
    path = Path(__file__).with_suffix(".json")
    for table, key, row in rows(args):
        print(row, flush=True)
        record(path, args, table, key, asdict(row))
    show(json.loads(path.read_text()))


def rows(args: argparse.Namespace) -> Iterator[tuple[str, str, Row | Stream]]:
    """Yield every row that is asked for, with its table and its name there, each from a fresh process."""
    for table, work, name, variant in _jobs(args):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            yield table, f"{name}, {variant}", fresh.submit(work, name, variant, args).result()


def _jobs(args: argparse.Namespace) -> list[tuple[str, Any, str, Any]]:
    """Table, function, name and variant of every row that is asked for."""
    pairs = [(name, kind) for name in _chosen(CASES, args.only) for kind in CASES[name].kinds if kind in args.kinds]
    jobs: list[tuple[str, Any, str, Any]] = [("compared", compared, name, kind) for name, kind in pairs]
    jobs += [("streamed", streamed, name, n) for name in _chosen(STREAMED, args.only) for n in (10, 50)]
    return jobs


def _chosen(names: Iterable[str], only: Sequence[str]) -> list[str]:
    """The names that begin with one of those asked for."""
    return [name for name in names if name.startswith(tuple(only))]


def record(path: Path, args: argparse.Namespace, table: str, key: str, row: dict[str, Any]) -> None:
    """Put a row in its place among those of the same arguments and machine; others are not kept beside it."""
    about = {k: v for k, v in vars(args).items() if k not in ("only", "kinds")}
    about |= {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    known = json.loads(path.read_text()) if path.exists() else {}
    if known.get("about") != about:
        known = {"about": about, "compared": {}, "streamed": {}}
    known[table][key] = row | {"date": date.today().isoformat()}
    path.write_text(json.dumps(known, indent=1) + "\n")


def show(results: dict[str, Any]) -> None:
    """Both tables, as Markdown."""
    console = Console(width=160, highlight=False)
    first = Table("strategy", "uploads", "in factors", "dense", "times faster", "peak", "error", "dense error")
    for r in results["compared"].values():
        took = f"{r['seconds']:.2f} s", f"{r['dense_seconds']:.0f} s", f"{r['faster']:.0f}"
        errors = f"{r['error']:.0e}", f"{r['dense_error']:.0e}" if r["dense_error"] is not None else ""
        first.add_row(r["strategy"], r["uploads"], *took, f"{r['peak']:.2f} x uploads", *errors)
    second = Table("strategy", "clients", "one upload", "peak")
    for r in results["streamed"].values():
        second.add_row(r["strategy"], str(r["clients"]), f"{r['upload_mb']:.1f} MB", f"{r['peak_mb']:.0f} MB")
    for table in (first, second):
        table.box = box.MARKDOWN
        console.print(table)


if __name__ == "__main__":
    main()
