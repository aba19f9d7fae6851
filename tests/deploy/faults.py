"""Does to real federations on this machine what can go wrong, and writes what happened to docs/faults.md.

    python tests/deploy/faults.py                  # all of it; root is needed for the disks that are to be full
    python tests/deploy/faults.py --only worker    # one row, or several with commas; --list names them

Exits 1 where a promise was not kept.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import damage
import events
from calm import calm
from events import Row, Seen, Trial
from lab import ROOT, ROUND, Command, Federation, Late, difference, until

DOC = ROOT / "docs" / "faults.md"
MARKS = "<!-- what follows is written by tests/deploy/faults.py -->", "<!-- up to here -->"
COLUMNS = ("event", "promised", "what happened", "rounds lost", "data lost", "adapter", "kept")
COMMON = {"cohort": 3, "train.steps": 6, "server.eval_every": 0, "server.quorum": 0.5}

AGAIN = "the round is finished by all, and the adapter is that of the undisturbed run"
WITHOUT = "the round is done without it, and it takes part again by itself"
REFUSED = "refused, named, logged; the round is as if that client were not there"
ALONE = {  # rows after which the run is to be as if nothing had happened
    "worker": Row("kill -9 of a client's worker", AGAIN, events.worker),
    "cut-10": Row("network of all clients cut for 10 s", AGAIN, events.cut(10, all=True)),
    "same-key": Row("two clients with one key", "the second is refused; " + AGAIN, events.same_key),
    "superlink": Row("kill -9 of the SuperLink", AGAIN, events.killed("flower-superlink", "server", "started again")),
    "gate": Row(
        "kill -9 of the gate", AGAIN, events.killed("fedlora.server.deployment.gate", "server", "started again")
    ),
    "serverapp": Row("kill -9 of the ServerApp", AGAIN, events.killed("flwr-serverapp", "server", "begun again")),
    "server": Row("kill -9 of `fedlora server`", "started again, it goes on; " + AGAIN, events.server),
    "machine": Row("kill -9 of all of the server at once", "started again, it goes on; " + AGAIN, events.machine),
    "checkpoint": Row(
        "kill -9 of all of the server, newest checkpoint cut in half",
        "started again, it goes on from the one before; " + AGAIN,
        damage.checkpoint,
    ),
    "server-disk": Row(
        "server's disk full",
        "the command ends and says so, or waits; once there is room it goes on; " + AGAIN,
        damage.server_disk,
    ),
}
MISSED = {
    "clientapp": Row("kill -9 of a ClientApp", WITHOUT, events.killed("flwr-clientapp", "client", "")),
    "supernode": Row("kill -9 of a SuperNode", WITHOUT, events.killed("flower-supernode", "client", "")),
    "client-disk": Row("a client's disk full", "said in words; " + WITHOUT, damage.client_disk),
    "clock": Row("a client's clock 10 minutes slow", "said in words at the client; " + WITHOUT, events.clock),
    "hang-up": Row("one client's connections ended in the TLS handshake for 15 s", WITHOUT, events.hang_up),
    "cut-120": Row("network of one client cut for 120 s", WITHOUT, events.cut(120)),
    "cut-120-all": Row(
        "network of all clients cut for 120 s",
        "they are waited for by name, and the round is finished when enough of them are back",
        events.cut(120, all=True),
    ),
}
STATE = {
    "kept": Row(
        "what a client keeps (FedSA) cut in half",
        "noticed and told; the last good one is used; no round lost",
        damage.kept,
    ),
    "answer": Row(
        "kill -9 of the ServerApp, a client's last answer cut in half",
        "noticed; the job is done again, with the same answer",
        damage.answer,
    ),
}
UPLOADS = {
    "nan": Row("upload with a NaN", REFUSED, damage.refused(1, "not finite")),
    "shape": Row("upload of a wrong shape", REFUSED, damage.refused(2, "the job asked for")),
    "round": Row("upload for a wrong round", REFUSED, damage.refused(3, "is of round")),
    "random": Row("upload of random bytes", REFUSED, damage.refused(4, "not what its hash")),
    "same": Row("upload of 2 GB of zeros", REFUSED + "; less than 1 GB of memory", damage.enormous(5)),
    "huge": Row("upload of 2 GB of random bytes", REFUSED + "; less than 1 GB of memory", damage.enormous(6)),
}
ROWS = ALONE | MISSED | STATE | UPLOADS


@dataclass
class Bench:
    """Where federations are made, one after another, and what they showed."""

    folder: Path
    only: Sequence[str]
    seen: dict[str, Seen]
    ports: int

    @contextmanager
    def federation(self, name: str, settings: Mapping[str, Any], small: Sequence[str] = ()) -> Iterator[Federation]:
        """A federation that is not started yet, and is ended whatever happens."""
        port, self.ports = self.ports, self.ports + 10
        small = small if os.geteuid() == 0 else ()
        flags = [word for key, value in (COMMON | settings).items() for word in (f"--{key}", str(value))]
        fed = Federation(self.folder / name, port, flags, small)
        say(f"federation {name} on port {port}, {fed.folder}")
        try:
            yield fed
        finally:
            fed.stop()

    def calm(self, name: str, settings: Mapping[str, Any], absent: int | None = None) -> Path:
        """The checkpoints of the run in which nothing happens."""
        say(f"the run in which nothing happens, for {name}")
        return calm(self.folder / f"{name}-calm", COMMON | {"clients": 3} | settings, absent)

    def wanted(self, rows: dict[str, Row]) -> dict[str, Row]:
        return {name: row for name, row in rows.items() if not self.only or name in self.only}

    def do(self, rows: dict[str, Row], trial: Trial) -> None:
        """One event after another. After one that ended the federation, those that are left have failed, too."""
        for name, row in self.wanted(rows).items():
            began = time.monotonic()
            try:
                seen = row.do(trial)
            except (Late, OSError, subprocess.SubprocessError, StopIteration, IndexError) as e:
                seen = Seen(False, f"{type(e).__name__}: {e}", "", "")
            self.seen[name] = seen
            write({name: seen})
            say(f"{'kept  ' if seen.kept else 'FAILED'} {name}, {time.monotonic() - began:.0f} s: {seen.happened}")
            say(f"       rounds lost {seen.rounds_lost}; data lost {seen.data_lost}; difference {seen.difference}")


def say(words: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {words}", flush=True)


def end(fed: Federation) -> str:
    """Wait for the end; empty, or why it is not the one that was promised."""
    until("the command ends", lambda: fed.server.code is not None, 10 * ROUND)
    if fed.server.code:
        return f"the command ended with code {fed.server.code}: {fed.log_tail()}"
    return "" if (fed.run / "adapter" / "adapter_model.safetensors").exists() else "there is no adapter"


def alone(bench: Bench) -> None:
    """Faults of which nothing is to be seen in the adapter."""
    wanted = bench.wanted(ALONE)
    if not wanted:
        return
    settings = {"rounds": len(wanted) + 4}
    reference = bench.calm("server", settings)
    with bench.federation("server", settings, ["run"]) as fed:
        fed.start()
        bench.do(ALONE, Trial(fed, reference))
        why = end(fed)
        adapter = "adapter/adapter_model.safetensors"
        apart = float("inf") if why else difference(reference.parent / adapter, fed.run / adapter)
    say(f"the end of it all: {why or f'the last adapter is {apart:.1g} from that of the undisturbed run'}")
    if apart > events.EQUAL:
        bench.seen["end"] = Seen(False, f"the final adapter is {apart:.1g} from the undisturbed run's; {why}", "", "")


def missed(bench: Bench) -> None:
    """Faults that cost one client a round; then the run is told to end, and does."""
    if not bench.wanted(MISSED):
        return
    with bench.federation("clients", {"rounds": 500}, ["state-3"]) as fed:
        fed.start()
        bench.do(MISSED, Trial(fed))
        fed.server.stop()
        fed.server.arguments = [*fed.server.arguments, "--rounds", str(len(fed.rounds()) + 2)]
        fed.server.start()
        why = end(fed)
    say(f"the end of it all: {why or 'the run finished'}")
    if why:
        bench.seen["end"] = Seen(False, why, "", "")


def state(bench: Bench) -> None:
    """Files of a client's that are not as they were written."""
    if not bench.wanted(STATE):
        return
    with bench.federation("state", {"rounds": 50, "strategy": "fedsa_lora"}) as fed:
        fed.start()
        bench.do(STATE, Trial(fed))


