"""What can go wrong in a federation, each done to a real one, and what is to be seen then. `faults.py` runs them."""

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lab import NAMES, Command, Federation, below, difference, until

EQUAL = 1e-6  # of two adapters' numbers
FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"
VICTIM = 2  # the client that things happen to


@dataclass
class Trial:
    """A federation in which something is about to happen, and what the undisturbed one left, if that is to be equal."""

    fed: Federation
    reference: Path | None = None
    words: str = ""  # what was seen that only this event has

    def next(self) -> int:
        """A round whose job the victim has not yet; waits until it has it."""
        n = len(self.fed.rounds()) + 1
        n += self.fed.entered(VICTIM, n) > 0
        self.fed.wait_job(VICTIM, n)
        return n


@dataclass(frozen=True)
class Seen:
    """What happened."""

    kept: bool  # the promise
    happened: str
    rounds_lost: str
    data_lost: str
    difference: str = "not promised"


Event = Callable[[Trial], Seen]


@dataclass(frozen=True)
class Row:
    what: str
    promised: str
    do: Event


def lost(fed: Federation) -> str:
    """Data that are gone: rounds without their line or checkpoint, or gaps in the server's audit log."""
    numbers = [r["round"] for r in fed.rounds()]
    gone = [] if numbers == list(range(1, len(numbers) + 1)) else [f"rounds.jsonl has rounds {numbers}"]
    gaps = sum(int(e.get("lost", 0)) for e in fed.audit(fed.run))
    if gaps:
        gone.append(f"{gaps} lines of the audit log, and it says so")
    return "; ".join(gone) or "none"


def spared(trial: Trial, n: int, began: float, words: str) -> Seen:
    """Round n is whole in the end, and what it left is that of the undisturbed run."""
    line = trial.fed.wait_round(n)
    took, apart = time.monotonic() - began, float("inf")
    if trial.reference:
        until(f"checkpoint {n}", trial.fed.kept(n).exists, 30)
        apart = difference(trial.fed.kept(n), trial.reference / f"round-{n:06d}.safetensors")
    failed = dict(line["failed"])
    data = lost(trial.fed)
    kept = not failed and apart <= EQUAL and not data.startswith("rounds")
    why = f"; failed: {named(failed)}" if failed else ""
    said = f"{words}; round {n} done {took:.0f} s after it{why}"
    return Seen(kept, said, str(int(bool(failed))), data, f"{apart:.1g}")


def missed(trial: Trial, n: int, began: float, words: str) -> Seen:
    """Round n is done without the victim, which takes part again later."""
    fed = trial.fed
    line = fed.wait_round(n)
    took = time.monotonic() - began
    back = until("the client takes part again", lambda: answered_since(fed, n), 400)
    again = time.monotonic() - began
    failed = {r["round"]: r["failed"] for r in fed.rounds() if n <= r["round"] < back and r["failed"]}
    only = all(set(f) == {str(VICTIM)} for f in failed.values())
    said = f"{words}; round {n} done after {took:.0f} s with {line['answered']} of 3"
    said += f": {named(failed[min(failed)])}" if failed else ""
    said += f"; takes part again in round {back}, {again:.0f} s after it"
    return Seen(only, said, f"{len(failed)}, of this client", lost(fed))


def answered_since(fed: Federation, n: int) -> int:
    """The first round from n on that the victim answered; 0: none yet."""
    rounds = [r for r in fed.rounds() if r["round"] >= n and r["clients"] == 3]
    return next((r["round"] for r in rounds if str(VICTIM) not in r["failed"]), 0)


def named(failed: Mapping[str, str]) -> str:
    words = ", ".join(f"{NAMES[int(i)]}: “{why}”" for i, why in sorted(failed.items()))
    return words if len(words) < 300 else words[:300] + " …"


def killed(name: str, where: str, words: str) -> Event:
    """kill -9 of the server's process of this name, while a client is at work."""

    def do(trial: Trial) -> Seen:
        n, began = trial.next(), time.monotonic()
        command = trial.fed.server if where == "server" else trial.fed.clients[VICTIM]
        until(f"a {name} is there", lambda: below(command.pid, name), 60)
        command.kill(name)
        return (spared if words else missed)(trial, n, began, words or "killed")

    return do


def worker(trial: Trial) -> Seen:
    n, began = trial.next(), time.monotonic()
    trial.fed.clients[VICTIM].kill("fedlora worker")
    before = trial.fed.entered(VICTIM, n)
    seen = spared(trial, n, began, "started again, and the job with it")
    again = trial.fed.entered(VICTIM, n) > before
    return seen if again else Seen(False, f"not killed in time: {seen.happened}", "", "")


