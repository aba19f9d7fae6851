"""Where what the images install comes from, what stays in them, and whom their containers may reach."""

import re
import tomllib
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
IMAGES = ["server/Dockerfile", "client/Dockerfile", "deploy/proxy/Dockerfile"]
HASH = r"    --hash=sha256:[0-9a-f]{64}(?: \\)?\n"
BY_HASH = re.compile(rf"^([a-z0-9-]+)==(\S+)(?: ; .*)? \\\n((?:{HASH})+)", re.MULTILINE)


def read(name: str) -> str:
    return (ROOT / name).read_text()


def instructions(name: str) -> list[str]:
    """A Dockerfile's instructions, each in one line, without comments."""
    lines = "".join(line for line in read(name).splitlines(keepends=True) if not line.startswith("#"))
    return lines.replace("\\\n", " ").splitlines()


def hashed() -> dict[str, str]:
    return {name: version for name, version, _ in BY_HASH.findall(read("hashes.txt"))}


def test_every_line_of_hashes_belongs_to_a_package() -> None:
    assert BY_HASH.sub("", read("hashes.txt")) == "" and len(hashed()) > 90


def test_hashes_are_those_of_the_versions_that_were_run() -> None:
    normal = {re.sub(r"[_.]", "-", line).lower() for line in read("constraints.txt").splitlines()}
    ours = {f"{name}=={version}" for name, version in hashed().items() if name != "setuptools"}
    assert {re.sub(r"[_.]", "-", line) for line in ours} <= normal


def test_every_dependency_but_torch_has_its_hash() -> None:
    names = {re.match(r"[\w-]+", line)[0] for line in tomllib.loads(read("pyproject.toml"))["project"]["dependencies"]}  # type: ignore[index]
    assert names - set(hashed()) == {"torch"}


def test_the_lowest_releases_that_are_let_in_are_those_that_were_run() -> None:
    """But for the last number of a version: `make test` runs the newest correction of the same release."""
    pinned = (line.split("==") for line in read("constraints.txt").splitlines() if "==" in line)
    run = {re.sub(r"[-_.]+", "-", name).lower(): version.strip() for name, version in pinned}
    project = tomllib.loads(read("pyproject.toml"))["project"]
    for required in chain(project["dependencies"], *project["optional-dependencies"].values()):
        name, lowest = re.match(r"([\w-]+)[^>]*>=([\d.]+)", required).groups()  # type: ignore[union-attr]
        if name.lower() in run:  # lm-eval and grpcio-tools are no part of the set
            assert f"{run[name.lower()]}.".startswith(f"{lowest}."), required


def test_the_wheel_is_built_by_the_setuptools_that_has_a_hash() -> None:
    required = tomllib.loads(read("pyproject.toml"))["build-system"]["requires"]
    assert required == [f"setuptools=={hashed()['setuptools']}"]


@pytest.mark.parametrize("name", IMAGES[:2])
def test_only_torch_comes_from_the_index_that_is_named_for_it(name: str) -> None:
    installs = [line for line in instructions(name) if "pip --python" in line]
    from_index = [line for line in installs if "index-url" in line]
    assert len(from_index) == 1 and re.search(r'--no-deps \S+ "\$TORCH"\}? "\$TORCH"|"\$TORCH"$', from_index[0].strip())
    assert "extra-index-url" not in read(name)
    assert all("--require-hashes" in line for line in installs if "--requirement" in line)
    assert all("--no-index" in line for line in installs if "/dist" in line)


@pytest.mark.parametrize("name", IMAGES)
def test_the_base_is_a_build_argument_which_takes_a_digest(name: str) -> None:
    froms = [line.split()[1] for line in instructions(name) if line.startswith("FROM")]
    stages = {line.split()[-1] for line in instructions(name) if line.startswith("FROM") and " AS " in line}
    assert set(froms) - stages == {"${BASE}"}


@pytest.mark.parametrize("name", IMAGES[:2])
def test_an_image_in_which_something_could_install_or_change_code_is_not_built(name: str) -> None:
    lines = instructions(name)
    check = next(i for i, line in enumerate(lines) if "! command -v pip" in line)
    user = next(i for i, line in enumerate(lines) if line.startswith("USER 10001"))
    assert check > user and "-writable" in lines[check] and "command -v uv" in lines[check]
    assert not any(line.startswith(("RUN", "COPY", "USER 0")) for line in lines[check + 1 :])


def policies(name: str) -> list[dict[str, Any]]:
    return [part for part in yaml.safe_load_all(read(name)) if part["kind"] == "NetworkPolicy"]


@pytest.mark.parametrize("side", ["client", "server"])
def test_in_kubernetes_nothing_goes_out_but_what_is_named(side: str) -> None:
    closed, *others = policies(f"deploy/kubernetes/{side}.yaml")
    assert closed["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    ports = {port["port"] for p in others for rule in p["spec"].get("egress", []) for port in rule["ports"]}
    assert ports == {53, 8443 if side == "client" else 8000}


def test_a_client_in_kubernetes_reaches_one_address() -> None:
    _, out = policies("deploy/kubernetes/client.yaml")
    server, names = out["spec"]["egress"]
    assert [where["ipBlock"]["cidr"].endswith("/32") for where in server["to"]] == [True]
    assert names["to"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}]


def test_the_server_container_has_no_key_of_the_servers_certificate() -> None:
    services = yaml.safe_load(read("docker-compose.yml"))["services"]
    mounted = [v for v in services["server"]["volumes"] if "credentials" in v]
    assert mounted == ["run-credentials:/credentials/run:ro"]
    lines = services["provision"]["command"][-1].splitlines()
    copied = next(line for line in lines if line.endswith("/credentials/run/"))
    assert "server.key" not in copied
    job = next(part for part in yaml.safe_load_all(read("deploy/kubernetes/server.yaml")) if part["kind"] == "Job")
    volumes = {v["name"]: v for v in job["spec"]["template"]["spec"]["volumes"]}
    sources = [s["secret"] for s in volumes["credentials"]["projected"]["sources"]]
    assert all("items" in s and all(item["key"] != "server.key" for item in s["items"]) for s in sources)


def test_how_to_report_a_weakness_is_said() -> None:
    text = read("SECURITY.md")
    assert all(f"## {part}" in text for part in ("Reporting", "What is supported", "How the claims are checked"))
    said = read("docs/deployment.md")
    assert "--sbom=true" in said and "--provenance=mode=max" in said and "BASE=python:3.11-slim@sha256:" in said
