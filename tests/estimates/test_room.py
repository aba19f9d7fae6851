"""What does not fit is refused, with what would; amounts of memory are read and written as people do."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedlora.config import build
from fedlora.errors import ConfigError, MemoryShort
from fedlora.estimates.live_bytes import LiveBytes
from fedlora.estimates.memory import StepMemory
from fedlora.estimates.remedies import Needs, refuse_large_base, refuse_what_does_not_fit
from fedlora.estimates.room import amount, free, words

STEP = StepMemory(fixed=10_000_000, per_row=20_000_000, per_client=1_000_000)
NEEDS = Needs(begins=500_000_000, base=100_000_000, rows=16, clients=1, step=STEP, serving=0, allowance=1.0)


@pytest.mark.parametrize(("text", "nbytes"), [("16GB", 16e9), ("1.5 gb", 1.5e9), ("800MB", 8e8), ("2TB", 2e12)])
def test_an_amount_of_memory_is_read(text: str, nbytes: float) -> None:
    assert amount(text) == nbytes


@pytest.mark.parametrize("text", ["16", "GB", "-1GB", "16GiBs", "nan GB"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="16GB"):
        amount(text)


def test_bytes_are_written_in_three_digits() -> None:
    assert [*map(words, (1_234, 999_600, 81_250_000, 999_700_000))] == ["1.23 kB", "1 MB", "81.2 MB", "1 GB"]


def test_there_is_memory_here() -> None:
    assert free(torch.device("cpu")) > 100e6


def test_a_run_that_fits_is_not_refused() -> None:
    refuse_what_does_not_fit(NEEDS, build({"engine": "serial", "train.batch_size": 16}), 830_000_000)


def test_a_batch_that_fits_is_named_and_does_fit() -> None:
    config = build({"engine": "serial", "train.batch_size": 16})
    with pytest.raises(MemoryShort) as refused:
        refuse_what_does_not_fit(NEEDS, config, 700_000_000)
    assert "830 MB and there are 700 MB" in str(refused.value)
    assert "train.batch_size = 9 with train.accumulate = 2" in str(refused.value)
    assert "model.max_length = 64" in str(refused.value) and "model.dtype = bfloat16" in str(refused.value)
    assert NEEDS.of(rows=9) <= 700_000_000 < NEEDS.of(rows=10)


def test_a_pass_over_many_clients_that_does_not_fit_may_be_done_one_by_one() -> None:
    many = Needs(begins=500_000_000, base=0, rows=8, clients=300, step=STEP, serving=0, allowance=1.0)
    with pytest.raises(MemoryShort, match="engine = serial"):
        refuse_what_does_not_fit(many, build({"train.batch_size": 8}), 800_000_000)


def test_where_nothing_fits_a_smaller_model_is_named() -> None:
    with pytest.raises(MemoryShort, match="a smaller model"):
        refuse_what_does_not_fit(NEEDS, build({"engine": "serial", "model.dtype": "bfloat16"}), 100_000_000)


def test_a_base_that_is_too_large_is_refused_by_its_files_before_it_is_loaded(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1000, 30_000)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    config = build({"model.path": str(tmp_path)})
    refuse_large_base(config, 530_000_000)
    with pytest.raises(MemoryShort, match=r"30 M numbers.*model.dtype = bfloat16 \(60 MB\).*at most 25 M numbers"):
        refuse_large_base(config, 500_000_000)


def test_bytes_of_tensors_are_counted_while_they_live_and_views_are_not() -> None:
    outside = torch.ones(1000)
    with LiveBytes() as live:
        made = outside * 2  # 4000 bytes
        view, _same = made[:10], outside.view(10, 100)
        assert (live.now, live.peak) == (4000, 4000)
        del made
        assert live.now == 4000, "the view holds it"
        del view
        assert (live.now, live.peak) == (0, 4000)
        live.begin_peak()
        assert live.peak == 0
