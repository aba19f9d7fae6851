"""Metrics: a real run, read as Prometheus would read it, and failures counted by a few kinds."""

import ast
import json
import socket
import urllib.request
from collections.abc import Mapping
from errno import EIO, ENOSPC
from io import StringIO
from math import isnan
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Error
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from fedlora import config, errors
from fedlora.client.deployment.relay import WorkerGone
from fedlora.errors import (
    CheckpointError,
    ClientFailed,
    ConfigError,
    Failure,
    FailureKind,
    FedloraError,
    LedgerError,
    PrivacyError,
    ReasonCode,
    SecureError,
    TrainingDiverged,
    WireError,
)
from fedlora.run.console import ConsoleProgress
from fedlora.run.directory import RunDirectory
from fedlora.run.plan import RoundResult
from fedlora.run.setup import prepare
from fedlora.server.deployment.prometheus import PrometheusExporter
from fedlora.server.replies import read_error
from fedlora.server.run import run_rounds
from fedlora.simulations.serial import Serial
from tests.support.models import make

ROOT = Path(__file__).parents[3]
Seen = dict[str, float]
Rows = list[dict[str, Any]]
TOLD = {  # Flower's code, and the text of an error reply -> kind
    (3, "Error: Message Unavailable - The requested message could not be found in the database."): "late",
    (4, "Error: Reply Message Unavailable - The reply message has expired."): "late",
    (3, ""): "late",
    (
        5,
        "Error: Node Unavailable — The destination node failed to report a heartbeat.",
    ): "offline",
    (5, "privacy: whatever a client adds"): "offline",
    (8, "ClientApp stopped responding."): "crashed",
    **{(2, code): code.kind for code in ReasonCode},
    (2, "refused"): "error",
    (2, "late"): "error",
    (2, "memory: and its whole sentence"): "error",
    (2, "nonsense: x"): "error",
    (2, "PrivacyError: of a client of an older version"): "error",
    (2, "<class 'a.b.ActorDiedError'>:<'The actor died.'>"): "error",
    (1, "no such app"): "error",
    (2, ""): "error",
}
ENDED = [  # an error that ended a client's work -> kind
    (PrivacyError("the server asks for single examples"), "privacy"),
    (LedgerError("its privacy budget is spent"), "privacy"),
    (SecureError("a weight is not finite"), "secure"),
    (WireError("a message is no JobHead"), "damaged"),
    (CheckpointError("answer.safetensors could not be written"), "disk"),
    (TrainingDiverged("client 1: the loss is nan"), "diverged"),
    (WorkerGone("the worker died 2 times at this job"), "crashed"),
    (ClientFailed("client 7 has no share of the data"), "error"),
    (OSError(ENOSPC, "No space left on device"), "disk"),
    (OSError(EIO, "Input/output error"), "error"),
    (MemoryError(), "memory"),
    (torch.OutOfMemoryError("CUDA out of memory."), "memory"),
    (ZeroDivisionError("division by zero"), "error"),
]
RAISED = {  # file -> the kinds of the errors that it raises
    "server/upload_checks.py": {"damaged"},  # the fleet makes it `refused`
    "fedlora/messages/envelope.py": {"damaged"},
    "fedlora/messages/codec.py": {"damaged"},
    "client/policy.py": {"privacy"},
    "client/secure_aggregation.py": {"secure", "masked"},
    "fedlora/privacy/masked_update.py": {"privacy", "secure"},
    "fedlora/privacy/secure_aggregation.py": {"secure", "masked"},
    "client/ledger.py": {"privacy"},
    "fedlora/privacy/per_sample_gradients.py": {"privacy"},
    "fedlora/privacy/preflight.py": {"privacy"},
    "fedlora/privacy/dpsgd.py": {"privacy", "diverged"},
    "client/training.py": {"diverged", "error"},
}


class Quiet(ConsoleProgress):
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


def scrape(exporter: PrometheusExporter) -> dict[str, float]:
    """What a scrape over HTTP says: each series with its labels' values."""
    port = free_port()
    close = exporter.serve(port=port)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
            families = list(text_string_to_metric_families(reply.read().decode()))
    finally:
        close()
    return {" ".join([s.name, *s.labels.values()]): s.value for family in families for s in family.samples}


def tell(exporter: PrometheusExporter, failed: Mapping[int, Failure]) -> None:
    """A round of three clients is over, of whom these failed."""
    exporter.round(RoundResult(1, None, (0, 1, 2), failed, None, None, None, 10, 20, 1.5).record(), failed)


