"""The one door out of a client: what leaves is what a job's answer may hold, and of what goes wrong a code alone."""

import json
import logging
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from fedlora.checks.small_models import small_model
from fedlora.client import handlers
from fedlora.client.egress import Answer, Egress
from fedlora.client.part_cache import PartStore
from fedlora.client.policy import ClientPolicy
from fedlora.client.runner import JobRunner
from fedlora.encoding.client_data import ClientData
from fedlora.errors import DataError, PolicyRefusal, ReasonCode
from fedlora.jobs import Client, MaskingTerms, PrivacySpent, PrivacyTerms, SecAggStep
from fedlora.lora import LoRA, map_factors
from fedlora.message_types import MetricsHead, MissingParts, UpdateHead
from fedlora.messages import codec, envelope
from fedlora.messages.compression import compress_with_error_feedback
from fedlora.messages.envelope import RawMessage, as_array
from fedlora.messages.parts import Parts, content_hash
from fedlora.metrics import Metrics
from fedlora.privacy.masked_update import size
from fedlora.sections import Training
from fedlora.server import upload_checks
from fedlora.storage.event_log import EventLog, entries
from fedlora.strategy import Job, Update
from fedlora.tensors import by_name, to_bytes

SMALL = small_model("gpt2")
START = SMALL.start.only("AB")
TEXTS = [{"text": " ".join(f"w{(i * j) % 28}" for j in range(12))} for i in range(4)]
TRAINING = Training(steps=1, batch_size=4)
JOB = Job(START, trains="AB", shares="AB", training=TRAINING)
MASKED = replace(JOB, masking=MaskingTerms(context="round 1 (a)", weight=0.5, reach=1.0, members=3, inbox={}))
TERMS = PrivacyTerms(noise=1.0, clip=1.0, head_share=0.5, rate=0.5, steps=1, delta=1e-5)
NUMBERS = by_name(START)
NAME = next(iter(NUMBERS))


def message(job: Job) -> RecordDict:
    parts = Parts().of(job)
    return codec.JobEncoder().job(job, parts, parts)


def client(folder: Path, **own: Any) -> handlers.ClientContext:
    runner = JobRunner(0, ClientData(SMALL.model.encoder, TEXTS), folder, ClientPolicy(**own))
    return handlers.ClientContext(SMALL.model, runner, PartStore(folder), 2, EventLog(folder / "audit.jsonl"))


def ask(folder: Path, job: Job, **own: Any) -> RecordDict | str:
    asked = client(folder, **own)
    return handlers.handle("train", message(job), lambda _: asked, asked.event_log)


def left(folder: Path) -> list[str]:
    """What the event log says has left."""
    return [e["what"] for e in entries(folder / "audit.jsonl") if e["event"] == "left"]


def test_what_an_honest_job_asks_for_leaves_and_is_written_down(tmp_path: Path) -> None:
    assert isinstance(ask(tmp_path, JOB), RecordDict)
    (line,) = [e for e in entries(tmp_path / "audit.jsonl") if e["event"] == "left"]
    assert sorted(line["tensors"]) == sorted(NUMBERS) and line["bytes"] == 4 * START.numel()


@pytest.mark.parametrize(
    ("job", "code"),
    [
        (replace(JOB, start=START.only("A")), ReasonCode.EGRESS),
        (replace(JOB, start=LoRA(), trains="ABH", shares="ABH"), ReasonCode.EGRESS),
        (replace(JOB, start=LoRA(START.A, dict([*START.B.items()][1:]))), ReasonCode.POLICY),
        (replace(JOB, start=START.only("A"), trains="A", shares="B"), ReasonCode.EGRESS),
        (replace(JOB, trains="A", shares="B", training=Training(lr=1e-30, steps=1)), ReasonCode.POLICY),
        (JOB, ReasonCode.POLICY),
    ],
    ids=["without B", "empty", "without one B", "B of the model", "untrained B", "plain"],
)
def test_a_side_that_may_not_leave_stays_whatever_the_job_leaves_out(
    job: Job, code: ReasonCode, tmp_path: Path
) -> None:
    """The model still holds what it had last, and a client that lets A alone out keeps its B."""
    SMALL.model.set_adapter(SMALL.start)
    assert ask(tmp_path, job, egress=("A *",)) == code
    assert left(tmp_path) == ["reason"]


