"""`fedlora export --push`, to a hub on this machine that speaks as much of its protocol as a small upload needs."""

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from fedlora.cli.app import app
from fedlora.errors import ConfigError, ExportError
from fedlora.run.hub import check_repository, push, push_lines
from tests.support.small_run import begin, site


class Hub(ThreadingHTTPServer):
    """Keeps what is asked of it: repositories that are made, and the files of commits."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.made: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.refuses = False


class Asked(BaseHTTPRequestHandler):
    """One request to the hub."""

    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.refuses:
            return self._answer(403, {"error": "this token may not write"})
        if self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            return self._answer(200, {"url": f"{constants.ENDPOINT}/org/mine"})
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            return self._answer(200, {"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self._answer(200, {"commitUrl": f"{constants.ENDPOINT}/org/mine/commit/0", "commitOid": "0"})

    def do_GET(self) -> None:
        self._answer(200, {"id": "org/mine", "siblings": [], "sha": "0"})

    def _answer(self, code: int, content: dict[str, Any]) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = site(tmp_path_factory.mktemp("site"))
    return begin(place, place / "run", strategy="fedavg", rounds=1)


def test_what_was_exported_is_what_is_pushed(run: Path, hub: Hub, tmp_path: Path) -> None:
    """To a private repository, with a card that names the repository."""
    words = ["export", str(run), "--out", str(tmp_path / "out"), "--push", "org/mine", "--base-model", "org/base"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert {"name": "mine", "organization": "org", "visibility": "private"}.items() <= hub.made[0].items()
    assert hub.files == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    card = hub.files["README.md"].decode()
    assert 'PeftModel.from_pretrained(base, "org/mine")' in card and "base_model: org/base" in card
    assert f"pushed: {constants.ENDPOINT}/org/mine" in done.stdout


def test_a_dry_run_asks_nobody(run: Path, hub: Hub, tmp_path: Path) -> None:
    words = ["export", str(run), "--out", str(tmp_path / "out"), "--push", "org/mine", "--public", "--dry-run"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "org/mine: a public model repository with 3 files" in done.stdout
    assert "  adapter_model.safetensors, " in done.stdout and not hub.made and not hub.files


def test_a_hub_that_refuses_is_one_sentence_with_what_to_do(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("x")
    hub.refuses = True
    with pytest.raises(ExportError, match=r"was not pushed to org/mine: .*403.*HF_TOKEN, then: hf upload org/mine"):
        push(tmp_path, "org/mine", public=False)


@pytest.mark.parametrize("name", ["mine", "a/b/c", "org/mi ne", "org/.mine", "/tmp/x"])
def test_what_is_no_name_on_the_hub_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--push {name}"):
        check_repository("--push", name)


def test_options_of_a_push_without_one_are_refused() -> None:
    done = CliRunner().invoke(app, ["export", "nowhere", "--dry-run"])
    assert isinstance(done.exception, ConfigError) and "add --push ORG/NAME" in str(done.exception)


def test_a_dry_run_names_files_in_folders(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.json").write_text("{}")
    assert push_lines(tmp_path, "o/n", public=False) == [
        "o/n: a private model repository with 1 files",
        "  sub/a.json, 2 bytes",
    ]
