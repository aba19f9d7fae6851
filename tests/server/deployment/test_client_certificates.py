"""Client certificates: no request comes through a gateway without its client's own, and a SuperNode presents it."""

import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedlora.client.deployment.supernode import CertifiedClients
from fedlora.deployment.provision import has_certificate, provision, remove
from fedlora.environment import QUIET
from tests.support.gateways import (
    PULL,
    Gate,
    SuperLink,
    answer,
    free,
    head,
    private_key,
    signed,
    start_gate,
    start_nginx,
    wait,
)


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    folder = tmp_path_factory.mktemp("ca")
    provision(folder, ["localhost"], ["site", "other"], client_certificates=True)
    made = SuperLink(folder / "server", free())
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="module", params=[start_gate, start_nginx], ids=["gate", "nginx"])
def certified(
    request: pytest.FixtureRequest, link: SuperLink, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gate]:
    made = request.param(link, tmp_path_factory.mktemp("gate"))
    wait(made.port)
    yield made
    made.process.terminate()
    made.process.wait(10)


def status(gate: Gate, certificate: Path | None) -> int:
    """Of a request that the client `site` has signed, on a connection with a certificate; 0 for no answer."""
    context = ssl.create_default_context(cafile=gate.certificates / "ca.crt")
    if certificate:
        context.load_cert_chain(certificate / "tls.crt", certificate / "tls.key")
    request = head(PULL, signed(gate.certificates) | {"Host": "localhost", "Content-Length": 0})
    with socket.create_connection(("127.0.0.1", gate.port), timeout=10) as plain:
        try:
            with context.wrap_socket(plain, server_hostname="localhost") as conn:
                conn.sendall(request)
                return answer(conn)[0]
        except (ssl.SSLError, ConnectionError):
            return 0


def folder_of(gate: Gate, client: str) -> Path:
    return gate.certificates.parent / "clients" / client


def test_a_client_with_its_own_certificate_comes_through(certified: Gate) -> None:
    assert status(certified, folder_of(certified, "site")) == 200


def test_its_signature_alone_is_not_enough(certified: Gate, link: SuperLink) -> None:
    link.seen.clear()
    assert status(certified, None) in (0, 401) and not link.seen


def test_anothers_certificate_does_not_do(certified: Gate, link: SuperLink) -> None:
    link.seen.clear()
    assert status(certified, folder_of(certified, "other")) == 401 and not link.seen


def test_a_certificate_of_another_authority_does_not_do(certified: Gate, link: SuperLink, tmp_path: Path) -> None:
    provision(tmp_path, ["localhost"], ["site"], client_certificates=True)
    link.seen.clear()
    assert status(certified, tmp_path / "clients" / "site") in (0, 400) and not link.seen


def test_flowers_supernode_presents_it(certified: Gate) -> None:
    """By its own client of the Fleet API, as the program that `fedlora client` starts makes it."""
    folder = folder_of(certified, "site")
    key, root = private_key(folder), (folder / "ca.crt").read_bytes()
    signs = [NodeAuthHttpInterceptor(key, key.public_key())]
    maker = CertifiedClients(folder)
    with maker.from_server_address(f"localhost:{certified.port}", False, root, interceptors=signs) as client:
        client.PullMessages(PullMessagesRequest())


def test_the_program_that_fedlora_client_starts_presents_it(certified: Gate, link: SuperLink) -> None:
    folder = folder_of(certified, "site")
    command = [sys.executable, "-m", "fedlora.client.deployment.supernode", str(folder), "--isolation", "process"]
    command += ["--superlink", f"localhost:{certified.port}", "--root-certificates", str(folder / "ca.crt")]
    command += ["--auth-supernode-private-key", str(folder / "client.key"), "--port", str(free())]
    link.seen.clear()
    node = subprocess.Popen(command, env=os.environ | QUIET)
    try:
        end = time.monotonic() + 120
        while not any(path.endswith("activate-node") for _, path, _, _ in link.seen):
            assert node.poll() is None and time.monotonic() < end
            time.sleep(0.1)
    finally:
        node.kill()
        node.wait()


def test_once_there_are_certificates_later_clients_have_them_too(tmp_path: Path) -> None:
    provision(tmp_path, ["localhost"], ["early"])
    assert not has_certificate(tmp_path / "clients" / "early")
    provision(tmp_path, [], [], client_certificates=True)
    provision(tmp_path, [], ["late"])
    assert has_certificate(tmp_path / "clients" / "early") and has_certificate(tmp_path / "clients" / "late")
    before = (tmp_path / "clients" / "early" / "tls.crt").read_bytes()
    provision(tmp_path, [], [])
    assert (tmp_path / "clients" / "early" / "tls.crt").read_bytes() == before


def test_a_removed_clients_certificate_is_forgotten(tmp_path: Path) -> None:
    provision(tmp_path, ["localhost"], ["site"], client_certificates=True)
    remove(tmp_path, "site")
    assert not (tmp_path / "server" / "clients" / "site.crt").exists()
