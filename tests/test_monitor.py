"""Metrics: a real run, read as Prometheus would read it, and failures told by a few kinds."""

import ast
import json
import socket
import urllib.request
from collections.abc import Iterator, Mapping
from io import StringIO
from math import isnan
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from fedlora import config
from fedlora.console import Screen
from fedlora.errors import ConfigError
from fedlora.folder import RunFolder
from fedlora.plan import Round
from fedlora.run import drive, prepare
from fedlora.server.monitor import KINDS, Monitor, kind
from fedlora.simulations.serial import Serial
from tests.models import make

ROOT = Path(__file__).parent.parent
Seen = dict[str, float]
Rows = list[dict[str, Any]]
WAYS = {  # to fail -> kind
    "no answer after 600 s": "late",
    "no answer to secure aggregation": "late",
    "Error: Reply Message Unavailable - The reply message has expired.": "late",
    "Flower's error 3": "late",
    "Error: Node Unavailable — The destination node failed to report a heartbeat within 2 × its interval.": "offline",
    "its job could not be sent": "offline",
    "offline: its node is not there": "offline",
    "an answer is of run 'a'; this is 'b'": "refused",
    "ClientApp stopped responding.": "crashed",
    "it still lacks 2 parts of a job that was sent in full": "refused",
    "its update is not masked": "refused",
    "an update could not be read: ValueError: x": "refused",
    "a job could not be read: ValueError: x": "damaged",
    "a message is no JobHead: round: Field required": "damaged",
    "a message is no UpdateHead: round: Field required": "refused",
    "PrivacyError: whatever": "privacy",
    "secure aggregation: too few": "secure",
    "OutOfMemoryError: CUDA out of memory.": "memory",
    "OSError: [Errno 28] No space left on device": "disk",
    "ZeroDivisionError: division by zero": "error",
    "": "error",
}
ERRORS = {"ClientFailed", "LedgerError", "PrivacyError", "SecureError", "WireError"}
FILLED = {  # what it is not a 7 for
    "context": "round 3 (0123456789abcdef)",
    "cohort.context": "round 3 (0123456789abcdef)",
    "self.context": "round 3 (0123456789abcdef)",
    "what": "an update",
    "self._path": "0/ledger.jsonl",
    "self._head": "0/ledger.head",
}
RAISED = {  # file -> the kinds that what it raises may be
    "admit": {"refused"},
    "envelope": {"refused"},
    "wire": {"damaged", "refused"},
    "site": {"privacy"},
    "seat": {"privacy", "secure"},
    "secure": {"secure"},
    "ledger": {"privacy", "disk"},
    "persample": {"privacy"},
    "preflight": {"privacy"},
    "dpsgd": {"privacy", "diverged"},
    "worker": {"diverged"},
}


class Quiet(Screen):
    """A screen that nobody sees, and that knows who is waited for."""

    def __init__(self) -> None:
        super().__init__(Console(file=StringIO()))
        self.waited: Mapping[int, float] = {}

    def waiting(self, clients: Mapping[int, float]) -> None:
        self.waited = clients


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def scrape(monitor: Monitor) -> dict[str, float]:
    """What a scrape over HTTP says: each series with its labels' values."""
    port = free_port()
    close = monitor.serve(port=port)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
            families = list(text_string_to_metric_families(reply.read().decode()))
    finally:
        close()
    return {" ".join([s.name, *s.labels.values()]): s.value for family in families for s in family.samples}


def record(failed: Mapping[int, str], asked: int = 3) -> dict[str, object]:
    """A round's line, as a run makes it."""
    return Round(1, None, tuple(range(asked)), failed, None, None, None, 10, 20, 1.5).record()


