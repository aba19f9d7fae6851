"""A run says what it is about to do before it does it, and what looks wrong in it."""

import json
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fedlora import config
from fedlora.api import new_run, run
from fedlora.errors import DataError, ModelError
from fedlora.run.console import ConsoleProgress
from fedlora.run.preview import Preview, _class_line
from fedlora.run.setup import for_client, for_server, prepare
from tests.support.models import make

ENDING = " w1 w2 w3"


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make("bert", tmp_path_factory.mktemp("bert")))


def previewed(model: str, data: str, **settings: Any) -> Preview:
    given = {"model.path": model, "data.path": data, "data.eval_share": 0.0, "lora.rank": 2, **settings}
    return prepare(config.build(given)).preview


def test_sizes_columns_and_classes_are_told(bert: str, tmp_path: Path) -> None:
    for client, count in enumerate((4, 6, 20)):
        rows = [{"text": f"w{i}", "label": ["no", "yes"][i % 2], "note": "w1 w2", "id": i} for i in range(count)]
        write(tmp_path / f"client_{client}.jsonl", rows)
    found = previewed(bert, str(tmp_path / "client_*.jsonl"))
    assert found.lines()[:3] == [
        "data: 30 training rows of 3 clients (smallest 4, median 6, largest 20), none for the evaluation",
        "columns used: text, label (label); not used: note",
        "classes: no 15, yes 15",
    ]
    assert "adapter on query (2), value (2) in 2 of 2 layers; trained whole: classifier" in found.lines()


