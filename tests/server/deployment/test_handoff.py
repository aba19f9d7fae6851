"""The files between `fedlora server` and the ServerApp, damaged: as if they were not there, and never a traceback."""

from pathlib import Path

import pytest

from fedlora.errors import CheckpointError
from fedlora.server.deployment.handoff import Handoff, RunOrder, Status
from tests.support.damage import DAMAGE


@pytest.fixture
def handoff(tmp_path: Path) -> Handoff:
    made = Handoff(tmp_path)
    made.put_order(RunOrder({"rounds": 7}, {"a": 0}, None))
    made.put_status(Status("finished"))
    (tmp_path / "rounds.jsonl").write_text('{"round": 1}\n{"round": 2}\n')
    return made


def test_what_was_asked_and_done_is_read_back(handoff: Handoff) -> None:
    assert handoff.ordered_rounds() == 7 and handoff.status() == Status("finished") and handoff.rounds() == 2


@pytest.mark.parametrize("how", sorted({*DAMAGE} - {"one bit"}))
def test_a_damaged_order_or_status_is_as_good_as_none(how: str, handoff: Handoff) -> None:
    for name in ("order.json", "status.json"):
        DAMAGE[how](handoff.flower / name)
    assert handoff.ordered_rounds() == 0 and handoff.status() is None


@pytest.mark.parametrize("content", ["3", "null", "[]", '{"given": {}}', '{"given": {"rounds": "many"}}'])
def test_nor_does_an_order_of_another_form(content: str, handoff: Handoff) -> None:
    (handoff.flower / "order.json").write_text(content)
    assert handoff.ordered_rounds() == 0


def test_a_folder_in_the_place_of_a_file_is_one_sentence(handoff: Handoff) -> None:
    for name in ("flower/status.json", "rounds.jsonl"):
        DAMAGE["folder"](handoff.run / name)
    assert handoff.rounds() == 0
    with pytest.raises(CheckpointError, match=r"status\.json could not be written: Is a directory"):
        handoff.put_status(Status("running"))
