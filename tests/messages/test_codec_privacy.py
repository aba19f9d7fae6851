"""The messages of private rounds: terms and masks come back as they were, and what was not asked for is refused."""

import pytest
import torch

from fedlora.errors import WireError
from fedlora.jobs import MaskingTerms, PrivacySpent, PrivacyTerms, SecAggStep
from fedlora.lora import LoRA
from fedlora.messages import codec
from fedlora.messages.envelope import unpack
from fedlora.messages.parts import Parts, PartTracker
from fedlora.privacy.masked_update import size
from fedlora.server import upload_checks
from fedlora.strategy import Job, Update
from tests.messages.test_codec import receive, send
from tests.support.adapters import factors

TERMS = PrivacyTerms(noise=1.1, clip=0.5, head_share=0.3, rate=0.02, steps=7, delta=1e-6, seeded=True, known=4)
MASKING = MaskingTerms(
    context="round 3 (a1)", weight=0.25, reach=1.0, members=4, inbox={1: "00ff", 2: "abcd"}, clip=0.7
)
START = factors(1, dtype=torch.float32)
MASKED = Job(START, shares="AB", masking=MASKING)


def test_terms_and_masks_come_back() -> None:
    job = Job(START, privacy=TERMS, masking=MASKING, metrics=False, sketch={"q": (0, 2)})
    back = receive(codec.read_job(unpack(send(job))))
    assert (back.privacy, back.masking, back.metrics, back.sketch) == (TERMS, MASKING, False, {"q": (0, 2)})


def test_what_a_ledger_says_comes_back_and_no_loss_is_none() -> None:
    update = Update(START, 9, None, PrivacySpent(epsilon=2.5, charges=3))
    back = upload_checks.validated_update(unpack(codec.pack_update(update, 0)), Job(START, privacy=TERMS))
    assert isinstance(back, Update) and (back.loss, back.spent) == (None, PrivacySpent(epsilon=2.5, charges=3))
    with pytest.raises(WireError, match="the job was not a private one"):
        upload_checks.validated_update(unpack(codec.pack_update(update, 0)), Job(START))


def test_a_masked_update_comes_back_and_is_counted() -> None:
    numbers = torch.randint(-(2**31), 2**31 - 1, (size(MASKED),), dtype=torch.int64).to(torch.int32)
    update, traffic = Update(LoRA(), 9, None, masked=numbers), PartTracker()
    back = upload_checks.validated_update(unpack(codec.pack_update(update, 0)), MASKED)
    assert isinstance(back, Update) and back.masked is not None and torch.equal(back.masked, numbers)
    traffic.receive(back)
    assert traffic.up == 4 * size(MASKED)


def test_a_vector_has_a_place_for_the_loss_and_for_the_clips_bit() -> None:
    numbers = sum(t.numel() for s in "AB" for t in START.side(s).values())
    assert size(MASKED) == numbers + 2
    assert (
        size(
            Job(
                START,
                shares="AB",
                metrics=False,
                masking=MaskingTerms(context="c", weight=1.0, reach=1.0, members=3, inbox={}),
            )
        )
        == numbers
    )


@pytest.mark.parametrize("wrong", ["plain", "short", "asked for plain"])
def test_an_update_that_was_not_asked_for_so_is_refused(wrong: str) -> None:
    """A plain one where masks were asked for would give its client away, and does not fit a masked sum."""
    masked = Update(LoRA(), 1, None, masked=torch.zeros(size(MASKED) - (wrong == "short"), dtype=torch.int32))
    sent = codec.pack_update(Update(START.only("AB"), 1, 0.5) if wrong == "plain" else masked, 0)
    with pytest.raises(WireError, match="the job asked for"):
        upload_checks.validated_update(unpack(sent), Job(START, shares="AB") if wrong == "asked for plain" else MASKED)


def test_steps_of_secure_aggregation_come_back() -> None:
    ask = SecAggStep(
        "share", "round 1 (ff)", roster={3: ("aa" * 32, "bb" * 32, "cc" * 32)}, threshold=3, survivors=(1, 2)
    )
    assert codec.read_secagg_step(unpack(codec.pack_secagg_step(ask))) == ask
    assert upload_checks.read_secagg_reply(unpack(codec.pack_secagg_reply({"1": "00", "2": "ff"}))) == {
        "1": "00",
        "2": "ff",
    }


def test_a_step_that_does_not_exist_is_refused() -> None:
    with pytest.raises(WireError, match="step"):
        codec.read_secagg_step(unpack(codec.pack_secagg_step(SecAggStep("steal", "round 1"))))  # type: ignore[arg-type]


def test_a_client_that_never_heard_of_privacy_is_sent_none() -> None:
    parts = Parts().of(Job(START))
    order = codec.read_job(unpack(codec.JobEncoder().job(Job(START), parts, parts)))
    assert order.head.privacy is None and order.head.masking is None and order.head.metrics
