"""Uploads that once got through, crashed the server or ate its memory: each was found by trying, and stays tried."""

import json
import resource
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedlora.errors import WireError
from fedlora.jobs import MaskingTerms
from fedlora.lora import LoRA
from fedlora.message_types import UpdateHead
from fedlora.messages import codec, envelope
from fedlora.messages.envelope import RawMessage, as_array, unpack
from fedlora.messages.parts import content_hash
from fedlora.server import upload_checks
from fedlora.strategy import Job, Update
from tests.support import malform
from tests.support.adapters import factors

JOB = Job(factors(1, dtype=torch.float32))
SENT = codec.pack_update(Update(factors(2, dtype=torch.float32), 17, 0.5), 0)
ARRAY = SENT.array_records["array"]["numbers"]


def with_tensor(name: str, shape: list[int], numbers: int = 4) -> RecordDict:
    """An update of one tensor of so many numbers, whose header may lie, hash and all."""
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * numbers]}
    content = malform.joined({name: entry}, bytes(4 * numbers))
    return envelope.pack(UpdateHead(17, 0.5, None, content_hash(content), 0), as_array(content))


def with_head(text: str) -> RecordDict:
    return RecordDict({"head": ConfigRecord({"json": text})})


def with_array(array: Array) -> RecordDict:
    return RecordDict({"head": SENT["head"], "array": ArrayRecord({"numbers": array})})


def said(field: str, value: str) -> RecordDict:
    head = str(SENT.config_records["head"]["json"])
    old = json.dumps(json.loads(head)[field])
    return RecordDict(
        {**dict(SENT.items()), "head": ConfigRecord({"json": head.replace(f'"{field}":{old}', f'"{field}":{value}')})}
    )


def test_an_update_of_no_numbers_is_read() -> None:
    back = upload_checks.validated_update(
        unpack(codec.pack_update(Update(LoRA(), 17, 0.5), 0)), Job(factors(1), shares="")
    )
    assert isinstance(back, Update) and not back.lora


def test_a_masked_update_comes_back_masked() -> None:
    job = Job(JOB.start, masking=MaskingTerms(context="round 1", weight=0.5, reach=1.0, members=3, inbox={}))
    numbers = torch.arange(184, dtype=torch.int32)
    back = upload_checks.validated_update(unpack(codec.pack_update(Update(LoRA(), 17, None, masked=numbers), 0)), job)
    assert isinstance(back, Update) and back.masked is not None and torch.equal(back.masked, numbers)


@pytest.mark.parametrize("side", ["", "AB", "ABRDH", "X"])
def test_a_side_is_one_letter(side: str) -> None:
    with pytest.raises(WireError, match="it takes a side, one of A, B, R, D, H, and a module"):
        upload_checks.validated_update(unpack(with_tensor(f"{side} q", [4])), JOB)


@pytest.mark.parametrize("shape", [[2**32, 2**32], [2**31, 2**33], [2**62, 4], [0, 2**39, 2**39], [1] * 9])
def test_dimensions_do_not_wrap_to_the_count_of_what_came(shape: list[int]) -> None:
    with pytest.raises(WireError, match=r"overflow|no machine can hold"):
        upload_checks.validated_update(unpack(with_tensor("A q", shape, numbers=0 if 0 in shape else 1)), JOB)


@pytest.mark.parametrize(
    ("field", "value"), [("round", "9" * 4300), ("examples", "9" * 4300), ("examples", "9" * 5000)]
)
def test_a_number_with_more_digits_than_python_writes_is_refused(field: str, value: str) -> None:
    with pytest.raises(WireError):
        upload_checks.validated_update(unpack(said(field, value)), JOB)


@pytest.mark.parametrize("value", ["true", '"17"', "17.0", "[17]"])
def test_a_count_is_a_whole_number_and_nothing_that_can_be_read_as_one(value: str) -> None:
    with pytest.raises(WireError, match="examples"):
        upload_checks.validated_update(unpack(said("examples", value)), JOB)


@pytest.mark.parametrize("header", ["-" * 900, "{'descr': '<f4', 'fortran_order': False, 'shape': (20+4,), }", "1"])
def test_nothing_that_an_array_says_is_evaluated(header: str) -> None:
    """numpy's reader would: Python's parser, which deep headers upset, for other threads too."""
    content = malform.joined(header, bytes(4 * 24))
    records = envelope.pack(UpdateHead(17, 0.5, None, content_hash(content), 0), as_array(content))
    with pytest.raises(WireError, match="not in the safetensors format"):
        upload_checks.validated_update(unpack(records), JOB)


