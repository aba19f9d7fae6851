"""What can go wrong with disks, files and uploads, each done to a real federation, and what is to be seen then."""

import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from events import EQUAL, VICTIM, Event, Seen, Trial, crash, lost, missed, named, spared
from lab import Federation, Late, below, cut_short, difference, fill, memory, until
from safetensors.torch import load_file


def checkpoint(trial: Trial) -> Seen:
    """All of the server is killed, and the newest checkpoint is half a file."""
    n, began = trial.next(), time.monotonic()
    fed = trial.fed
    crash(fed)
    newest = max((fed.run / "checkpoint").glob("round-*.safetensors"))
    cut_short(newest)
    fed.server.start()
    again = f"round {int(newest.stem[6:])} was done again"
    until(again, lambda: newest.exists() and whole(newest), 200)
    apart = difference(newest, fed.kept(int(newest.stem[6:])))
    seen = spared(trial, n, began, f"went on after the checkpoint before; {again} ({apart:.1g} from what it was)")
    return Seen(seen.kept and apart <= EQUAL, seen.happened, "0; 1 done again", seen.data_lost, seen.difference)


def whole(path: Path) -> bool:
    try:
        return bool(load_file(path)) or True
    except Exception:
        return False


def server_disk(trial: Trial) -> Seen:
    """No room in the run directory, until the command has said so or a minute is over."""
    n, began = trial.next(), time.monotonic()
    fed = trial.fed
    filler = fill(fed.run)
    with suppress(Late):
        until("the server ends", lambda: fed.server.code is not None, 60)
    code, words = fed.server.code, fed.log_tail()
    filler.unlink()
    said = "the command went on"
    if code is not None:
        said = f"the command ended with code {code}: “{words}”; room made, started again"
        fed.server.start()
    return spared(trial, n, began, said)


def client_disk(trial: Trial) -> Seen:
    n, began = trial.next(), time.monotonic()
    filler = fill(trial.fed.folder / f"state-{VICTIM + 1}")
    try:
        trial.fed.wait_round(n)
    finally:
        filler.unlink()
    seen = missed(trial, n, began, "room made after the round")
    own = (trial.fed.folder / f"state-{VICTIM + 1}.out").read_text(errors="replace")  # the server is told a code alone
    told = "could not be written: No space left on device" in own and "its disk is full" in seen.happened
    return Seen(seen.kept and told, seen.happened, seen.rounds_lost, seen.data_lost)


def kept(trial: Trial) -> Seen:
    """What the client kept in the last round is half a file."""
    fed, began = trial.fed, time.monotonic()
    n = len(fed.rounds()) + 1
    n += fed.entered(VICTIM, n) > 0
    fed.wait_round(n)
    newest = max((fed.folder / f"state-{VICTIM + 1}").glob("runs/*/*/kept-*.safetensors"))
    cut_short(newest)
    line = fed.wait_round(n + 1)
    log = (fed.folder / f"state-{VICTIM + 1}" / "logs" / "worker.log").read_text(errors="replace")
    told = "is missing or damaged" in log and "what was kept before it is used" in log
    words = "told in worker.log; what was kept the round before is used" if told else "it was not noticed"
    after = time.monotonic() - began
    said = f"{words}; round {n + 1} with {line['answered']} of 3, {after:.0f} s"
    return Seen(told and not line["failed"], said, "0", "what one client learned for itself in one round")


def answer(trial: Trial) -> Seen:
    """The ServerApp dies when one client has answered, and that answer is half a file when it is asked for again."""
    fed, n, began = trial.fed, trial.next(), time.monotonic()
    state = fed.folder / f"state-{VICTIM + 1}"

    def answers() -> int:
        return sum(e.get("what") == "update" and e["round"] == n for e in fed.audit(state))

    slow = below(fed.clients[0].pid, "fedlora worker")[0]
    os.kill(slow, 19)
    try:
        until("an answer of this round", answers)
        path = next(state.glob("runs/*/*/answer.safetensors"))
        copy = Path(shutil.copyfile(path, fed.folder / "answer.safetensors"))
        fed.server.kill("flwr-serverapp")
        cut_short(path)
    finally:
        os.kill(slow, 18)
    line = fed.wait_round(n)
    apart, took = difference(path, copy), time.monotonic() - began
    said = f"worked out again, {apart:.1g} from the first; round {n} with {line['answered']} of 3 after {took:.0f} s"
    return Seen(answers() == 2 and apart == 0 and not line["failed"], said, "0", lost(fed), f"{apart:.1g} (the answer)")


def refused(n: int, why: str) -> Event:
    """The upload of round n is refused for this reason, and the round goes on as if that client were not there."""

    def do(trial: Trial) -> Seen:
        fed = trial.fed
        line = fed.wait_round(n)
        failed, audit = line["failed"], list(fed.audit(fed.run))
        logged = any(e["event"] == "refused" and e.get("client") == VICTIM and e["round"] == n for e in audit)
        words = failed.get(str(VICTIM), "-")[:100]
        with suppress(Late):  # the command shows what the ServerApp writes a moment later
            until("it is on the screen", lambda: words in fed.server.said(), 20)
        shown = words in fed.server.said()
        until(f"checkpoint {n}", fed.kept(n).exists, 30)
        apart = difference(fed.kept(n), trial.reference / f"round-{n:06d}.safetensors") if trial.reference else 1.0
        good = set(failed) == {str(VICTIM)} and why in failed[str(VICTIM)] and logged and shown and apart == 0
        words = f"{named(failed) or 'it was taken'}; logged: {logged}, on the screen: {shown}; {line['seconds']:.0f} s"
        return Seen(good, words, "0 for the others", lost(fed), f"{apart:.1g}")

    return do


def enormous(n: int) -> Event:
    """2 GB: how much memory it took, too."""

    def do(trial: Trial) -> Seen:
        fed = trial.fed
        fed.wait_round(n - 1)  # all that is measured runs, and has loaded what it needs
        names = {
            "SuperLink": "flower-superlink",
            "gate": "fedlora.server.deployment.gate",
            "ServerApp": "flwr-serverapp",
        }
        pids = {who: below(fed.server.pid, name)[:1] for who, name in names.items()}
        before = {who: memory(pid[0]) for who, pid in pids.items()}
        most: dict[str, float] = dict(before)

        def done() -> Any:
            most.update({who: max(most[who], memory(pids[who][0])) for who in before})
            return len(fed.rounds()) >= n or fed.server.code is not None

        until("the round ends", done, 420)
        sizes = ", ".join(f"{who} {before[who]:.0f} to {most[who]:.0f} MB" for who in before)
        seen = refused(n, "")(trial)
        small = all(most[who] - before[who] < 1000 for who in before)
        gate = json.dumps([line.split('"reason": ')[1] for line in gate_log(fed) if '"reason": ' in line][-1:])
        words = f"{seen.happened}; most memory: {sizes}; the gate's last refusal: {gate}"
        return Seen(small and seen.kept, words, seen.rounds_lost, seen.data_lost, seen.difference)

    return do


def gate_log(fed: Federation) -> list[str]:
    path = fed.run / "gate.log"
    return path.read_text(errors="replace").splitlines() if path.exists() else []
