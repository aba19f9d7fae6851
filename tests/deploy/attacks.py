"""Attacks a real federation on this machine, and writes what each side's operator saw to docs/threat-model.md.

    python tests/deploy/attacks.py

A private run of three clients, with TLS and keys. What a server that lies could send goes to the first client's worker,
over the socket through which all that a server sends must pass; the third client is registered and lies; strangers hold
the gate's door. Exits 1 where an attack came through.
"""

import json
import socket
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from flwr.app import RecordDict
from lab import NAMES, ROOT, Command, Federation, until

from fedlora import config
from fedlora.client.deployment import relay
from fedlora.deployment.processes import free_port
from fedlora.jobs import Job, PrivacyTerms
from fedlora.lora import LoRA
from fedlora.messages import codec, envelope
from fedlora.messages.agreement import RunAgreement
from fedlora.messages.parts import Parts
from fedlora.run.agreement import agreement_for_clients
from fedlora.run.setup import for_server
from fedlora.sections import Training

DOC = ROOT / "docs" / "threat-model.md"
MARKS = "<!-- what follows is written by tests/deploy/attacks.py -->", "<!-- up to here -->"
SECRET = "100-45-6000"
RUN = {
    "strategy": "fedsa_lora",
    "rounds": 9,
    "clients": 3,
    "cohort": 3,
    "dp.epsilon": 3.0,
    "dp.unit": "row",
    "train.steps": 2,
}
OWN = ["--data.text", "note", "--dp.epsilon", "3", "--client.egress", "A *", "--threads", "1"]
LIES = "blank,many,none,loss,double,nan,nothing"  # what the third client sends, round by round
HARMLESS = {"many": "weighed by what it said when it joined", "double": "taken as float32"}  # and not refused
TRICKLE = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n"
HEAD = "| who | attack | told | what the other side's operator saw | held |\n|---|---|---|---|---|\n"
TERMS = PrivacyTerms(noise=1.0, clip=1.0, head_share=0.5, rate=0.1, steps=2, delta=1e-5)


@dataclass(frozen=True)
class Seen:
    """What came of an attack."""

    attack: str
    by: str
    other: str  # what the attacker was told
    operator: str  # what the operator of the side under attack saw
    held: bool


class LyingServer:
    """Whatever a server may send to a client's worker, in a run of its own."""

    def __init__(self, worker: Path, log: Path) -> None:
        self._socket, self._log = worker, log
        self.setup = for_server(config.build(RUN), 3)
        self.agreement = agreement_for_clients(self.setup)

    def offer(self, run: str, **settings: Any) -> str:
        """Offer a run with these settings changed; what the client says."""
        changed = {key.replace("__", "."): value for key, value in settings.items()}
        offered = replace(self.agreement, settings={**self.agreement.settings, **changed})
        return self._ask("who", run, codec.pack_join_request(offered))

    def job(self, run: str, kind: str = "train", agreement: RunAgreement | None = None, **fields: Any) -> str:
        """Send a job with these fields changed; what the client says."""
        plain = Job(self.setup.start, trains="AB", shares="A", privacy=TERMS, metrics=False, rounds=9)
        job = replace(plain, **{"training": Training(steps=2), **fields})
        parts = Parts().of(job)
        return self._ask(kind, run, codec.JobEncoder((agreement or self.agreement).hash).job(job, parts, parts))

    def raw(self, run: str, changes: Callable[[dict[str, Any]], None]) -> str:
        """Send a job whose head was changed after it was packed; what the client says."""
        plain = Job(self.setup.start, trains="AB", shares="A", privacy=TERMS, metrics=False, rounds=9)
        parts = Parts().of(plain)
        records = codec.JobEncoder(self.agreement.hash).job(plain, parts, parts)
        head = json.loads(str(records.config_records["head"]["json"]))
        changes(head)
        records.config_records["head"]["json"] = json.dumps(head)
        return self._ask("train", run, records)

    def said(self) -> str:
        """The last line of the worker's log that says something failed."""
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if " failed: " in line]
        return lines[-1].partition(" ")[2] if lines else ""

    def _ask(self, kind: str, run: str, records: RecordDict) -> str:
        try:
            answer = relay.ask(f"unix:{self._socket}", kind, envelope.stamp(records, run), 30)
        except relay.WorkerFailed as e:
            return f"{e.code}: {e}"
        return f"ANSWERED: {envelope.unpack(answer).head[:120]}"


def by_the_server(server: LyingServer, ledger: Path) -> Iterator[Seen]:
    """Every attack of a server on a client's records, ledger and private side."""

    def seen(attack: str, answer: str, *, answered: bool = False) -> Seen:
        held = answer.startswith("ANSWERED") == answered and SECRET not in answer and "ssn" not in answer
        told = "its introduction, as ever" if answered else answer.partition(":")[0]
        return Seen(attack, "server", told, "the run's terms, in words" if answered else server.said(), held)

    yield seen("a column of records as the label", server.offer("a1", data__label="ssn", model__task="classify"))
    yield seen("another text column than its own, which stays", server.offer("a2", data__text="ssn"), answered=True)
    yield seen("blocks as the unit of privacy", server.offer("a3", dp__unit="example"))
    yield seen("a base model of its choice", server.offer("a4", model__path="/etc"))
    yield seen("a run without DP-SGD", server.offer("a5", dp__epsilon=float("inf")))
    yield seen("a path on the client's disk", server.offer("a6", data__path="/etc/passwd"))
    server.offer("b1")
    before = ledger.read_text() if ledger.exists() else ""
    yield seen("the agreed run, again with other terms", server.offer("b1", lora__rank=16))
    yield seen("scores on held-out records", server.job("b1", "evaluate"))
    yield seen("the side that stays with the client", server.job("b1", shares="AB"))
    yield seen("a start without the side that is asked for", server.job("b1", start=LoRA(B=server.setup.start.B)))
    yield seen("a job without DP-SGD", server.job("b1", privacy=None))
    for name, value in (("steps", -1000), ("steps", 0), ("noise", float("nan")), ("rate", 2.0), ("clip", -1.0)):
        yield seen(
            f"a job with {name} = {value}",
            server.raw("b1", lambda head, n=name, v=value: head["privacy"].update({n: v})),
        )
    yield seen("a job of another agreement", server.job("b1", agreement=replace(server.agreement, shares="AB")))
    yield seen("a run named as the folder of ledgers", server.offer("ledgers"), answered=True)
    after = ledger.read_text() if ledger.exists() else ""
    yield Seen("all of these together", "server", "nothing", "the ledger is as it was", before == after)