def raised(path: Path) -> set[str]:
    """The kinds of this program's own errors that a module makes."""
    calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    classes = (getattr(errors, func.id, None) for func in calls if isinstance(func, ast.Name))
    return {str(cls.code.kind) for cls in classes if isinstance(cls, type) and issubclass(cls, FedloraError)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Seen, Rows]:
    """A run of two rounds by three clients of four: a scrape at its end, and its lines."""
    place = tmp_path_factory.mktemp("run")
    make("bert", place / "model")
    rows = [{"text": f"w{i % 7} w{i % 5}", "label": ("no", "maybe", "yes")[i % 3]} for i in range(40)]
    (place / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    paths = {"model.path": str(place / "model"), "data.path": str(place / "rows.jsonl")}
    setup = prepare(config.build(paths, {"clients": 4, "cohort": 3, "rounds": 2, "threads": 1, "train.steps": 1}))
    folder, exporter = RunDirectory(place / "out"), PrometheusExporter(Quiet())
    folder.create(setup.config)
    fleet = Serial(setup.model, setup.clients_data, setup.ranks, folder.clients, exporter.answered)
    run_rounds(setup, fleet, folder, exporter)
    return scrape(exporter), folder.records()


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
    assert "fedlora_epsilon" not in seen


def test_failures_are_counted_by_kind_from_none_on() -> None:
    exporter = PrometheusExporter(Quiet())
    before = scrape(exporter)
    late, refused = Failure("no answer after 600 s", FailureKind.LATE), Failure("its loss is nan", FailureKind.REFUSED)
    tell(exporter, {0: late, 2: refused})
    after = scrape(exporter)
    kinds = {k: after[f"fedlora_failures_total {k}"] for k in FailureKind}
    assert all(before[f"fedlora_failures_total {k}"] == 0 for k in FailureKind)
    assert {k: n for k, n in kinds.items() if n} == {"late": 1, "refused": 1}
    assert (before["fedlora_refused_uploads_total"], after["fedlora_refused_uploads_total"]) == (0, 1)
    assert after["fedlora_clients answered"] == 1 and "fedlora_train_loss" not in after


def test_before_the_first_round_no_value_is_shown_that_is_none() -> None:
    assert not any(isnan(value) for value in scrape(PrometheusExporter(Quiet())).values())


def test_who_is_waited_for_has_a_name_until_the_round_is_over() -> None:
    exporter = PrometheusExporter(Quiet(), {1: "hospital-b"})
    exporter.waiting({1: 4.5, 2: 31.0})
    seen = scrape(exporter)
    assert seen["fedlora_waiting_for_seconds hospital-b"] == 4.5
    assert seen["fedlora_waiting_for_seconds client 2"] == 31
    tell(exporter, {})
    assert not [name for name in scrape(exporter) if name.startswith("fedlora_waiting_for_seconds ")]


def test_who_is_waited_for_is_shown_and_told_on() -> None:
    screen = Quiet()
    exporter = PrometheusExporter(screen)
    exporter.online(5)
    exporter.answered(0)
    exporter.waiting({1: 4.5, 2: 31.0})
    seen = scrape(exporter)
    assert seen["fedlora_waiting_seconds"] == 31 and screen.waited == {1: 4.5, 2: 31.0}
    assert (seen["fedlora_clients online"], seen["fedlora_clients answered"]) == (5, 1)
    tell(exporter, {})
    assert scrape(exporter)["fedlora_waiting_seconds"] == 0


def test_the_kinds_are_the_label_values_that_dashboards_know() -> None:
    known = "late offline crashed damaged refused disk secure masked privacy diverged memory error"
    assert sorted(FailureKind) == sorted(known.split())


@pytest.mark.parametrize(("told", "kind"), TOLD.items())
def test_an_error_reply_is_of_the_kind_that_flowers_code_or_its_first_word_says(
    told: tuple[int, str], kind: str
) -> None:
    assert read_error(Error(*told)).kind == kind


@pytest.mark.parametrize(("error", "kind"), ENDED, ids=lambda x: x if isinstance(x, str) else type(x).__name__)
def test_an_error_that_ends_a_clients_work_arrives_as_its_kind_and_its_sentence(error: Exception, kind: str) -> None:
    failure = Failure.because_of(error)
    assert failure.kind == kind and str(error) in failure.reason
    assert Failure.parse(failure.dumps()) == failure
    assert failure.code is not None and str(error) not in Failure.told(failure.code).reason.split()


def test_a_full_disk_is_told_as_one_whatever_error_says_it() -> None:
    error = LedgerError("ledger.jsonl could not be written")
    error.__cause__ = OSError(ENOSPC, "No space left on device")
    assert Failure.because_of(error).kind == "disk"


@pytest.mark.parametrize("module", RAISED)
def test_no_error_of_a_client_or_of_the_check_of_its_upload_is_of_another_kind(module: str) -> None:
    assert raised(ROOT / module) == RAISED[module]


@given(st.text())
def test_no_words_of_a_client_are_shown_and_only_a_code_has_a_kind(reason: str) -> None:
    failure = Failure.told(reason)
    known = {code.sentence: code.kind for code in ReasonCode} | {"it gave no reason that is known here": "error"}
    assert known[failure.reason] == failure.kind


def test_two_runs_have_metrics_of_their_own() -> None:
    one, other = PrometheusExporter(Quiet()), PrometheusExporter(Quiet())
    one.online(3)
    assert scrape(other)["fedlora_clients online"] == 0


def test_a_port_in_use_is_refused_by_name() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: Address already in use.*--metrics-port"):
            PrometheusExporter(Quiet()).serve(port=port)


def test_a_port_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="70000"):
        PrometheusExporter(Quiet()).serve(port=70000)


def test_closed_it_gives_the_port_back() -> None:
    port = free_port()
    PrometheusExporter(Quiet()).serve(port=port)()
    PrometheusExporter(Quiet()).serve(port=port)()
