"""An error reply is shown in the server's own words: its code and its text come from a client."""

import pytest
from flwr.app import Error

from fedlora.errors import FailureKind, ReasonCode
from fedlora.server.replies import KIND_OF_CODE, read_error

WORDS = "client 0 failed\x1b[2J\nround 3: ssn 100-45-6000"


@pytest.mark.parametrize("code", [*KIND_OF_CODE, 0, 1, 2, 6, 10**9, -1])
def test_no_word_of_an_error_reply_is_shown(code: int) -> None:
    failure = read_error(Error(code, WORDS))
    assert "ssn" not in failure.reason and failure.reason.isprintable()
    assert failure.kind == KIND_OF_CODE.get(code, FailureKind.ERROR)


@pytest.mark.parametrize("said", ["", " ", "\n", None])
def test_a_blank_error_reply_is_a_failure_like_others(said: str) -> None:
    assert read_error(Error(2, said)).kind == FailureKind.ERROR
    assert read_error(Error(2, said), tells_all=True).reason == "Flower's error 2"


def test_a_code_is_shown_in_its_sentence() -> None:
    assert read_error(Error(2, "budget")).reason == ReasonCode.BUDGET.sentence
