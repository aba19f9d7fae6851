"""Clients at sites as they are: behind a proxy, without a home folder, with a key that was removed or is used twice."""

import json
import re
import shutil
from collections.abc import Iterator

import pytest

from fedlora.deployment.provision import remove
from tests.support.connect_proxy import ConnectProxy
from tests.support.federation import SLOW, Federation, below, command_of
from tests.support.models import make

CONFIG = """
rounds = 1
threads = 1
[model]
path = "{model}"
max_length = 16
[lora]
rank = 3
[train]
steps = 1
batch_size = 2
[server]
quorum = 1.0
"""
ESCAPE = re.compile(rb"\x1b|\r")


@pytest.fixture(scope="module")
def proxy() -> Iterator[ConnectProxy]:
    """The only way out of the first client's site."""
    made = ConnectProxy()
    yield made
    made.close()


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory, proxy: ConnectProxy) -> Iterator[Federation]:
    """A run of two clients to its end; a removed one, and one with a key that is in use, try to take part."""
    folder = tmp_path_factory.mktemp("sites")
    make("llama", folder / "model")
    for n in (1, 2, 3):
        rows = [{"text": f"w{n} w{i} w{2 * i} w{3 * i}"} for i in range(12)]
        (folder / f"client_{n}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.toml").write_text(CONFIG.format(model=folder / "model"))
    made = Federation(folder, folder / "run.toml", folder / "model", host="127.0.0.2")
    try:
        shutil.copytree(made.keys / "clients" / "client-3", folder / "kept")
        remove(made.keys, "client-3")
        server = made.server("run")
        made.client(1, HOME="/proc", https_proxy=proxy.url, HTTPS_PROXY=proxy.url, NO_PROXY="", no_proxy="")
        made.until(lambda: "connected: " in made.said("client-1"))
        twin = ["client", "--server", f"127.0.0.2:{made.port}", "--cold", "--data", str(folder / "client_1.jsonl")]
        key, state = made.keys / "clients" / "client-1", folder / "state-twin"
        made.start("twin", [*twin, "--credentials", str(key), "--state", str(state)])
        made.start("removed", [*twin, "--credentials", str(folder / "kept"), "--state", str(made.state(3))])
        made.client(2, HOME=str(folder / "home"))
        assert server.wait(SLOW) == 0, made.everything()
        for name in ("twin", "removed"):
            made.until(lambda name=name: "does not take this key" in made.said(name))  # type: ignore[misc]
        made.until(lambda: "does not answer: its run has ended" in made.said("client-2"))
        yield made
    finally:
        made.end()


def test_a_client_without_a_home_folder_takes_part_by_way_of_its_sites_proxy(
    sites: Federation, proxy: ConnectProxy
) -> None:
    assert sites.records("run")[0]["answered"] == 2
    assert len(proxy.asked) >= 2 and set(proxy.asked) == {f"127.0.0.2:{sites.port}"}


def test_all_that_a_client_keeps_lies_under_its_state(sites: Federation) -> None:
    assert not (sites.folder / "home").exists()
    assert (sites.state(2) / "home").is_dir()


def test_a_client_is_connected_when_its_key_is_taken_and_is_told_that_the_server_is_away(sites: Federation) -> None:
    said = sites.said("client-2")
    order = ["dials 127.0.0.2", "connected: 127.0.0.2", "round 1 of 1", "does not answer: its run has ended"]
    assert sorted(order, key=said.find) == order and all(words in said for words in order)


@pytest.mark.parametrize("who", ["twin", "removed"])
def test_a_key_that_is_not_taken_is_told_and_never_called_connected(who: str, sites: Federation) -> None:
    said = sites.said(who)
    assert "was removed or is not registered there, or another machine uses it now" in said
    assert "connected: " not in said and "code 1" not in said


def test_the_server_says_who_is_here(sites: Federation) -> None:
    said = sites.said("run")
    assert re.search(r"client-1 is here, with \d+ examples", said) and "client-2 is here" in said
    assert "2 a round" in said
    assert said.count("client-3, which was removed, asked to take part and was refused") == 1


def test_names_stay_with_the_run_whoever_is_removed_later(sites: Federation) -> None:
    assert sites.records("run")[0]["names"] == {"0": "client-1", "1": "client-2"}
    events = [json.loads(line) for line in (sites.folder / "run" / "audit.jsonl").read_text().splitlines()]
    assert {(e["client"], e["name"]) for e in events if "client" in e} == {(0, "client-1"), (1, "client-2")}


def test_the_servers_log_is_json_lines_with_run_round_and_client(sites: Federation) -> None:
    lines = [json.loads(line) for line in (sites.folder / "run" / "server.log").read_text().splitlines()]
    answers = [line for line in lines if line["message"].endswith("has answered")]
    assert {(line["round"], line["client"]) for line in answers} == {(1, 0), (1, 1)}
    assert all(line["run"] and line["at"].endswith("Z") for line in lines)


def test_the_end_of_a_run_is_no_error_of_its_gate(sites: Federation) -> None:
    lines = [json.loads(line) for line in (sites.folder / "run" / "gate.log").read_text().splitlines()]
    assert lines[-1]["event"] == "closed" and not [line for line in lines if line["event"] == "error"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", line["at"]) for line in lines)


def test_no_log_has_colours_or_movements_of_a_cursor(sites: Federation) -> None:
    logs = [*sites.folder.glob("*/logs/*.log"), *sites.folder.glob("*/flower/*.log"), *sites.folder.glob("*.out")]
    assert len(logs) >= 12 and not [log for log in logs if ESCAPE.search(log.read_bytes())]


def test_what_a_worker_is_told_stands_in_no_command_line(sites: Federation) -> None:
    commands = [command_of(pid) for process in sites.running for pid in below(process.pid)]
    workers = [command for command in commands if " worker " in command]
    assert workers and not [command for command in workers if "client_" in command]
