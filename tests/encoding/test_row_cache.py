"""A row is encoded once, whoever has it and in whatever run, as long as nothing changes by which it is encoded."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from fedlora.data.rows import Rows
from fedlora.data.schema import Schema
from fedlora.encoding.client_data import ClientData
from fedlora.encoding.encoder import Encoder
from fedlora.encoding.examples import EncodedRow
from fedlora.encoding.row_cache import EncodingRules, RowCache
from fedlora.errors import DataError
from fedlora.storage.vector_cache import VECTORS
from tests.support.models import tokenizer

TEXT, LABEL = Schema("text", ("text",)), Schema("label", ("text", "label"), ("no", "yes"))
ROWS = [{"text": f"w{i} w{i + 1}", "label": "no", "other": i} for i in range(9)]
RULES = EncodingRules(tokenizer(), TEXT, 16, Encoder(tokenizer(), TEXT, 16).limits, None)


def encoded(rows: Rows, folder: Path | None, rules: EncodingRules = RULES) -> tuple[list[Any], list[str]]:
    """The examples of rows by a cache of their own process, and the texts that were encoded for it."""
    asked: list[str] = []

    def encode(part: Rows) -> Iterator[EncodedRow]:
        asked.extend(row["text"] for row in part)
        return ((EncodedRow([{"input_ids": torch.tensor([*row["text"].encode()])}])) for row in part)

    found = RowCache(folder).encoded(rules, rows, encode)
    return [example["input_ids"].tolist() for row in found for example in row.examples], asked


def test_a_row_is_encoded_once_however_rows_are_dealt(tmp_path: Path) -> None:
    texts = [row["text"] for row in ROWS]
    assert encoded(ROWS[:6], tmp_path)[1] == texts[:6]
    assert encoded(ROWS[3:], tmp_path) == ([[*text.encode()] for text in texts[3:]], texts[6:])
    assert encoded([*ROWS[::-1], *ROWS], tmp_path) == ([[*text.encode()] for text in [*texts[::-1], *texts]], [])
    assert encoded(Dataset.from_list(ROWS), tmp_path)[1] == []  # whatever holds them
    assert encoded([*ROWS, *ROWS], tmp_path / "other")[1] == texts  # twice the same


def test_without_a_folder_nothing_is_kept(tmp_path: Path) -> None:
    assert encoded(ROWS, None) == encoded(ROWS, None) and len(encoded(ROWS, None)[1]) == 9
    assert not [*tmp_path.iterdir()]


def other_tokenizer() -> Any:
    other = tokenizer()
    other.add_tokens(["w0 w1"])
    return other


@pytest.mark.parametrize(
    "change",
    [
        {"processor": other_tokenizer()},
        {"schema": LABEL},
        {"schema": replace(TEXT, template="plain")},
        {"max_length": 17},
        {"limits": replace(RULES.limits, vocabulary=9)},
        {"decoder_inputs": torch.clone},
    ],
    ids=lambda change: "-".join(change),
)
def test_rules_that_differ_share_nothing(change: dict[str, Any], tmp_path: Path) -> None:
    encoded(ROWS, tmp_path)
    assert len(encoded(ROWS, tmp_path, replace(RULES, **change))[1]) == 9
    assert encoded(ROWS, tmp_path, replace(RULES))[1] == []


def test_what_a_call_leaves_in_a_tokenizer_does_not_make_it_another() -> None:
    t = tokenizer()
    before = replace(RULES, processor=t).digest
    t(["w1 w2 w3"], truncation=True, max_length=2, padding="max_length")
    assert replace(RULES, processor=t).digest == before == RULES.digest


def test_a_tokenizer_that_cannot_be_known_again_keeps_nothing(tmp_path: Path) -> None:
    assert replace(RULES, processor=object()).digest == ""
    assert len(encoded(ROWS, tmp_path, replace(RULES, processor=object()))[0]) == 9 and not [*tmp_path.iterdir()]


def test_a_folder_that_cannot_be_written_is_told_once_and_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    encoder = Encoder(tokenizer(), TEXT, 16, cache=RowCache(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "fedlora"):
        assert len(encoder(ROWS)) == len(encoder(ROWS)) == 9
    assert len(caplog.messages) == 1 and "set data.cache" in caplog.messages[0]


def test_damage_is_encoded_anew(tmp_path: Path) -> None:
    encoder = Encoder(tokenizer(), TEXT, 16)
    kept = replace(encoder, cache=RowCache(tmp_path))
    kept(ROWS)
    for path in tmp_path.glob(f"*/{VECTORS}"):
        path.write_bytes(bytes(path.stat().st_size))
    again = replace(encoder, cache=RowCache(tmp_path))
    assert [e["input_ids"].tolist() for e in again(ROWS)] == [e["input_ids"].tolist() for e in encoder(ROWS)]


def test_a_row_that_is_refused_is_refused_again(tmp_path: Path) -> None:
    encoder = Encoder(tokenizer(), LABEL, 16, cache=RowCache(tmp_path), limits=replace(RULES.limits, vocabulary=6))
    for _ in range(2):
        with pytest.raises(DataError, match="embedding ends at 5"):
            encoder(ROWS)


def test_no_tensor_of_a_clients_texts_stays_in_memory() -> None:
    data = ClientData(Encoder(tokenizer(), TEXT, 16), ROWS)
    assert data.train[0] is not data.train[0] and data.records[0] is not data.records[0]
    assert data.train[0]["input_ids"].tolist() == data.records[0][0]["input_ids"].tolist()


def test_records_that_are_rows_or_classified_texts_are_counted_without_encoding_them() -> None:
    unreadable = [{"text": None, "label": "no"}] * 3  # which an encoder cannot take
    assert ClientData(Encoder(tokenizer(), TEXT, 16), unreadable).client(0, 4).records == 3
    assert ClientData(Encoder(tokenizer(), LABEL, 16), unreadable, unit="example").client(0, 4).records == 3