@pytest.mark.parametrize("size", [2**16 + 10**4, 2**40, 2**63, 2**64 - 1])
def test_a_header_that_is_longer_than_the_job_asks_for_is_not_parsed(size: int) -> None:
    content = malform.joined("{" + " " * 2**17 + "}", b"", size)
    records = envelope.pack(UpdateHead(17, 0.5, None, content_hash(content), 0), as_array(content))
    with pytest.raises(WireError, match=r"has \d+ bytes; \d+ are the most|brings \d+ bytes of numbers"):
        upload_checks.validated_update(unpack(records), JOB)


@pytest.mark.parametrize(
    "array",
    [
        Array("float64", ARRAY.shape, ARRAY.stype, ARRAY.data),
        Array(ARRAY.dtype, (1, *ARRAY.shape), ARRAY.stype, ARRAY.data),
        Array(ARRAY.dtype, ARRAY.shape, "numpy.ndarray", ARRAY.data),
        Array(ARRAY.dtype, ARRAY.shape, ARRAY.stype, ARRAY.data + b"\0"),
    ],
)
def test_an_array_is_what_it_says_of_itself_and_no_more(array: Array) -> None:
    with pytest.raises(WireError, match="says it is"):
        upload_checks.validated_update(unpack(with_array(array)), JOB)


def test_what_nobody_asked_for_is_refused_with_its_name() -> None:
    more = {**dict(SENT.items()), "x": ConfigRecord({"y": "z" * 10**6})}
    with pytest.raises(WireError, match="more than was asked for: x"):
        upload_checks.validated_update(unpack(RecordDict(more)), JOB)


@pytest.mark.parametrize("field", ["x\n\x1b[2Jy", "x" * 10**4])
def test_a_refusal_is_one_printable_line(field: str) -> None:
    for name in (f"{field} q", f"A {field}"):
        with pytest.raises(WireError) as refusal:
            upload_checks.validated_update(unpack(with_tensor(name, [4])), JOB)
        assert len(str(refusal.value)) < 600 and str(refusal.value).isprintable()


KEYS = ",".join(f'"{i}":1' for i in range(700_000))
ONES = ",".join(["1"] * 4_000_000)
ERRORS = ",".join(f'"{i}":1' for i in range(120_000))


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (lambda m: upload_checks.validated_update(m, JOB), f"{{{KEYS}}}"),
        (lambda m: upload_checks.validated_update(m, JOB), f'{{"kind":"lacks","lacks":[{ONES}]}}'),
        (upload_checks.read_metrics, f'{{"kind":"lacks","lacks":[{ONES}]}}'),
        (upload_checks.read_secagg_reply, f'{{"said":{{{KEYS}}}}}'),
        (upload_checks.read_secagg_reply, f'{{"said":{{{ERRORS}}}}}'),
        (upload_checks.read_client, f"{{{KEYS}}}"),
    ],
)
def test_a_head_of_a_million_errors_costs_neither_time_nor_memory(read: Callable[[RawMessage], Any], text: str) -> None:
    """Validated to the end, the second took 2.8 GB, and as many minutes on a busy machine."""
    records, before, began = with_head(text), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(WireError):
        read(unpack(records))
    assert time.process_time() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # in KiB


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_an_update_has_the_types_that_the_state_has_whatever_it_came_in(dtype: torch.dtype) -> None:
    sent = unpack(codec.pack_update(Update(factors(2, dtype=dtype), 17, 0.5), 0))
    back = upload_checks.validated_update(sent, JOB)
    assert isinstance(back, Update) and {t.dtype for _, _, t in back.lora.matrices()} == {torch.float32}


def test_a_number_that_float32_does_not_have_is_refused() -> None:
    huge = factors(2, dtype=torch.float64)
    huge = LoRA({m: a * 1e300 for m, a in huge.A.items()}, huge.B, huge.H)
    with pytest.raises(WireError, match="has a number that is not finite"):
        upload_checks.validated_update(unpack(codec.pack_update(Update(huge, 17, 0.5), 0)), JOB)