def sentences(path: Path) -> Iterator[str]:
    """What a module's own errors say, with a 7 for most of what is filled in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS and node.args:
            text = node.args[0]
            parts = text.values if isinstance(text, ast.JoinedStr) else [text]
            yield "".join(map(filled, parts))


def filled(part: ast.expr) -> str:
    if isinstance(part, ast.FormattedValue):
        return FILLED.get(ast.unparse(part.value), "7")
    return ast.literal_eval(part) if isinstance(part, ast.Constant) else ""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Seen, Rows]:
    """A run of two rounds by three clients of four: a scrape at its end, and its lines."""
    place = tmp_path_factory.mktemp("run")
    make("bert", place / "model")
    rows = [{"text": f"w{i % 7} w{i % 5}", "label": ("no", "maybe", "yes")[i % 3]} for i in range(40)]
    (place / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    paths = {"model.path": str(place / "model"), "data.path": str(place / "rows.jsonl")}
    setup = prepare(config.build(paths, {"clients": 4, "cohort": 3, "rounds": 2, "threads": 1, "train.steps": 1}))
    folder, monitor = RunFolder(place / "out"), Monitor(Quiet())
    folder.create(setup.config)
    drive(setup, Serial(setup.model, setup.sites, setup.ranks, folder.clients, monitor.answered), folder, monitor)
    return scrape(monitor), folder.records()


def test_a_run_is_counted_as_its_lines_tell_it(run: tuple[Seen, Rows]) -> None:
    seen, rows = run
    assert seen["fedlora_rounds_total"] == seen["fedlora_round"] == seen["fedlora_rounds_planned"] == 2
    assert [seen[f"fedlora_clients {s}"] for s in ("known", "asked", "answered")] == [4, 3, 3]
    assert seen["fedlora_bytes_total up"] == sum(r["bytes_up"] for r in rows) > 0
    assert seen["fedlora_bytes_total down"] == sum(r["bytes_down"] for r in rows) > 0
    assert seen["fedlora_round_seconds_count"] == 2
    assert seen["fedlora_round_seconds_sum"] == pytest.approx(sum(r["seconds"] for r in rows))


def test_it_shows_what_the_last_round_came_to(run: tuple[Seen, Rows]) -> None:
    seen, rows = run
    assert seen["fedlora_train_loss"] == rows[-1]["train_loss"]
    assert {k.split()[1]: v for k, v in seen.items() if k.startswith("fedlora_eval ")} == rows[-1]["eval"]
    assert isnan(seen["fedlora_epsilon"])


def test_failures_are_counted_by_kind_from_none_on() -> None:
    monitor = Monitor(Quiet())
    before = scrape(monitor)
    monitor.round(record({0: "no answer after 600 s", 2: "an update's loss is nan"}))
    after = scrape(monitor)
    kinds = {k: after[f"fedlora_failures_total {k}"] for k in KINDS}
    assert all(before[f"fedlora_failures_total {k}"] == 0 for k in KINDS)
    assert {k: n for k, n in kinds.items() if n} == {"late": 1, "refused": 1}
    assert (before["fedlora_refused_uploads_total"], after["fedlora_refused_uploads_total"]) == (0, 1)
    assert after["fedlora_clients answered"] == 1 and isnan(after["fedlora_train_loss"])


def test_who_is_waited_for_is_shown_and_told_on() -> None:
    screen = Quiet()
    monitor = Monitor(screen)
    monitor.online(5)
    monitor.answered(0)
    monitor.waiting({1: 4.5, 2: 31.0})
    seen = scrape(monitor)
    assert seen["fedlora_waiting_seconds"] == 31 and screen.waited == {1: 4.5, 2: 31.0}
    assert (seen["fedlora_clients online"], seen["fedlora_clients answered"]) == (5, 1)
    monitor.round(record({}))
    assert scrape(monitor)["fedlora_waiting_seconds"] == 0


@pytest.mark.parametrize("reason", WAYS)
def test_a_failure_is_of_the_kind_that_its_words_say(reason: str) -> None:
    assert kind(reason) == WAYS[reason]


@pytest.mark.parametrize("module", RAISED)
def test_no_sentence_of_a_client_or_of_the_check_of_its_upload_is_of_another_kind(module: str) -> None:
    said = list(filter(None, sentences(ROOT / "fedlora" / f"{module}.py")))  # of some, the words come from elsewhere
    assert said and {s: kind(s) for s in said if kind(s) not in RAISED[module]} == {}


@given(st.text())
def test_no_words_make_a_kind_of_their_own(reason: str) -> None:
    assert kind(reason) in KINDS and kind(reason * 1000) in KINDS


def test_two_runs_have_metrics_of_their_own() -> None:
    one, other = Monitor(Quiet()), Monitor(Quiet())
    one.online(3)
    assert scrape(other)["fedlora_clients online"] == 0


def test_a_port_in_use_is_refused_by_name() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: Address already in use.*--metrics-port"):
            Monitor(Quiet()).serve(port=port)


def test_a_port_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="70000"):
        Monitor(Quiet()).serve(port=70000)


def test_closed_it_gives_the_port_back() -> None:
    port = free_port()
    Monitor(Quiet()).serve(port=port)()
    Monitor(Quiet()).serve(port=port)()
