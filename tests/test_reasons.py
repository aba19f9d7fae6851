"""The reasons that may leave a client: a fixed list, in which nothing of the client's own can stand."""

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora import errors
from fedlora.errors import Failure, FailureKind, FedloraError, LedgerError
from fedlora.reasons import ReasonCode

SECRET = "patient 0, ssn 100-45-6000"
ONE_SENTENCE = {errors.PrivateJobFailed}  # which has no words of its own
ERRORS = {cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, FedloraError)} - ONE_SENTENCE
BY_NAME = sorted(ERRORS, key=lambda cls: cls.__name__)
SERVERS_OWN = {FailureKind.LATE, FailureKind.OFFLINE, FailureKind.REFUSED}  # which no client can know of itself


@pytest.mark.parametrize("code", ReasonCode)
def test_every_code_has_a_sentence_and_a_kind_that_a_client_may_give(code: ReasonCode) -> None:
    assert code.sentence.isprintable() and len(code.sentence) > 20 and code.kind not in SERVERS_OWN
    assert Failure.told(code) == Failure(code.sentence, code.kind, code)


@pytest.mark.parametrize("error", [*BY_NAME, ValueError, OSError, MemoryError], ids=lambda cls: cls.__name__)
def test_of_an_errors_own_words_nothing_is_in_what_leaves_or_is_passed_on(error: type[Exception]) -> None:
    failure = Failure.because_of(error(SECRET))
    assert SECRET in failure.reason and failure.code is not None
    assert SECRET not in failure.public + failure.code + Failure.told(failure.code).reason


@given(st.text() | st.sampled_from([" ", "", "budget ", "BUDGET", f"data: {SECRET}"]))
def test_whatever_a_client_says_instead_of_a_code_is_not_shown(word: str) -> None:
    if word not in list(ReasonCode):
        assert Failure.told(word) == Failure("it gave no reason that is known here")


def test_an_error_may_have_a_more_exact_code_than_its_class() -> None:
    assert LedgerError("x").code == ReasonCode.LEDGER
    assert LedgerError("x", code=ReasonCode.BUDGET).code == ReasonCode.BUDGET
