"""A client whose data have nothing to learn fails alone, and the others' round goes on."""

from pathlib import Path

from fedlora.checks.small_models import small_model
from fedlora.encoding.client_data import ClientData
from fedlora.errors import Failure
from fedlora.jobs import Job
from fedlora.simulations.serial import Serial


def test_a_client_without_anything_to_learn_fails_alone(tmp_path: Path) -> None:
    small = small_model("llama")
    empty = ClientData(small.model.encoder, [{"text": ""}] * 3, [{"text": ""}])
    fleet = Serial(small.model, [small.clients[0], empty], [2, 2], tmp_path)
    job = Job(small.start)
    answers = dict(fleet.train({0: job, 1: job}))
    assert not isinstance(answers[0], Failure)
    assert isinstance(answers[1], Failure) and "no row of its data has a token to learn" in answers[1].reason
    assert [row.learned for row in empty.encoded] == [0, 0, 0]
    assert fleet.evaluate({1: job})[1].examples == 0