def by_a_client(fed: Federation) -> Iterator[Seen]:
    """What the server's operator sees of the third client's lies."""
    for n, word in enumerate(LIES.split(","), 1):
        line = fed.wait_round(n, 300)
        reason = line["failed"].get("2", "taken")
        said = HARMLESS.get(word, reason) if reason == "taken" else reason
        bounded = reason != "taken" or word in HARMLESS
        yield Seen(
            f"an answer: {word}", "client", "nothing", f"client-3: {said[:120]}", line["answered"] >= 2 and bounded
        )


@contextmanager
def strangers(port: int, keys: Path) -> Iterator[None]:
    """Two addresses without a key hold 64 connections open, each with a body that trickles in."""
    trust, ended = ssl.create_default_context(cafile=str(keys / "ca.crt")), Event()

    def trickle(address: str) -> None:
        while not ended.is_set():
            with (
                suppress(OSError),
                socket.create_connection(("127.0.0.1", port), 10, (address, 0)) as raw,
                trust.wrap_socket(raw, server_hostname="localhost") as line,
            ):
                line.sendall(TRICKLE)
                while not ended.wait(1):
                    line.sendall(b"x")
            ended.wait(0.5)

    for i in range(64):
        Thread(target=trickle, args=(f"127.0.0.{2 + i % 2}",), daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def by_a_stranger(fed: Federation, port: int) -> Iterator[Seen]:
    n = len(fed.rounds()) + 1
    with strangers(port, fed.folder / "creds" / "server"):
        began = time.monotonic()
        line = fed.wait_round(max(n, len(LIES.split(",")) + 1), 300)
    words = f"round {line['round']} had {line['answered']} of 3 after {time.monotonic() - began:.0f} s"
    yield Seen(
        "64 connections that trickle, from two addresses", "stranger", "401 or cut off", words, line["answered"] >= 2
    )


def write_notes(path: Path) -> None:
    rows = [{"note": f"patient {i} was seen and all was well {i * 7}", "ssn": f"100-45-{6000 + i}"} for i in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def play(folder: Path) -> list[Seen]:
    """All attacks on one federation."""
    port = free_port()
    settings = [word for key, value in RUN.items() for word in (f"--{key}", str(value))]
    fed = Federation(folder, port, [*settings, "--server.quorum", "0.5", "--server.eval_every", "0"])
    write_notes(folder / "notes.jsonl")
    first, liar = folder / "worker-1.sock", folder / "worker-3.sock"
    keys = ["--credentials", str(folder / "creds/clients" / NAMES[0])]
    own = ["--state", str(folder / "state-1"), "--data", str(folder / "notes.jsonl"), *OWN]
    worker = Command(["worker", "--socket", str(first), *keys, *own], folder / "worker-1.out")
    rogue = ["--socket", str(liar), "--state", str(folder / "state-3"), "--id", "2", "--sends", LIES]
    false = Command(rogue, folder / "worker-3.out")
    fed.clients[0] = fed.client(0, folder / "state-1", "--worker", str(first), "--dp.epsilon", "3")
    fed.clients[2] = fed.client(2, folder / "state-3", "--worker", str(liar))
    worker.start()
    false.start([sys.executable, str(ROOT / "tests" / "deploy" / "rogue.py")])
    fed.start()
    try:
        until("the first client's worker", first.exists, 120)
        lying = LyingServer(first, folder / "worker-1.out")
        ledger = folder / "state-1" / "ledgers" / "0" / "ledger.jsonl"
        found = [*by_a_client(fed), *by_a_stranger(fed, port)]
        fed.wait_round(int(RUN["rounds"]), 300)
        return [*by_the_server(lying, ledger), *found]
    except BaseException:
        print(worker.said()[-3000:], fed.server.said()[-3000:])
        raise
    finally:
        fed.stop()
        worker.stop()
        false.stop()


def table(found: list[Seen]) -> str:
    """The rows of the document."""
    rows = [
        f"| {s.by} | {s.attack} | {_cell(s.other)} | {_cell(s.operator)} | {'yes' if s.held else 'NO'} |" for s in found
    ]
    return HEAD + "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ").strip() or "nothing"


def main() -> None:
    """Run the attacks, write the table, and say whether all was held."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="attacks-") as folder:
        found = play(Path(folder) / "fed")
    print(table(found))
    if DOC.exists():
        before, _, rest = DOC.read_text().partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        DOC.write_text(f"{before}{MARKS[0]}\n\n{table(found)}\n\n{MARKS[1]}{after}")
    sys.exit(0 if all(s.held for s in found) else 1)


if __name__ == "__main__":
    main()
