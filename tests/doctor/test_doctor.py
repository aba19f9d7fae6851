"""What `fedlora doctor` finds at a site, and what it says of each thing that is not well."""

import http.server
import json
import os
import re
import ssl
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedlora.client.agreement import FILE
from fedlora.client.deployment.supervisor import wrong_clock
from fedlora.deployment.provision import provision
from fedlora.doctor.examination import Examination, examine
from fedlora.messages.agreement import RunAgreement
from fedlora.messages.envelope import to_json
from tests.support.connect_proxy import ConnectProxy
from tests.support.models import make

OWN = {"dp.noise": 1.0, "dp.rate": 0.5}


class Health(http.server.BaseHTTPRequestHandler):
    """A server that answers as the gate of `fedlora server` does when it is asked for its health."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    make("bert", folder / "model")
    rows = [{"text": f"w{i % 7} w{i % 5}", "label": ("no", "maybe", "yes")[i % 3]} for i in range(30)]
    (folder / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[int]:
    """The port of a server with the certificate of these keys, whose folders lie in `place`."""
    listening = http.server.HTTPServer(("127.0.0.1", 0), Health)
    port = listening.server_address[1]
    provision(place / "keys", ["localhost"], ["ward"], port=port)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(place / "keys" / "server" / "server.crt", place / "keys" / "server" / "server.key")
    listening.socket = context.wrap_socket(listening.socket, server_side=True)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield port
    listening.shutdown()


def found(asked: Examination) -> dict[str, tuple[str, str]]:
    """The verdict and the words about each thing; of several about one the worst."""
    worst = ["ok", "not asked", "warning", "wrong"]
    every = sorted(examine(asked), key=lambda finding: worst.index(finding.verdict))
    return {finding.what: (finding.verdict, finding.said) for finding in every}


def site(place: Path, **more: Any) -> Examination:
    files = {"data.path": str(place / "notes.jsonl"), "model.path": str(place / "model")}
    mine: Mapping[str, Any] = files | {"data.labels": ["no", "maybe", "yes"]}
    return Examination(mine=mine | more.pop("mine", {}), state=more.pop("state", place / "state"), **more)


def test_a_site_that_is_ready_is_told_so_line_by_line(place: Path, server: int) -> None:
    said = found(site(place, credentials=place / "keys" / "clients" / "ward"))
    assert {what: verdict for what, (verdict, _) in said.items() if what != "versions"} == dict.fromkeys(
        ("python", "device", "memory", "disk", "keys", "server", "clock", "data", "model", "tokens", "step"), "ok"
    )
    assert "30 training rows" in said["data"][1] and "no 10, maybe 10, yes 10" in said["data"][1]
    assert "its certificate is trusted" in said["server"][1] and "client 0" in said["keys"][1]
    assert re.search(r"ca\.crt holds to \d{4}-\d\d-\d\d", said["keys"][1])
    assert "nothing is kept or charged" in said["step"][1] and not (place / "state").exists()


def test_the_fingerprint_is_that_of_the_run_that_was_agreed_to_last(place: Path, tmp_path: Path) -> None:
    for run, base in (("first", "a" * 64), ("second", "b" * 64)):
        (tmp_path / run).mkdir()
        (tmp_path / run / FILE).write_bytes(to_json(RunAgreement(settings=OWN, base=base)))
        os.utime(tmp_path / run / FILE, (1, 1 if run == "first" else 2))
    said = found(site(place, state=tmp_path))
    assert said["model"][0] == "wrong" and "bbbbbbbbbbbb was agreed" in said["model"][1]
    assert "by DP-SGD" in said["step"][1], "as the agreement has it"


def test_a_server_is_asked_by_the_sites_proxy(place: Path, server: int, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = ConnectProxy()
    monkeypatch.setenv("https_proxy", proxy.url)
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    asked = site(place, mine={"data.path": "nowhere.csv"}, credentials=place / "keys" / "clients" / "ward")
    said = found(asked)
    assert said["server"][0] == "ok" and "by the proxy 127.0.0.1" in said["server"][1]
    assert proxy.asked == [f"localhost:{server}"]
    assert said["data"][0] == "wrong" and "nowhere.csv" in said["data"][1] and said["model"][0] == "not asked"
    proxy.close()


def test_what_is_not_well_is_said_with_its_remedy(place: Path, server: int, tmp_path: Path) -> None:
    provision(tmp_path / "others", ["localhost"], ["ward"])
    others = tmp_path / "others" / "clients" / "ward"
    (tmp_path / "file").write_text("")
    mine = {"model.path": str(tmp_path / "no-model")}
    said = found(site(place, mine=mine, credentials=others, server=f"localhost:{server}", state=tmp_path / "file"))
    assert said["server"][0] == "wrong" and "ca.crt does not vouch for" in said["server"][1]
    assert "_ssl" not in said["server"][1]
    assert said["disk"][0] == "wrong" and "give --state a folder" in said["disk"][1]
    assert said["model"][0] == "wrong" and "no such folder" in said["model"][1] and "step" not in said


def test_a_server_that_does_not_answer_and_no_keys_at_all(place: Path) -> None:
    said = found(site(place, server="localhost:9", mine={"data.path": "nowhere.csv"}))
    assert said["server"][0] == "wrong" and "does not answer" in said["server"][1] and "firewall" in said["server"][1]
    assert "refused" in said["server"][1], "which another name of a server would not be"
    assert said["keys"][0] == "not asked"


def test_a_clock_that_is_wrong_is_told_by_how_much() -> None:
    assert wrong_clock(None) == ""
    assert "ahead of the server's" in wrong_clock("Mon, 01 Jan 2001 00:00:00 GMT")
    assert "set the clock (NTP)" in wrong_clock("Mon, 01 Jan 2101 00:00:00 GMT")
