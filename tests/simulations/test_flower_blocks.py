"""A block of clients travels as one message, and each is answered as if it were alone."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import RecordDict

from fedlora.checks.small_models import small_model
from fedlora.client import handlers
from fedlora.client.handlers import ClientContext
from fedlora.client.part_cache import PartStore
from fedlora.client.runner import JobRunner
from fedlora.jobs import Job, PrivacyTerms, Update
from fedlora.messages import codec, envelope
from fedlora.messages.parts import Parts
from fedlora.sections import Training
from fedlora.server.upload_checks import validated_update
from fedlora.simulations.flower_blocks import answer_block, pack, unpack

SMALL = small_model("bert")
JOB = Job(SMALL.start, training=Training(lr=1e-2, batch_size=3, steps=2, optimizer="sgd"), metrics=True)
TERMS = PrivacyTerms(noise=1.0, clip=1.0, head_share=0.5, rate=0.5, steps=2, delta=1e-3, seeded=True)


@pytest.fixture(autouse=True)
def no_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass draws dropout once for all of its clients, so that no client has the draws that it has alone."""
    for drop in (m for m in SMALL.model.net.modules() if isinstance(m, torch.nn.Dropout)):
        monkeypatch.setattr(drop, "p", 0.0)


def message(job: Job) -> RecordDict:
    parts = Parts().of(job)
    return envelope.stamp(codec.JobEncoder("").job(job, parts, parts), "run")


def client(folder: Path, i: int) -> ClientContext:
    runner = JobRunner(i, SMALL.clients[i], folder / str(i))
    return ClientContext(SMALL.model, runner, PartStore(runner.folder), 2)


def in_a_block(
    folder: Path, contents: Mapping[int, RecordDict | str], apart: bool = False
) -> dict[int, RecordDict | str]:
    return unpack(answer_block("train", pack(contents), lambda i, _: client(folder, i), apart=apart))


def test_what_is_packed_comes_out() -> None:
    told = {0: message(JOB), 12: "no data", 1: message(replace(JOB, round=1))}
    out = unpack(pack(told))
    assert out[12] == "no data" and set(out) == set(told)
    for i in (0, 1):
        there, here = out[i], told[i]
        assert isinstance(there, RecordDict) and isinstance(here, RecordDict)
        assert vars(envelope.unpack(there)) == vars(envelope.unpack(here))


@pytest.mark.parametrize(
    ("job", "apart", "close"),
    [(JOB, False, 1e-5), (replace(JOB, privacy=TERMS, metrics=False), False, 0.0), (JOB, True, 0.0)],
    ids=["plain", "private", "hidden"],
)
def test_a_block_s_updates_are_those_of_each_by_itself(job: Job, apart: bool, close: float, tmp_path: Path) -> None:
    """Bit for bit where they may not depend on who else is there."""
    together = in_a_block(tmp_path / "a", {i: message(job) for i in range(3)}, apart)
    for i in range(3):
        alone = handlers.handle("train", message(job), lambda _, i=i: client(tmp_path / "b", i))
        here = together[i]
        assert isinstance(alone, RecordDict) and isinstance(here, RecordDict)
        updates = [validated_update(envelope.unpack(records), job) for records in (here, alone)]
        assert isinstance(updates[0], Update) and isinstance(updates[1], Update)
        for side, module, t in updates[0].lora.matrices():
            torch.testing.assert_close(t, updates[1].lora.side(side)[module], atol=close, rtol=0)


def test_one_that_fails_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    broken = replace(JOB, start=replace(SMALL.start, B={m: b + float("nan") for m, b in SMALL.start.B.items()}))
    answers = in_a_block(tmp_path, {0: message(JOB), 1: message(broken), 2: message(JOB)})
    assert isinstance(answers[1], str) and "nan" in answers[1]
    assert all(isinstance(answers[i], RecordDict) for i in (0, 2))


def test_a_pass_that_breaks_off_fails_none_of_its_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is may be for one client's data, and each is tried by itself."""

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("fedlora.client.stacked.cohort.train", broken)
    answers = in_a_block(tmp_path, {i: message(JOB) for i in range(3)})
    assert all(isinstance(answers[i], RecordDict) for i in range(3))
