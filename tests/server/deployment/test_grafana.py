"""`deploy/grafana.json`: a dashboard over the metrics that a server exports, and no others."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import Failure
from fedlora.run.plan import RoundResult
from fedlora.server.deployment.prometheus import PrometheusExporter
from tests.server.deployment.test_prometheus import Quiet

BOARD = json.loads((Path(__file__).parents[3] / "deploy" / "grafana.json").read_text(encoding="utf-8"))
PANELS = BOARD["panels"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
AVERAGED = "_bucket", "_sum", "_count"  # series of a histogram
BY_GRAFANA = {"instance", "le"}  # labels that Prometheus adds


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Every series that a server exports, with its labels."""
    exporter = PrometheusExporter(Quiet())
    found = {"loss": 1.0, "accuracy": 0.5}
    record = RoundResult(1, None, (0, 1), {}, 0.5, found, None, 10, 20, 1.5).record() | {
        "epsilon": 2.0,
        "epsilon_median": 1.0,
    }
    exporter.round(record, {1: Failure("no answer")})
    exporter.waiting({0: 40.0})
    samples = [s for family in exporter.registry.collect() for s in family.samples if not s.name.endswith("_created")]
    return {sample.name: set(sample.labels) for sample in samples}


def test_every_metric_that_it_asks_for_is_exported_with_its_labels(exported: dict[str, set[str]]) -> None:
    for query in QUERIES:
        for name, chosen in re.findall(r"(fedlora_\w+)\{([^}]*)\}", query):
            assert name in exported, query
            assert set(re.findall(r"(\w+)(?:=|!=|=~)\"", chosen)) <= exported[name] | BY_GRAFANA, query
    for panel in PANELS:
        for target in panel["targets"]:
            known = set().union(*(exported[name] for name in re.findall(r"fedlora_\w+", target["expr"])))
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= known, target


def test_it_shows_every_metric_there_is(exported: dict[str, set[str]]) -> None:
    assert set(re.findall(r"fedlora_\w+", " ".join(QUERIES))) == set(exported)


def test_it_asks_for_the_server_that_is_chosen_by_the_source_that_is_chosen() -> None:
    assert [variable["name"] for variable in BOARD["templating"]["list"]] == ["datasource", "instance"]
    assert all(query.count("fedlora_") == query.count('instance=~"$instance"') for query in QUERIES)
    sources = [part["datasource"] for panel in PANELS for part in (panel, *panel["targets"])]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)


def test_its_panels_have_a_place_and_a_meaning_each() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS) and all(panel["description"] for panel in PANELS)
    places = [panel["gridPos"] for panel in PANELS]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    assert not [pair for pair in combinations(places, 2) if _overlap(*pair)]


def _overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[a] < other[a] + other[n] and other[a] < one[a] + one[n] for a, n in (("x", "w"), ("y", "h")))
