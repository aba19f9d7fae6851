"""`fedlora export --as gguf`: llama.cpp's converter is told what it needs; without it the commands are said."""

import re
from pathlib import Path

import pytest

from fedlora.config import build
from fedlora.errors import ConfigError, ExportError
from fedlora.run.export import ExportOptions, export
from fedlora.run.gguf import SCRIPT, check_convertible
from tests.support.small_run import begin, site

CONVERTER = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()  # as llama.cpp's own has it
parser.add_argument("--outfile", type=pathlib.Path)
parser.add_argument("--base", type=pathlib.Path)
parser.add_argument("--base-model-id")
parser.add_argument("lora_path", type=pathlib.Path)
given = parser.parse_args()
assert (given.base / "config.json").is_file()
r = json.loads((given.lora_path / "adapter_config.json").read_text())["r"]
given.outfile.write_bytes(b"{magic}" + bytes([r]) + given.lora_path.name.encode())
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = site(tmp_path_factory.mktemp("site"))
    return begin(place, place / "run", strategy="fedavg", rounds=1)


def converter(folder: Path, magic: str = "GGUF") -> Path:
    """A stand-in for the folder of llama.cpp."""
    folder.mkdir()
    (folder / SCRIPT).write_text(CONVERTER.replace("{magic}", magic))
    return folder


def test_the_converter_is_told_where_adapter_and_base_are(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is left is the GGUF and its card; the model is not called after a folder of this machine."""
    options = ExportOptions(llama_cpp=converter(tmp_path / "llama.cpp"))
    out = export(run, "gguf", out=tmp_path / "out", options=options)
    assert {p.name for p in out.iterdir()} == {"adapter.gguf", "README.md"}
    assert (out / "adapter.gguf").read_bytes() == b"GGUF\x02federated-adapter"
    assert "llama-cli -m base.gguf --lora adapter.gguf" in (out / "README.md").read_text()
    assert f"load it: llama-cli -m base.gguf --lora {out}/adapter.gguf" in capsys.readouterr().out


def test_what_is_no_gguf_is_refused_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    options = ExportOptions(llama_cpp=converter(tmp_path / "llama.cpp", magic="JUNK"))
    with pytest.raises(ExportError, match="made no GGUF of this adapter"):
        export(run, "gguf", out=tmp_path / "out", options=options)
    assert [p.name for p in tmp_path.iterdir()] == ["llama.cpp"]


def test_without_the_converter_the_commands_are_said(run: Path, tmp_path: Path) -> None:
    said = f"python llama.cpp/{SCRIPT} {run}/adapter --base {run.parent}/model --outfile adapter.gguf"
    with pytest.raises(ExportError, match=re.escape(said)):
        export(run, "gguf", out=tmp_path / "out", options=ExportOptions(llama_cpp=tmp_path))


@pytest.mark.parametrize(("key", "value"), [("lora.kind", "dora"), ("model.task", "classify")])
def test_what_llama_cpp_does_not_read_is_refused(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} = {value}; use --as adapter"):
        check_convertible(build({key: value}))