def release(records: RecordDict, to: Any, **own: Any) -> None:
    Egress(ClientPolicy(**own)).release(Answer(records, to))


def update(tensors: dict[str, Tensor], loss: float | None = None, more: bytes = b"", **head: Any) -> RecordDict:
    """An update's message, whatever its job was."""
    content = to_bytes(tensors) + more
    values = {"examples": 4, "loss": loss, "spent": None, "name": content_hash(content), "round": 0} | head
    return envelope.pack(UpdateHead(**values), as_array(content))


def with_record(records: RecordDict) -> RecordDict:
    return RecordDict({**dict(records.items()), "more": ConfigRecord({"ssn": "100-45-6000"})})


SPENT = PrivacySpent(epsilon=1.0, charges=1)
WRONG = {
    "a tensor more": (update({**NUMBERS, "B more": torch.ones(2)}), JOB, {}),
    "a tensor less": (update(dict([*NUMBERS.items()][1:])), JOB, {}),
    "a side more": (update(NUMBERS), replace(JOB, shares="A"), {}),
    "another shape": (update({**NUMBERS, NAME: NUMBERS[NAME][:1]}), JOB, {}),
    "another number type": (update({**NUMBERS, NAME: NUMBERS[NAME].double()}), JOB, {}),
    "bytes behind the numbers": (update(NUMBERS, more=b"100-45-6000"), JOB, {}),
    "another round": (update(NUMBERS, round=1), JOB, {}),
    "a loss that was not asked for": (update(NUMBERS, 0.5), replace(JOB, metrics=False), {}),
    "a loss that is not told": (update(NUMBERS, 0.5), JOB, {"metrics": False}),
    "the loss of a private job": (
        update(NUMBERS, 0.5, spent=SPENT),
        replace(JOB, privacy=TERMS, metrics=False),
        {},
    ),
    "what a ledger says of a plain job": (update(NUMBERS, spent=SPENT), JOB, {}),
    "an epsilon that is not finite": (
        update(NUMBERS, spent=PrivacySpent(epsilon=inf, charges=1)),
        replace(JOB, privacy=TERMS),
        {},
    ),
    "numbers without a mask": (update(NUMBERS), MASKED, {}),
    "a side under the mask": (
        update({"masked": torch.zeros(size(MASKED), dtype=torch.int32)}),
        MASKED,
        {"egress": ("A *",)},
    ),
    "a side": (update(NUMBERS), JOB, {"egress": ("A *",)}),
    "scores": (codec.pack_metrics(Metrics(4, 9, 0.5, 3)), JOB, {"metrics": False}),
    "scores with a tensor": (
        envelope.pack(MetricsHead(4, 9, 0.5, 3), as_array(to_bytes({"x": torch.ones(2)}))),
        JOB,
        {},
    ),
    "scores of single examples": (
        envelope.pack(MetricsHead(4, 9, 0.5, 3), as_array(to_bytes({"pairs": torch.ones(2, 2).double()}))),
        JOB,
        {},
    ),
    "parts that no job named": (
        codec.pack_missing_parts(MissingParts(("ab" * 32,))),
        codec.read_job(envelope.unpack(message(JOB))),
        {},
    ),
    "numbers with an introduction": (
        RecordDict({**dict(codec.pack_client(Client(0, 4, 2)).items()), "array": as_array(to_bytes(NUMBERS))}),
        None,
        {},
    ),
    "an update as a step": (update(NUMBERS), SecAggStep("join", "round 1 (a)"), {}),
    "text as a step's answer": (
        RecordDict({"head": ConfigRecord({"json": '{"said":{"1":"my note"}}'})}),
        SecAggStep("join", "r"),
        {},
    ),
    "a record more": (with_record(update(NUMBERS)), JOB, {}),
}


@pytest.mark.parametrize(("records", "to", "own"), WRONG.values(), ids=WRONG)
def test_whatever_else_is_in_an_answer_is_kept_back(records: RecordDict, to: Any, own: dict[str, Any]) -> None:
    with pytest.raises(PolicyRefusal) as refused:
        release(records, to, **own)
    assert refused.value.code in (ReasonCode.EGRESS, ReasonCode.POLICY)