def test_tokens_are_told_with_how_many_rows_are_cut(llama: str, tmp_path: Path) -> None:
    rows = [{"prompt": "w1", "response": "w2" + ENDING * (i // 9 * 10)} for i in range(10)]
    found = previewed(llama, write(tmp_path / "x.jsonl", rows), clients=1, **{"model.max_length": 16})
    assert found.tokens and (found.tokens.rows, found.tokens.cut, found.tokens.unlearned) == ((10,), 1, (0,))
    assert found.tokens.longest > 30 > 8 > found.tokens.median
    assert not found.warnings  # not more than a tenth
    rows += rows[-1:]
    found = previewed(llama, write(tmp_path / "x.jsonl", rows), clients=1, **{"model.max_length": 16})
    assert any("2 of 11 rows are cut at model.max_length = 16" in warning for warning in found.warnings)


def test_texts_that_are_split_are_not_called_cut(llama: str, tmp_path: Path) -> None:
    rows = [{"text": "w1 w2 w3 " * 6} for _ in range(10)]  # one block, and a rest that is too short for another
    found = previewed(llama, write(tmp_path / "x.jsonl", rows), clients=1, **{"model.max_length": 16})
    assert found.tokens and found.tokens.cut == 0 and not found.warnings


def ending_on(question: str) -> dict[str, Any]:
    """A conversation of which a long question leaves nothing to learn, as its end is what is kept."""
    turns = [("user", "w1"), ("assistant", "w2 w3"), ("user", question)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture(scope="module")
def chatty(llama: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = shutil.copytree(llama, tmp_path_factory.mktemp("chatty") / "model")
    template = "{% for m in messages %}{{ m['content'] }} </s> {% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


def test_a_client_with_nothing_to_learn_is_named_with_its_file(chatty: str, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [ending_on("w1")] * 40)
    write(tmp_path / "b.jsonl", [ending_on("w1 " * 40)] * 3)
    found = previewed(chatty, str(tmp_path / "*.jsonl"), **{"model.max_length": 16})
    assert "client 1 (b.jsonl) will fail its rounds: of 3 rows none has a token to learn within 16" in found.warnings
    assert found.tokens and found.tokens.unlearned == (0, 3)
    assert "3 rows with nothing to learn" in found.lines()[2]


def test_data_with_nothing_to_learn_are_refused_before_the_start(chatty: str, tmp_path: Path) -> None:
    data = write(tmp_path / "x.jsonl", [ending_on("w1 " * 40)] * 4)
    with pytest.raises(DataError, match=r"of 4 rows none has a token to learn within model\.max_length = 16"):
        _ = previewed(chatty, data, clients=2, **{"model.max_length": 16})


def test_of_large_data_every_client_is_looked_at_in_part(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlora.run.preview.MOST_ROWS", 50)
    found = previewed(llama, write(tmp_path / "x.jsonl", [{"text": f"w{i} w2"} for i in range(300)]), clients=3)
    assert found.tokens and sum(found.tokens.rows) == 60
    assert "of a sample of 60 rows" in found.lines()[2]


def test_a_run_shows_it_first_and_keeps_it_as_json(bert: str, tmp_path: Path) -> None:
    rows = [{"text": f"w{i % 9}", "label": i % 2} for i in range(24)]
    given = {"model": bert, "data": write(tmp_path / "x.jsonl", rows), "strategy": "fedsa_lora", "rounds": 1}
    given |= {"clients": 2, "cohort": 2, "train.steps": 1, "lora.rank": 2, "data.holdout": 0.3}
    settings = {config.SHORT.get(key, key): value for key, value in given.items()}
    screen = ConsoleProgress(Console(file=StringIO(), highlight=False, soft_wrap=True))
    folder, chosen = new_run({}, settings, tmp_path / "out")
    done = run(screen, folder, chosen)
    said = screen._console.file.getvalue()  # type: ignore[attr-defined]
    assert said.index("columns used: text, label") < said.index("before training") < said.index("clients' mean")
    kept = json.loads((done.folder / "inputs.json").read_text())
    assert kept["data"]["used"] == ["text", "label"] and sum(map(sum, kept["data"]["classes"].values())) > 10
    own = done.rounds[-1]["eval_clients"]
    assert f"{own['metric']} {own['mean']:.4g}" in said  # in the table: the clients' own scores, not the server's
    assert "clients keep side B and the head to themselves, so there is no common model" in said
    assert f"{own['metric']}: " not in said  # nor a model's that nobody trained


def test_each_side_of_a_deployment_tells_of_its_own_data(bert: str, tmp_path: Path) -> None:
    rows = [{"text": f"w{i % 9}", "label": i % 2} for i in range(9)]
    write(tmp_path / "mine.jsonl", rows)
    write(tmp_path / "eval.jsonl", rows[:4])
    agreed = {"model.path": bert, "lora.rank": 2, "clients": 2, "data.labels": "0,1"}
    server = for_server(config.build(agreed, {"data.eval": str(tmp_path / "eval.jsonl")}), 2).preview
    mine = {"data.path": str(tmp_path / "mine.jsonl"), "data.labels": "0,1", "model.path": bert}
    client = for_client(agreed, mine, 1).preview
    assert server.data.sizes == () and server.data.evaluation == 4 and server.tokens and server.tokens.of == 4
    assert client.data.sizes == (9,) and client.data.evaluation == 0


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(folder)
    ViTImageProcessorPil(do_resize=False).save_pretrained(folder)
    return folder


def images(folder: Path, *sizes: tuple[int, int]) -> str:
    rows = []
    for i, size in enumerate(sizes):
        Image.fromarray(np.full(size[::-1], 700 * i, np.uint16)).save(folder / f"{i}.png")
        rows.append({"image": str(folder / f"{i}.png"), "label": i % 2})
    return write(folder / "x.jsonl", rows)


def test_images_of_several_sizes_are_refused_where_the_model_leaves_them_so(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"16 x 16 to 16 x 24 pixels, and the model's image processor leaves sizes"):
        _ = previewed(str(vit), images(tmp_path, (16, 16), (16, 24)), clients=1)


def test_images_are_told_with_sizes_and_modes(vit: Path, tmp_path: Path) -> None:
    found = previewed(str(vit), images(tmp_path, (16, 16), (16, 16)), clients=1)
    assert "images: 2 of 16 x 16 pixels; modes: I;16 2" in found.lines()
    assert any("dark: the brightest pixel has 1.1% of white" in warning for warning in found.warnings)


def test_an_image_of_a_size_that_the_model_does_not_take_is_refused_in_a_sentence(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the model refuses an image of 3 x 20 x 20, .* Input image size"):
        _ = previewed(str(vit), images(tmp_path, (20, 20), (20, 20)), clients=1)


def test_texts_that_the_tokenizer_does_not_know_are_told(llama: str, tmp_path: Path) -> None:
    found = previewed(llama, write(tmp_path / "x.jsonl", [{"text": "w1 hello there w2"}] * 4), clients=1)
    assert found.warnings == (
        "33% of the tokens are of what the tokenizer does not know: is the model for such texts?",
    )


def test_blanks_at_an_end_of_a_class_are_seen() -> None:
    assert _class_line({"yes": [2], "yes ": [1]}) == 'classes: yes 2, "yes " 1'
