"""All that is looked at, in the order in which it is mended."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora import config as configuration
from fedlora.client.agreement import FILE, kept
from fedlora.client.deployment.supervisor import client_options
from fedlora.errors import FedloraError
from fedlora.messages.agreement import RunAgreement, may_name

from . import connection, machine, work
from .findings import Finding, found, not_asked, wrong
from .work import Site


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What the command line of `fedlora doctor` gives to look at."""

    mine: Mapping[str, Any]  # the client's own settings
    credentials: Path | None = None
    server: str = ""
    state: Path | None = None
    id: int = 0
    run: Mapping[str, Any] | None = None  # the run's settings; none: of the newest agreement in `state`, if any
    fingerprint: str = ""  # of the base model; none: that of this agreement


def examine(asked: Examination) -> Iterator[Finding]:
    """Yield what is found, each as soon as it is known."""
    yield from machine.python()
    yield from found("versions", machine.versions())
    try:
        site = site_of(asked)
    except FedloraError as e:
        yield wrong("settings", str(e))
        return
    yield from found("device", machine.device(site.config))
    yield from found("memory", machine.memory(site.config))
    yield from found("disk", machine.disk(asked.state or Path()))
    yield from _way(asked)
    yield from _work(site)


def site_of(asked: Examination) -> Site:
    """The settings by which the client would work. Raises `ConfigError` for such as contradict."""
    agreed = _newest_agreement(asked.state) if asked.state else None
    run = asked.run if asked.run is not None else (agreed.settings if agreed else {})
    named = {key: value for key, value in run.items() if may_name(key)}
    config = configuration.absolute(configuration.build(named, asked.mine))
    identity = client_options(asked.server, asked.credentials, Path(), None, {}) if asked.credentials else None
    base = asked.fingerprint or (agreed.base if agreed else "")
    return Site(identity.id if identity else asked.id, asked.mine, named, config, base)


def _newest_agreement(state: Path) -> RunAgreement | None:
    """The agreement of the run that this client joined last; none where it joined none."""
    files = sorted(state.rglob(FILE), key=lambda path: path.stat().st_mtime)
    return kept(files[-1].parent) if files else None


def _way(asked: Examination) -> Iterator[Finding]:
    """Yield what is found on the way to the server."""
    if asked.credentials:
        yield from found("keys", connection.keys(asked.credentials))
    else:
        yield not_asked("keys", "give --credentials, this client's folder of fedlora provision")
    if asked.credentials or asked.server:
        yield from found("server", _server(asked))
    else:
        yield not_asked("server", "give --server, or --credentials, which name it")


def _server(asked: Examination) -> Iterator[Finding]:
    """Yield what is found of the server. Raises `ConfigError` for options that contradict."""
    number = None if asked.credentials else asked.id
    yield from connection.server(client_options(asked.server, asked.credentials, Path(), number, {}))


def _work(site: Site) -> Iterator[Finding]:
    """Yield what is found of data, model and one step; a later one is not tried where an earlier is wrong."""
    seen = [*found("data", work.data(site))]
    yield from seen
    if any(one.verdict == "wrong" for one in seen):
        yield not_asked("model", "the data come first")
        return
    try:
        setup = work.setup_of(site)
    except FedloraError as e:
        yield wrong("model", str(e))
        return
    yield from found("model", work.model(site, setup))
    yield from found("step", work.step(site, setup))
