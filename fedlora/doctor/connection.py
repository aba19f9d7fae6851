"""The way to the server: this client's keys, the server through the site's proxy, and the clock against its own."""

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
from cryptography import x509

from fedlora.client.deployment.supervisor import (
    ClientOptions,
    raise_if_untrusted,
    tls_context,
    why_silent,
    wrong_clock,
)
from fedlora.deployment.certificates import SOON
from fedlora.deployment.provision import has_certificate, read_client

from .findings import Finding, ok, warning, wrong

PATIENCE = 10.0  # seconds for an answer
PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


def keys(credentials: Path) -> Iterator[Finding]:
    """Yield whether this client's folder of `fedlora provision` is whole, and how long its certificates hold."""
    who = read_client(credentials)
    files = ["ca.crt", *(["tls.crt"] if has_certificate(credentials) else [])]
    ends = {name: x509.load_pem_x509_certificate((credentials / name).read_bytes()) for name in files}
    for name, certificate in ends.items():
        end, now = certificate.not_valid_after_utc, datetime.now(UTC)
        if not certificate.not_valid_before_utc <= now <= end:
            yield wrong("keys", f"{name} holds to {end.date()}, and not now; ask for a new folder, or set the clock")
        elif end - now < SOON:
            yield warning("keys", f"{name} ends on {end.date()}; ask whoever provisions for a new folder")
    until = " and ".join(f"{name} holds to {end.not_valid_after_utc.date()}" for name, end in ends.items())
    yield ok("keys", f"those of {who.name}, client {who.id} of {who.server}; {until}")


def server(options: ClientOptions) -> Iterator[Finding]:
    """Yield whether the server answers, by the site's proxy if it has one, and whether the clocks agree."""
    proxy = next((os.environ[name] for name in PROXIES if os.environ.get(name)), "")
    way = f" by the proxy {httpx.URL(proxy).host}" if proxy else ""
    try:
        answer = httpx.get(f"{options.url}/health", verify=tls_context(options), timeout=PATIENCE)
    except httpx.HTTPError as e:
        raise_if_untrusted(options, e)
        yield wrong(
            "server",
            f"{options.server} does not answer{way} ({why_silent(e)}); check its name, have the firewall let "
            "TCP out to it, set https_proxy, or ask whether the server runs",
        )
        return
    secure = "its certificate is trusted" if options.credentials else "without TLS"
    yield ok("server", f"{options.server} answers{way}, {secure}")
    if apart := wrong_clock(answer.headers.get("date")):
        yield wrong("clock", apart)
    else:
        yield ok("clock", "agrees with the server's")