def uploads(bench: Bench) -> None:
    """A client that means ill; its rounds must be equal to those of a run in which it sends nothing."""
    wanted = bench.wanted(UPLOADS)
    if not wanted:
        return
    settings = {"rounds": max(list(UPLOADS).index(name) for name in wanted) + 1, "server.deadline": 300.0}
    words = [name if name in wanted else "nothing" for name in UPLOADS]
    reference = bench.calm("uploads", settings, absent=events.VICTIM)
    with bench.federation("uploads", settings) as fed, rogue(fed, words):
        fed.start()
        bench.do(UPLOADS, Trial(fed, reference))


@contextmanager
def rogue(fed: Federation, words: Sequence[str]) -> Iterator[None]:
    """Put a worker that forges its answers in the place of the victim's."""
    with tempfile.TemporaryDirectory(prefix="faults-") as short:
        victim, socket = events.VICTIM, Path(short) / "rogue.sock"
        fed.clients[victim] = fed.client(victim, fed.folder / "state-3", "--worker", str(socket))
        arguments = ["--socket", str(socket), "--state", str(fed.folder / "state-3"), "--id", str(victim)]
        worker = Command([*arguments, "--sends", ",".join(words)], fed.folder / "rogue.out")
        worker.start([sys.executable, str(ROOT / "tests" / "deploy" / "rogue.py")])
        try:
            yield
        finally:
            worker.stop()