@pytest.mark.parametrize(
    ("records", "to"),
    [
        (update(NUMBERS, 0.5), JOB),
        (update(NUMBERS, spent=SPENT), replace(JOB, privacy=TERMS)),
        (update({"masked": torch.zeros(size(MASKED), dtype=torch.int32)}), MASKED),
        (update({n: t.bfloat16() for n, t in NUMBERS.items()}), replace(JOB, upload="bfloat16")),
        (codec.pack_metrics(Metrics(4, 9, 0.5, 3, torch.ones(2, 2, dtype=torch.int64))), JOB),
        (codec.pack_metrics(Metrics(4, 9, 0.5, 3, label_counts=torch.ones(2, 3, dtype=torch.int64))), JOB),
        (codec.pack_metrics(Metrics(4, 9, 0.5, 0, moments=torch.ones(5, dtype=torch.float64))), JOB),
        (codec.pack_client(Client(0, 4, 2), "ab"), None),
        (codec.pack_secagg_reply({"1": "ab"}), SecAggStep("share", "round 1 (a)")),
    ],
)
def test_what_was_asked_for_is_let_out(records: RecordDict, to: Any) -> None:
    release(records, to)


def test_a_compressed_update_is_let_out(tmp_path: Path) -> None:
    assert isinstance(ask(tmp_path, replace(JOB, upload="int8")), RecordDict)


@pytest.mark.parametrize("shape", [(3, 3), (2, 4, 4), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("side", "ABRH")
def test_scales_of_int8_are_let_out_for_what_shares_one(side: str, shape: tuple[int, ...]) -> None:
    start = LoRA(**{side: {"q": torch.zeros(shape)}})
    packed, received, _ = compress_with_error_feedback(start, map_factors(torch.ones_like, start), LoRA(), "int8")
    job = Job(start, trains=side, shares=side, upload="int8")
    records = codec.pack_update(Update(received, 4, None, packed=packed), 0)
    release(records, job)
    assert isinstance(upload_checks.validated_update(envelope.unpack(records), job), Update)


def test_of_a_records_text_in_an_error_nothing_leaves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The sentence stands in the client's own log; a simulation, which is one machine, shows it."""

    def fail(_: RawMessage) -> handlers.ClientContext:
        raise DataError('mine.jsonl line 1: label "patient 0, ssn 100-45-6000" is no class')

    log = EventLog(tmp_path / "audit.jsonl")
    with caplog.at_level(logging.WARNING, "fedlora"):
        said = handlers.handle("who", RecordDict({"head": ConfigRecord({"json": "{}"})}), fail, log)
    assert said == ReasonCode.DATA and "100-45-6000" in caplog.text
    assert "100-45-6000" not in (tmp_path / "audit.jsonl").read_text() and left(tmp_path) == ["reason"]
    here = handlers.handle("who", RecordDict({"head": ConfigRecord({"json": "{}"})}), fail, log, tells_all=True)
    assert "100-45-6000" in str(here)


def test_a_client_without_examples_says_so_and_does_not_hang(tmp_path: Path) -> None:
    runner = JobRunner(0, ClientData(SMALL.model.encoder, []), tmp_path)
    empty = replace(client(tmp_path), runner=runner)
    assert handlers.handle("train", message(JOB), lambda _: empty) == ReasonCode.DATA


def test_a_job_that_would_hang_or_refund_is_refused_at_once(tmp_path: Path) -> None:
    good = message(replace(JOB, privacy=TERMS))
    for name, wrong in (("noise", "NaN"), ("noise", "Infinity"), ("steps", "-1000"), ("rate", "0"), ("clip", "1e-45")):
        head = json.loads(str(good.config_records["head"]["json"]))
        head["privacy"][name] = "@@"
        text = json.dumps(head).replace('"@@"', wrong)
        bad = RecordDict({"head": ConfigRecord({"json": text}), "array": good["array"]})
        one = client(tmp_path)
        assert handlers.handle("train", bad, lambda _, one=one: one) == ReasonCode.MESSAGE
    assert not list(tmp_path.rglob("ledger*"))


def test_a_policys_refusal_has_a_code_of_its_own() -> None:
    with pytest.raises(PolicyRefusal) as refused:
        ClientPolicy(private=True).refuse(JOB, 4)
    assert refused.value.code == ReasonCode.POLICY
