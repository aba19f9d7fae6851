"""What the server's step costs in factors, and what it costs when the matrices are built, at the size of a 7B model.

    python benchmarks/aggregation.py [--clients 50 --rank 16 --modules 64 --dense-modules 1] [--only FLoRIST]

Every row is a process of its own, which draws the uploads and then, in turn, runs the strategy's `aggregate` on the
whole model and the same step on dense matrices, on few modules and extrapolated to all. Writes aggregation.json.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import dense
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from uploads import KINDS, D, Module

from fedlora.lora import LoRA, delta
from fedlora.server.aggregation import Sum
from fedlora.strategy import Client, Strategy, load

REPEATS = 3
PATIENCE = 120.0  # seconds of a dense step on all modules, above which it is measured once


@dataclass(frozen=True)
class Case:
    """A strategy, the same step on dense matrices, and where in its state the result lies."""

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
    strategy: str
    clients: int
    upload_mb: float  # of one client
    peak_mb: float  # above what the process held before the first


def compared(label: str, kind: str, args: argparse.Namespace) -> Row:
    """One row of the first table."""
    case, before = CASES[label], _resident()
    strategy = load(case.name, **case.options)
    modules, state, sent = uploads(strategy, kind, args)
    weights, size, ours, theirs, peak = modules[0].p, sum(_bytes(u) for u in sent), [], [], 0.0
    for _ in range(REPEATS):
        seconds, after = _timed(lambda: strategy.aggregate(state, sent, weights))
        ours.append(seconds)
        peak = peak or (_resident() - before) / size  # before anything dense is built
        got = LoRA(*({"": case.part(after).side(s)["layer.0"]} for s in "AB"))
        del after
        if not theirs or theirs[0] < PATIENCE:
            seconds, built = _timed(lambda: [case.dense(x, strategy) for x in modules])
            theirs.append(seconds * args.modules / len(modules))
    one, other = median(ours), median(theirs)
    true = delta(case.dense(modules[0].double(), strategy) if args.double else built[0])[""]
    off = _apart(built[0], true) if args.double else None
    return Row(label, kind, one, other, other / one, peak, _apart(got, true), off)


def uploads(strategy: Strategy[Any], kind: str, args: argparse.Namespace) -> tuple[list[Module], Any, list[LoRA]]:
    """The modules that are done densely too, a fresh state, and what each client sends: the sides it shares."""
    shared = strategy.client_init(strategy.init(LoRA()), Client(0, 1, args.rank)).shares
    sides: list[dict[str, dict[str, torch.Tensor]]] = [{"A": {}, "B": {}} for _ in range(args.clients)]
    p = [float(x) for x in torch.linspace(1, 2, args.clients) / (1.5 * args.clients)]
    start, few = {}, []
    for i in range(args.modules):
        x = KINDS[kind](torch.Generator().manual_seed(i), p, args.rank)
        start[f"layer.{i}"] = x.start
        for client, a, b in zip(sides, x.A, x.B, strict=True):
            client["A"] |= {f"layer.{i}": a} if "A" in shared else {}
            client["B"] |= {f"layer.{i}": b} if "B" in shared else {}
        few += [x] if i < args.dense_modules else []
    state = strategy.init(LoRA(start, {m: torch.zeros(D, args.rank) for m in start}))
    return few, state, [LoRA(**client) for client in sides]


def streamed(label: str, clients: int, args: argparse.Namespace) -> Stream:
    """One row of the second table: every update is summed as it arrives and forgotten, as in the round loop."""
    before, strategy, total, size = _resident(), load(STREAMED[label]), Sum(), 0
    names = [f"layer.{i}" for i in range(args.modules)]

    def draw(sides: str) -> LoRA:
        A, B = ({m: torch.randn(shape) for m in names} for shape in ((args.rank, D), (D, args.rank)))
        return LoRA(A, B).only(sides)

    state = strategy.init(draw("AB"))
    shared = strategy.client_init(state, Client(0, 1, args.rank)).shares
    for _ in range(clients):
        update = draw(shared)
        total.add(update, 1.0)
        size = _bytes(update)
        del update
    strategy.aggregate(state, [total.mean()], [total.weight])
    return Stream(label, clients, size / 1e6, (_resident() - before) / 1e6)


def _apart(got: LoRA, true: torch.Tensor) -> float:
    return float((delta(got)[""] - true).norm() / true.norm())


def _bytes(lora: LoRA) -> int:
    return sum(t.nbytes for s in "AB" for t in lora.side(s).values())


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    done = work()
    return time.perf_counter() - began, done


def _resident() -> int:
    """The most memory that this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
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
    """Every row that is asked for, with its table and its name there, each from a fresh process."""
    only = tuple(args.only)
    jobs: list[tuple[str, Any, str, Any]] = [
        ("compared", compared, n, kind)
        for n, case in CASES.items()
        if n.startswith(only)
        for kind in case.kinds
        if kind in args.kinds
    ]
    jobs += [("streamed", streamed, n, clients) for n in STREAMED if n.startswith(only) for clients in (10, 50)]
    for table, work, name, what in jobs:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            yield table, f"{name}, {what}", fresh.submit(work, name, what, args).result()


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
