"""What `mkdocs build` is told besides mkdocs.yml: the pages made from the code, and links that lead out of docs/.

The reference of commands, of settings and of the Python names is written here from the code itself. Documents that lie
elsewhere in the repository (README.md, CHANGELOG.md, ...) are pages too; a link to any other file of the repository,
which the site does not hold, is left as its text.
"""

import posixpath
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import fedlora
from fedlora import config as configuration
from fedlora.cli.app import app
from fedlora.cli.completion import choices
from fedlora.cli.listings import TYPES

ROOT = Path(__file__).parents[2]
ELSEWHERE = {  # documents beside docs/, by the page that each becomes
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "changelog.md": "CHANGELOG.md",
    "benchmarks.md": "benchmarks/README.md",
}
PAGE_OF = {source: page for page, source in ELSEWHERE.items()}
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?![a-z]+:)([^)\s#]*)((?:#[^)\s]*)?)\)")
RUNNING = ("api", "config")  # the modules of public names for running; those of the others are for strategies


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/."""
    made = {page: (ROOT / source).read_text(encoding="utf-8") for page, source in ELSEWHERE.items()}
    made |= {
        "reference/commands.md": commands(),
        "reference/settings.md": settings(),
        "reference/python.md": python(),
    }
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead the links of a document to pages of the site."""
    source = ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return LINK.sub(lambda link: _on_site(link, source, page.file.src_uri), markdown)


def _on_site(link: re.Match[str], source: str, page: str) -> str:
    """The link as it is on the site: to a page, or its text alone where the site has no such file."""
    text, target, anchor = link.groups()
    if not target:
        return link[0]
    in_repository = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    to = PAGE_OF.get(in_repository, in_repository.removeprefix("docs/"))
    if to == in_repository:
        return text
    shown = _title(in_repository) if text.endswith(".md") and in_repository.endswith(text) else text
    return f"[{shown}]({posixpath.relpath(to, posixpath.dirname(page) or '.')}{anchor})"


def _title(document: str) -> str:
    """What a document is called, where a link is named by its file."""
    return (ROOT / document).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ").partition(":")[0]


def commands() -> str:
    """Every command with its arguments and options, as its help has them."""
    from typer.main import get_command

    group = get_command(app)
    assert isinstance(group, click.Group)
    parts = [_command(name, command) for name, command in group.commands.items()]
    return "\n".join(["# Commands", "", "Made from the code, as `fedlora COMMAND --help` says it.", "", *parts])


def _command(name: str, command: click.Command) -> str:
    usage = command.get_usage(click.Context(command, info_name=f"fedlora {name}")).removeprefix("Usage: ")
    head = [f"## fedlora {name}", "", _plain(command.help or ""), "", "```text", " ".join(usage.split()), "```", ""]
    rows = [row for p in command.params for row in _parameter(p)]
    return "\n".join([*head, *(["| option | takes | meaning |", "|---|---|---|", *rows] if rows else []), ""])


def _parameter(parameter: click.Parameter) -> Iterator[str]:
    if parameter.name == "help" or getattr(parameter, "hidden", False):
        return
    kind = (
        "" if getattr(parameter, "is_flag", False) else str(parameter.make_metavar(click.Context(click.Command("x"))))
    )
    names = ", ".join(f"`{o}`" for o in (*parameter.opts, *parameter.secondary_opts))
    if isinstance(parameter, click.Argument):
        names, kind = f"`{kind}`", "argument"
    meaning = getattr(parameter, "help", None) or ""
    yield f"| {names} | {_cell(kind.lower().replace(' range', ''))} | {_cell(_plain(meaning))} |"


def _plain(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def settings() -> str:
    """Every setting with its default, what it takes, and its meaning; a heading for each section."""
    lines = [
        "# Settings",
        "",
        "Made from the code, as `fedlora settings` prints it. A key is the same in a TOML file, on the command line "
        '(`--train.lr 2e-3`), from Python (`train={"lr": 2e-3}`) and in Flower\'s run config.',
    ]
    meanings = configuration.section_meanings()
    for section, found in groupby(configuration.settings(), key=lambda setting: setting.section):
        lines += [
            "",
            f"## {section}",
            "",
            meanings[section],
            "",
            "| key | default | takes | meaning |",
            "|---|---|---|---|",
        ]
        lines += [f"| `{s.key}` | {_default(s.default)} | {_cell(_takes(s.kind))} | {_cell(s.help)} |" for s in found]
    return "\n".join([*lines, ""])


def _default(value: Any) -> str:
    text = ",".join(value) if isinstance(value, tuple) else str(value)
    return f"`{text}`" if text not in ("", "{}") else ""


def _takes(kind: Any) -> str:
    return ", ".join(choices(kind)) or TYPES.get(
        kind, "names, with commas" if kind == configuration.Names else "key=value"
    )


def python() -> str:
    """The public names of the package, and the algebra that strategies are written in."""
    lines = ["# Python names", "", "Made from the code. How they are used: [From Python](../python.md).", ""]
    for title, is_running in (("Running", True), ("Strategies", False)):
        names = sorted(name for name, module in fedlora._LATER.items() if (module in RUNNING) == is_running)
        lines += [f"## {title}", "", *(f"::: {_home(name)}\n" for name in names)]
    lines += ["## The algebra of adapters", "", "::: fedlora.lora", "    options:", "      show_root_heading: false"]
    lines += ["      show_root_toc_entry: false", "      filters: ['!^_', '!^LoRA$']", ""]
    lines += ["## Errors", "", "::: fedlora.errors", "    options:", "      show_root_heading: false"]
    return "\n".join([*lines, "      show_root_toc_entry: false", ""])


def _home(name: str) -> str:
    """The dotted path at which a public name is defined; found without torch, which importing it would load."""
    return f"fedlora.{fedlora._LATER[name]}.{name}"