def table(seen: dict[str, Seen]) -> str:
    """The rows as Markdown; those that were not run this time are as they are in the document."""
    there = DOC.read_text(encoding="utf-8").splitlines() if DOC.exists() else []
    old = {line.split(" | ")[0].removeprefix("| "): line for line in there if line.startswith("| ")}
    lines = [f"| {' | '.join(COLUMNS)} |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    for name, row in ROWS.items():
        if name in seen:
            s = seen[name]
            cells = (row.what, row.promised, s.happened, s.rounds_lost, s.data_lost, s.difference)
            marked = [c.replace("|", "/").replace("\n", " ") or "?" for c in cells]
            lines.append(f"| {' | '.join(marked)} | {'yes' if s.kept else '**FAILED**'} |")
        elif row.what in old:
            lines.append(old[row.what])
    return "\n".join(lines)


def write(seen: dict[str, Seen]) -> None:
    """The table, between its two marks."""
    text = DOC.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    DOC.write_text(f"{before}{MARKS[0]}\n\n{table(seen)}\n\n{MARKS[1]}{after}", encoding="utf-8")


def main() -> int:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="names of rows, with commas between them")
    parser.add_argument("--list", action="store_true", help="the rows' names")
    parser.add_argument("--keep", action="store_true", help="leave the federations' folders")
    parser.add_argument("--port", type=int, default=20000, help="the first of those that are used, some forty")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{name:12} {row.what}" for name, row in ROWS.items()))
        return 0
    only = [name for name in options.only.split(",") if name]
    if unknown := set(only) - set(ROWS):
        parser.error(f"there are no rows {', '.join(sorted(unknown))}; --list names them")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all that was started is ended
    began, bench = time.monotonic(), Bench(Path(tempfile.mkdtemp(prefix="faults-")), only, {}, options.port)
    try:
        for group in (alone, missed, state, uploads):
            try:
                group(bench)
            except Late as e:
                say(f"FAILED: {e}")
                bench.seen["end"] = Seen(False, str(e), "", "")
    finally:
        if not options.keep:
            shutil.rmtree(bench.folder, ignore_errors=True)
    bad = [name for name, s in bench.seen.items() if not s.kept]
    say(f"{len(bench.seen)} rows in {time.monotonic() - began:.0f} s; not kept: {', '.join(bad) or 'none'}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
