"""A client that Flower's own commands start is told all of its settings by a server that may be elsewhere."""

from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, RecordDict

from fedlora.client import in_process
from fedlora.config import Config
from fedlora.errors import ConfigError


def test_no_server_has_such_a_client_keep_its_texts_on_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Config]()

    def prepare(config: Config) -> None:
        asked.append(config)
        raise ConfigError("that is enough")

    monkeypatch.setattr(in_process, "prepare", prepare)
    who = RecordDict({"head": ConfigRecord({"json": "{}"})})
    for cache in ("auto", str(tmp_path)):
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={"data.cache": cache})
        in_process.handle("who", who, context)
    assert [config.data.cache for config in asked] == ["off", "off"]
