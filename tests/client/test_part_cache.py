"""The parts that a client keeps are a cache: whatever happens to a file of it, the part is asked for again."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedlora.client import part_cache
from fedlora.client.part_cache import PartStore
from fedlora.jobs import Job
from fedlora.messages import codec
from fedlora.messages.envelope import unpack
from fedlora.messages.parts import Parts
from tests.support.adapters import factors
from tests.support.damage import DAMAGE


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_part_is_asked_for_again_and_replaced(how: str, tmp_path: Path) -> None:
    parts = Parts().of(Job(factors(1)))
    whole = codec.read_job(unpack(codec.JobEncoder().job(Job(factors(1)), parts, parts)))
    short, name = replace(whole, sent={}), whole.names[0]
    PartStore(tmp_path).take(whole)
    part_cache._recent.clear()  # as in a process that has just begun
    DAMAGE[how](tmp_path / f"{name}.part")
    assert PartStore(tmp_path).take(short)[1] == (name,)
    taken, missing = PartStore(tmp_path).take(whole)
    assert not missing and taken.keys() == {*whole.names}
    assert not PartStore(tmp_path).take(short)[1]
