"""The report of a run: a page that opens without a network, tells what it may, and never fails a run."""

import json
import re
import shutil
import subprocess
from collections.abc import Collection
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedlora import simulate
from fedlora.errors import ConfigError, RoundFailed
from fedlora.report.page import keep_report, render, write_report
from fedlora.report.run_record import RunRecord, read
from tests.cli.test_simulate import SMALL, fedlora
from tests.support.models import make

OLD = Path(__file__).parents[1] / "storage" / "old_runs"
EVIL = "\"><img src=x onerror=alert(1)>'</style></code></title><script>alert(2)</script>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NEVER = {"script", "img", "iframe", "object", "embed", "form", "base", "audio", "video"}


class Tags(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    @classmethod
    def of(cls, page: str) -> "Tags":
        """Those of this page."""
        parsed = cls()
        parsed.feed(page)
        return parsed


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run whose clients have scores of all kinds, and what it printed."""
    place = tmp_path_factory.mktemp("report")
    make("bert", place / "model")
    for client in range(3):
        rows = [
            {"text": f"w{i % 7} w{i % 5}", "label": ("no", "yes")[(i + client) % (2 + client) > 0]} for i in range(24)
        ]
        (place / f"site_{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", place / "model", "--data", place / "site_*.jsonl", "--cohort", "3", "--rounds", "2", *SMALL]
    more = ["--train.steps", "2", "--data.holdout", "0.25", "--personal.steps", "1", "--personal.alone"]
    done = fedlora("simulate", *words, *more, "--exactness", "--out", place / "run")
    assert done.returncode == 0, done.stderr
    return place / "run", done.stdout


def test_a_run_ends_with_its_report(finished: tuple[Path, str]) -> None:
    run, said = finished
    assert f"report: {run}/report.html" in said
    text = Tags.of((run / "report.html").read_text()).text
    for part in ("Did federation help?", "Each client, worst first", "Bytes and time", "Who took part", "Settings"):
        assert part in text
    scores = json.loads((run / "personal.json").read_text())["each"]
    assert all(f"{100 * value:.1f}\u00a0%" in text for row in scores.values() for value in row.values())
    assert "client 2 (site_2.jsonl)" in text and "FedIT" in text and "of each client on its own examples" in text


def test_the_page_needs_nothing_from_elsewhere_and_runs_no_script(finished: tuple[Path, str]) -> None:
    page = (finished[0] / "report.html").read_text()
    tags = Tags.of(page).found
    assert not NEVER & {tag for tag, _ in tags} and "@import" not in page and "url(" not in page
    for tag, attributes in tags:
        assert all(not (attributes.get(name) or "").startswith(("http", "//")) for name in ("src", "href")), tag
    assert ("meta", "default-src 'none'") in [(t, (a.get("content") or "").split(";")[0]) for t, a in tags]


def test_no_path_of_the_machine_is_told(finished: tuple[Path, str]) -> None:
    assert str(finished[0].parent) not in (finished[0] / "report.html").read_text()


def poisoned(value: Any, kept: Collection[str]) -> Any:
    """The same with markup at the end of every string, of keys too, but for the words that are kept."""
    if isinstance(value, str):
        return value if value in kept else value + EVIL
    if isinstance(value, dict):
        return {poisoned(key, kept): poisoned(content, kept) for key, content in value.items()}
    return [poisoned(content, kept) for content in value] if isinstance(value, list | tuple) else value


FREE = "classes", "adapted", "versions", "names", "notes", "eval", "before"  # fields whose own fields anybody may name


def fields(value: Any) -> set[str]:
    """The names of fields in a nested object, which the program gave; not those of classes, modules and libraries."""
    if isinstance(value, dict):
        inner = (fields(v) for k, v in value.items() if k not in FREE)
        return set(value).union(*inner)
    return set().union(*map(fields, value)) if isinstance(value, list | tuple) else set()


def told_of_all(run: Path) -> RunRecord:
    """The record of a run in which everything that a report can show is there."""
    record, private = read(run), read(OLD / "private")
    last = {"answered": 2, "failed": {"1": "it said no"}, "names": {"0": "St. Mary"}, "notes": {"a note": 1.0}}
    last |= {"eval": {"accuracy": 0.5, "my metric": 0.25}, "epsilon": 3.0, "epsilon_median": 2.0}
    test = {"name": "T1", "passed": True, "measured": 1.0, "unit": "sigma", "allowed": "at most 2"}
    parts = {
        "folder": "my folder",
        "rounds": [*record.rounds, *({**record.rounds[-1], **last, "round": n} for n in (3, 4))],
        "settings": {**record.settings, "dp.epsilon": 3.0, "dp.metrics": True, "option": {"own": "text"}},
        "inputs": {**record.inputs, "warnings": ["look"], "notes": ["see"]},
        "privacy": private.privacy,
        "audit": {"passed": False, "tests": [test]},
    }
    return replace(record, **parts)


SHOWN = ("yes", "St. Mary", "it said no", "a note", "look", "see", "T1", "sigma", "at most 2", "my metric", "text")


def test_markup_in_every_string_that_somebody_chose_is_shown_as_text(finished: tuple[Path, str]) -> None:
    """Names of clients, classes, columns, metrics, tests, files and folders, reasons, settings, versions."""
    record = told_of_all(finished[0])
    kept = fields(vars(record)) | {*map(str, range(10)), "accuracy", "record", "row"}
    evil = replace(record, **{name: poisoned(value, kept) for name, value in vars(record).items()})
    clean, page = Tags.of(render([record, record])), Tags.of(render([evil, evil]))
    names = [{name for _, attributes in tags.found for name in attributes} for tags in (clean, page)]
    assert not NEVER & {tag for tag, _ in page.found} and names[0] == names[1]
    assert [text for text in SHOWN if text + EVIL not in page.text] == []
    assert all(text + EVIL in page.text for text in (record.folder, record.adapter_check, "text" + EVIL + ", label"))


def test_a_run_that_is_broken_off_leaves_the_report_of_its_rounds(finished: tuple[Path, str], tmp_path: Path) -> None:
    def ends(_: Any) -> None:
        raise RoundFailed("no more")

    with pytest.raises(RoundFailed):
        simulate(finished[0] / "config.toml", out=tmp_path / "run", progress=False, on_round=ends)
    assert "1 round of 2" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("name", [path.name for path in sorted(OLD.iterdir()) if (path / "rounds.jsonl").exists()])
def test_runs_of_older_versions_have_a_report(name: str) -> None:
    assert "Did federation help?" in render([read(OLD / name)])


def test_a_run_that_hides_clients_tells_not_how_many_were_in_a_round() -> None:
    told = read(OLD / "client_level")
    assert not {"clients", "answered", "failed", "bytes_up", "bytes_down", "seconds"} & set().union(*told.rounds)
    page = render([told])
    assert "stay with the server" in page and "sent by clients" not in page


def test_a_private_run_tells_not_of_which_classes_a_clients_rows_are(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    assert "Share of each class" in render([read(run)])
    settings = (run / "config.toml").read_text()
    (run / "config.toml").write_text(re.sub(r"(?m)^epsilon = inf", "epsilon = 3.0", settings))
    shutil.rmtree(run / "checkpoint")
    told = read(run)
    assert not any(told.inputs["data"]["classes"].values()) and "Share of each class" not in render([told])


def test_several_runs_are_compared_first(finished: tuple[Path, str], tmp_path: Path) -> None:
    out = write_report([finished[0], OLD / "private"], tmp_path / "both.html")
    text = Tags.of(out.read_text()).text
    assert "2 runs compared" in text and text.count("Did federation help?") == 2


def test_what_is_no_run_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run directory"):
        write_report([tmp_path])


def test_a_report_that_cannot_be_made_fails_no_run(
    finished: tuple[Path, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    (run / "rounds.jsonl").write_text('{"round": 1, "eval": 7}\n')
    keep_report(run)
    assert "no report was made" in caplog.text


WIDTHS = 'frame.contentDocument.documentElement.scrollWidth + " of " + frame.clientWidth'
ROWS = """[...frame.contentDocument.querySelectorAll("pre code")].map(
  code => new Set([...code.getClientRects()].map(line => line.top)).size
    + " of " + code.textContent.split("\\n").length)"""


def measured(page: str, place: Path, what: str) -> list[tuple[int, ...]]:
    """The pairs of numbers that a script finds of the page at the widths of a desktop and a phone."""
    frames = (
        f'<iframe srcdoc="{escape(page)}" style="width: {w}px; height: 900px; border: 0"></iframe>' for w in (1280, 390)
    )
    script = f"""<script>window.onload = () => {{
      document.title = [...document.querySelectorAll("iframe")].flatMap(frame => {what}).join(", ") }};</script>"""
    (place / "page.html").write_text(f"<!doctype html><title>none</title>{script}{''.join(frames)}")
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={place}/profile", "--dump-dom"]
    command = [str(CHROMIUM), *words, f"file://{place}/page.html"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return [tuple(map(int, pair)) for pair in re.findall(r"(\d+) of (\d+)", shown[: shown.index("</title>")])]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian's package)")
def test_in_a_browser_nothing_is_wider_than_a_desktops_or_a_phones_window(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    found = measured((finished[0] / "report.html").read_text(), tmp_path, WIDTHS)
    assert [window for _, window in found] == [1280, 390] and all(width <= window for width, window in found)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian's package)")
def test_in_a_browser_no_command_is_broken_within_a_word_or_an_option(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    found = measured((finished[0] / "report.html").read_text(), tmp_path, ROWS)
    assert found and all(rows == lines for rows, lines in found)
