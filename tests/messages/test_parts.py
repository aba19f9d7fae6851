"""Adapters as vectors, and who holds which part."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fedlora.lora import LoRA
from fedlora.messages.parts import Parts, PartTracker
from fedlora.strategy import Job, Update
from fedlora.vectors import flatten, unflatten
from tests.support.adapters import factors


@given(st.integers(0, 99), st.integers(1, 6), st.sampled_from(["A", "BH", "ABH", ""]))
def test_an_adapter_comes_back_from_its_vector(seed: int, rank: int, sides: str) -> None:
    lora = factors(seed, rank).only(sides)
    flat = flatten(lora, torch.float64)
    assert_close(vars(unflatten(flat.vector, flat.manifest)), vars(lora), rtol=0, atol=0)


def test_the_name_is_of_the_content() -> None:
    assert flatten(factors(1)).name == flatten(factors(1)).name != flatten(factors(2)).name
    assert flatten(factors(1)).name != flatten(factors(1), torch.bfloat16).name


def test_a_manifest_that_does_not_fit_its_vector_is_refused() -> None:
    flat = flatten(factors(1))
    with pytest.raises(ValueError, match="the vector has"):
        unflatten(flat.vector[:-1], flat.manifest)


def test_what_a_client_holds_does_not_cross_the_wire_again() -> None:
    parts, traffic, frozen = Parts(), PartTracker(), factors(1).only("A")
    first = traffic.send(0, parts.of(Job(start=factors(2).only("B").over(frozen))))
    then = traffic.send(0, parts.of(Job(start=factors(3).only("B").over(frozen))))
    assert set(first) == {"A", "B"} and set(then) == {"B"}
    assert traffic.down == 4 * sum(t.numel() for x in (first, then) for f in x.values() for t in [f.vector])


def test_only_new_residuals_cross_the_wire() -> None:
    parts, traffic, residuals = Parts(), PartTracker(), [factors(i).only("AB") for i in (1, 2)]
    traffic.send(0, parts.of(Job(start=LoRA(), offset=(residuals[0],))))
    assert set(traffic.send(0, parts.of(Job(start=LoRA(), offset=tuple(residuals))))) == {"offset 1"}
    assert set(traffic.send(1, parts.of(Job(start=LoRA(), offset=tuple(residuals))))) == {"offset 0", "offset 1"}


def test_uploads_count_what_is_shared() -> None:
    traffic = PartTracker()
    traffic.receive(Update(factors(1).only("B"), 1, 0.0))
    assert traffic.up == 4 * sum(b.numel() for b in factors(1).B.values())