def server(trial: Trial) -> Seen:
    """The command alone; what it started has to end with it."""
    n, began = trial.next(), time.monotonic()
    fed = trial.fed
    children = below(fed.server.pid)
    fed.server.kill()
    until("what the command started has ended", lambda: not any(alive(p) for p in children), 30)
    ended = time.monotonic() - began
    fed.server.start()
    return spared(trial, n, began, f"all that it had started ended within {ended:.0f} s; started again")


def machine(trial: Trial) -> Seen:
    """All of the server at one moment."""
    n, began = trial.next(), time.monotonic()
    crash(trial.fed)
    trial.fed.server.start()
    return spared(trial, n, began, "started again")


def crash(fed: Federation) -> None:
    children = below(fed.server.pid)
    fed.server.kill()
    for pid in children:
        with suppress(ProcessLookupError):
            os.kill(pid, 9)


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def same_key(trial: Trial) -> Seen:
    """A second client, elsewhere, with the key of one that is here."""
    n, began = trial.next(), time.monotonic()
    second = trial.fed.client(VICTIM, trial.fed.folder / "state-second")
    second.start()
    try:
        until("the second one is refused", lambda: "does not take this key" in second.said(), 240)
        refused = time.monotonic() - began
        n = trial.next()
    finally:
        second.stop()
    bad = [r for r in trial.fed.rounds() if r["failed"]]
    seen = spared(
        trial, n, began, f"the second is refused after {refused:.0f} s, and says so; the first is not disturbed"
    )
    return Seen(seen.kept and not bad, seen.happened, seen.rounds_lost, seen.data_lost, seen.difference)


def cut(seconds: float, all: bool = False) -> Event:
    """The network of one client, or of all, is cut while they are at work."""

    def do(trial: Trial) -> Seen:
        n, began = trial.next(), time.monotonic()
        proxies = trial.fed.proxies if all else [trial.fed.proxies[VICTIM]]
        for proxy in proxies:
            proxy.cut()
        time.sleep(seconds)
        for proxy in proxies:
            proxy.mend()
        if seconds < 30:
            return spared(trial, n, began, "calls are made again")
        return outage(trial, n, began) if all else missed(trial, n, began, f"mended after {seconds:.0f} s")

    return do


def hang_up(trial: Trial) -> Seen:
    """Whatever is between client and server ends its connections within TLS's handshake for a while."""
    n, began = trial.next(), time.monotonic()
    trial.fed.proxies[VICTIM].hang_up(15)
    return missed(trial, n, began, "served again after 15 s")


def outage(trial: Trial, n: int, began: float) -> Seen:
    """All clients were away: they are waited for, asked again, and the round is finished."""
    fed = trial.fed
    until("the round or the run ends", lambda: len(fed.rounds()) >= n or fed.server.code is not None, 300)
    words, ended = "waited for, and asked again", fed.server.code is not None
    if ended:
        words = f"the command ended with code {fed.server.code}: “{fed.log_tail()}”; started again"
        fed.server.start()
    back = until("all take part again", lambda: next((r["round"] for r in fed.rounds()[n - 1 :] if not r["failed"]), 0))
    gone = [r["round"] for r in fed.rounds()[n - 1 : back] if r["failed"]]
    after = time.monotonic() - began
    return Seen(not ended, f"{words}; all take part in round {back}, {after:.0f} s after it", str(len(gone)), lost(fed))


def clock(trial: Trial) -> Seen:
    """The client is started on a machine whose clock is ten minutes slow, and put right once it has said so.

    What Flower's signatures come to was not produced: under libfaketime Python's own waits fail.
    """
    n, began = trial.next(), time.monotonic()
    fed, right = trial.fed, trial.fed.clients[VICTIM]
    right.stop()
    env = {"LD_PRELOAD": FAKETIME, "FAKETIME": "-600s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    wrong = Command(right.arguments, fed.folder / "wrong-clock.out", env)
    wrong.start()
    try:
        until("it says that its clock is wrong", lambda: "WARNING: this machine's clock" in wrong.said(), 240)
    finally:
        wrong.stop()
    warned = next(line for line in wrong.said().splitlines() if "WARNING: this machine" in line)
    right.start()
    return missed(trial, n, began, f"it says “{warned}”; then the clock is put right")
