"""The documents for people: every file, folder and module that they name is there."""

import doctest
import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
FOLDERS = ("server", "client", "strategies", "simulations", "fedlora", "benchmarks", "deploy", "docs", "tests", ".ci")
NOT_OURS = ("fedlora.client.v1",)  # names with dots that are no modules


def text(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def paths(document: Path) -> Iterator[str]:
    """Files and folders of this repository that stand in the document, with or without * for any name."""
    folders = "|".join(map(re.escape, FOLDERS))
    yield from re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./*-]*[\w/*])", text(document))


def links(document: Path) -> Iterator[str]:
    """Where the document's links to other files lead, without the place in the file."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text(document)):
        if "://" not in target:
            yield target.partition("#")[0]


def modules(document: Path) -> set[str]:
    """Modules of the package, and names in them, as `fedlora.lora.average`."""
    named = re.findall(r"(?<![\w./-])(fedlora(?:\.[A-Za-z_]\w*)+)", text(document))
    return {name for name in named if not name.startswith(NOT_OURS)}


def exists(name: str) -> bool:
    """Is there a module of this name, or one that has its last part?"""
    module, _, last = name.rpartition(".")
    return _is_module(name) or (_is_module(module) and hasattr(import_module(module), last))


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_path_that_a_document_names_is_there(document: Path) -> None:
    missing = [path for path in paths(document) if not list(ROOT.glob(path))]
    assert not missing, f"{document.name} names what is not there: {missing}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_of_a_document_leads_to_a_file(document: Path) -> None:
    missing = [target for target in links(document) if target and not (document.parent / target).exists()]
    assert not missing, f"{document.name} links to what is not there: {missing}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_that_a_document_names_is_there(document: Path) -> None:
    missing = [name for name in modules(document) if not exists(name)]
    assert not missing, f"{document.name} names modules that are not there: {missing}"


def test_paths_are_found_in_the_documents() -> None:
    """So that the tests above look at something."""
    found = set(paths(ROOT / "CONTRIBUTING.md"))
    assert {"client/training.py", "server/upload_checks.py", "fedlora/cli/", "strategies/fedavg.py"} <= found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_test_that_a_document_names_is_there(document: Path) -> None:
    """A test is named by its file, then its function, each between backquotes."""
    named = re.findall(r"`(tests/[\w/]+\.py)`\s+`(test_\w+)`", text(document))
    missing = [(file, name) for file, name in named if f"def {name}(" not in (ROOT / file).read_text()]
    assert not missing, f"{document.name} names tests that are not there: {missing}"


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["title"] == project["name"] and citation["version"] == project["version"]
    assert citation["license"] == project["license"] and citation["authors"] and citation["cff-version"] == "1.2.0"


def test_the_site_is_made_of_every_document() -> None:
    """`make docs` says it too; here it is said without the site's libraries."""
    named = set(re.findall(r"([\w/.-]+\.md)$", text(ROOT / "mkdocs.yml"), re.MULTILINE))
    assert {p.name for p in ROOT.glob("docs/*.md")} <= named


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_python_of_a_document_is_python(document: Path) -> None:
    """That it does what the page says is for the tests of the pages that are run: `tests/test_api.py` and others."""
    for block in re.findall(r"^```python\n(.*?)^```", text(document), re.DOTALL | re.MULTILINE):
        source = doctest.script_from_examples(block) if block.startswith(">>>") else block
        compile(source, str(document), "exec")
