"""Messages come back as they were, carry only what is lacking, and are refused where they are not what they say."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import WireError
from fedlora.lora import SIDES, LoRA
from fedlora.messages import codec
from fedlora.messages.compression import compress_with_error_feedback
from fedlora.messages.parts import Parts, PartTracker
from fedlora.metrics import Metrics
from fedlora.sections import Encoding, Training
from fedlora.server import upload_checks
from fedlora.strategy import Client, Job, Update
from fedlora.vectors import unflatten
from tests.support.adapters import factors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def equal(x: LoRA, y: LoRA) -> bool:
    return all(
        list(x.side(s)) == list(y.side(s)) and all(torch.equal(t, y.side(s)[m]) for m, t in x.side(s).items())
        for s in SIDES
    )


def send(job: Job, traffic: PartTracker | None = None, dtype: torch.dtype = torch.float32) -> RecordDict:
    parts = Parts(dtype).of(job)
    return codec.JobEncoder().job(job, parts, (traffic or PartTracker()).send(0, parts))


def receive(order: codec.IncomingJob) -> Job:
    """The job where all its parts came with it."""
    return order.job({n: unflatten(f.vector, f.manifest) for n, f in order.sent.items()})


def arrays(records: RecordDict) -> list[Array]:
    return [a for r in records.array_records.values() for a in r.values()]


@given(
    dtype=st.sampled_from(DTYPES),
    sides=st.sampled_from(["ABH", "AB", "BH", "H", ""]),
    offsets=st.integers(0, 3),
    rank=st.integers(1, 5),
    lr=st.floats(1e-9, 1e3),
    place=st.tuples(st.integers(0, 2**63), st.integers(0, 10**6), st.integers(1, 10**6)),
)
def test_a_job_comes_back_as_it_was(
    dtype: torch.dtype, sides: str, offsets: int, rank: int, lr: float, place: tuple[int, int, int]
) -> None:
    offset = tuple(factors(7 + i, rank + i, dtype).only("AB") for i in range(offsets))
    training = Training(optimizer="sgd", lr=lr, prox=0.1)
    seed, round, rounds = place
    plain = {"trains": "BH", "shares": "B", "gain": {"q": 2.5}, "resumes": True, "example_clip": 0.5}
    start = factors(1, rank, dtype).only(sides)
    job = Job(start, offset=offset, training=training, seed=seed, round=round, rounds=rounds, **plain)  # type: ignore[arg-type]
    records = send(job, dtype=dtype)
    back = receive(codec.read_order(records))
    assert equal(back.start, job.start)
    assert len(back.offset) == offsets and all(map(equal, back.offset, offset))
    assert replace(back, start=job.start, offset=job.offset).__dict__ == job.__dict__
    assert len(arrays(records)) == (1 if sides or offsets else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_update_comes_back_in_its_own_type(dtype: torch.dtype) -> None:
    job = Job(factors(1, dtype=dtype), shares="AH")
    update = Update(factors(2, dtype=dtype).only("AH"), 17, 0.1)
    records = codec.pack_update(update, 0)
    back = upload_checks.validated_update(records, job)
    assert isinstance(back, Update)
    assert equal(back.lora, update.lora) and (back.examples, back.loss) == (17, 0.1)
    assert len(arrays(records)) == 1


@pytest.mark.parametrize("loss", [1.5, math.inf])
@pytest.mark.parametrize("table", [None, torch.arange(9).view(3, 3)], ids=["lm", "classify"])
def test_metrics_come_back(loss: float, table: torch.Tensor | None) -> None:
    back = upload_checks.read_metrics(codec.pack_metrics(Metrics(4, 9, loss, 3, table)))
    assert isinstance(back, Metrics)
    assert (back.examples, back.targets, back.loss, back.correct) == (4, 9, loss, 3)
    assert (back.confusion is None) == (table is None)
    assert table is None or torch.equal(back.confusion, table)  # type: ignore[arg-type]


def test_a_client_comes_back() -> None:
    assert upload_checks.read_client(codec.pack_client(Client(3, 99, 8), "ab")) == (Client(3, 99, 8), "ab")


def test_what_a_client_lacks_comes_back() -> None:
    records = codec.pack_lacks(codec.MissingParts(("ab", "cd")))
    assert (
        upload_checks.validated_update(records, Job(factors(1)))
        == upload_checks.read_metrics(records)
        == codec.MissingParts(("ab", "cd"))
    )


def test_only_parts_that_the_client_lacks_travel() -> None:
    """A frozen A and an old residual go once; what goes is what the traffic says."""
    old, new = factors(5, 2).only("AB"), factors(6, 3).only("AB")
    first = Job(factors(1), offset=(old,))
    second = Job(LoRA(first.start.A, factors(2).B, first.start.H), offset=(old, new))
    traffic = PartTracker()
    assert len(codec.read_order(send(first, traffic)).sent) == 4
    before = traffic.down
    records = send(second, traffic)
    order = codec.read_order(records)
    sent = [unflatten(f.vector, f.manifest) for f in order.sent.values()]
    assert [(list(x.A) != [], list(x.B) != []) for x in sent] == [(False, True), (True, True)]  # B, and `new`
    assert arrays(records)[0].numpy().nbytes == traffic.down - before
    assert len(order.names) == 5


def test_a_part_that_is_there_twice_travels_once() -> None:
    part = factors(5).only("AB")
    order = codec.read_order(send(Job(factors(1), offset=(part, part))))
    assert len(order.sent) == 4 and len(receive(order).offset) == 2


def test_clients_that_lack_the_same_share_one_array() -> None:
    job, packer = Job(factors(1)), codec.JobEncoder()
    parts = Parts().of(job)
    first, second = (packer.job(job, parts, parts) for _ in range(2))
    assert first["array"] is second["array"]


def test_no_array_is_pickled() -> None:
    """Every array is in numpy's own format, which Flower reads with `allow_pickle=False`."""
    for records in (send(Job(factors(1))), codec.pack_update(Update(factors(1, dtype=torch.bfloat16), 1, 0.0), 0)):
        assert all(a.stype == "numpy.ndarray" and a.data.startswith(b"\x93NUMPY") for a in arrays(records))


def with_array(records: RecordDict, array: np.ndarray | Array) -> RecordDict:
    made = array if isinstance(array, Array) else Array(array)
    return RecordDict({"head": records["head"], "array": ArrayRecord({"vector": made})})


def with_head(records: RecordDict, old: str, new: str) -> RecordDict:
    text = str(records.config_records["head"]["json"])
    assert old in text
    return RecordDict({**dict(records.items()), "head": ConfigRecord({"json": text.replace(old, new, 1)})})


def damaged(vector: np.ndarray) -> np.ndarray:
    vector = vector.copy()
    vector[3] += 1
    return vector


JOB = Job(factors(1))
SENT = send(JOB)
VECTOR = arrays(SENT)[0].numpy()
PICKLE = Array(dtype="float32", shape=(1,), stype="numpy.ndarray", data=b"\x80\x04K\x01.")
OTHER = Array(dtype="float32", shape=(1,), stype="pickle", data=b"\x80\x04K\x01.")


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (RecordDict(), "no head"),
        (RecordDict({"head": ConfigRecord({"json": 3})}), "no head"),
        (RecordDict({"head": ConfigRecord({"json": "{"})}), "JobHead"),
        (with_head(SENT, '"trains":"ABH"', '"trains":7'), "trains"),
        (with_head(SENT, '"trains"', '"run":"rm","trains"'), "run"),
        (with_head(SENT, '"batch_size":16', '"batch_size":0'), "batch_size"),
        (with_head(SENT, '"dtype":"float32"', '"dtype":"object"'), "dtype"),
        (with_head(SENT, '"dtype":"float32"', '"dtype":"bfloat16"'), "head says a vector of bfloat16"),
        (with_head(SENT, "[4, 6]", "[4, 7]"), "numbers by their manifests"),
        (with_head(SENT, "[4, 6]", "[6, 4]"), "hash"),
        (with_head(SENT, "[4, 6]", '[4, \\"x\\"]'), "could not be read"),
        (with_array(SENT, VECTOR[:-1]), f"{len(VECTOR) - 1} came"),
        (with_array(SENT, damaged(VECTOR)), "damaged"),
        (with_array(SENT, VECTOR[None]), "no vector"),
        (with_array(SENT, VECTOR.astype(np.float64)), "float64"),
        (with_array(SENT, VECTOR.astype(">f4")), "could not be read"),
        (with_array(SENT, PICKLE), "could not be read"),
        (with_array(SENT, OTHER), "could not be read"),
        (RecordDict({"head": SENT["head"]}), "0 came"),
        (RecordDict({**dict(SENT.items()), "more": SENT["array"]}), "2 arrays"),
    ],
)
def test_a_malformed_job_is_refused_with_what_is_wrong(records: RecordDict, said: str) -> None:
    with pytest.raises(WireError, match=said):
        codec.read_order(records)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (factors(1).only("AB"), "H is nothing"),
        (factors(1, rank=3), r"A is out \(3, 8\)"),
        (LoRA({"q": factors(1).A["q"]}, factors(1).B, factors(1).H), r"A is nothing; the job asked for out \(4, 8\)"),
    ],
)
def test_an_update_of_other_shapes_than_the_job_s_is_refused(lora: LoRA, said: str) -> None:
    with pytest.raises(WireError, match=said):
        upload_checks.validated_update(codec.pack_update(Update(lora, 1, 0.0), 0), JOB)


def test_an_update_may_not_share_more_than_was_asked() -> None:
    with pytest.raises(WireError, match=r"H is .* asked for nothing"):
        upload_checks.validated_update(codec.pack_update(Update(factors(1), 1, 0.0), 0), Job(factors(1), shares="AB"))


@settings(max_examples=300)
@given(at=st.integers(0, 127) | st.integers(0, 10**6), byte=st.integers(0, 255))  # numpy's header has 128 bytes
def test_no_byte_can_be_changed_unseen(at: int, byte: int) -> None:
    """Whatever one byte becomes, the job is refused, or it is the job that was sent."""
    array = arrays(SENT)[0]
    data = bytearray(array.data)
    data[at % len(data)] = byte
    made = with_array(SENT, Array(array.dtype, array.shape, array.stype, bytes(data)))
    try:
        back = receive(codec.read_order(made))
    except WireError:
        return
    assert equal(back.start, receive(codec.read_order(SENT)).start)


@pytest.mark.parametrize("encoding", ["bfloat16", "int8"])
def test_a_small_update_arrives_as_its_client_reckons_with_it(encoding: Encoding) -> None:
    """In a half or a quarter of the bytes, and bit for bit what `with_feedback` says that the server will have."""
    start, trained = factors(1, dtype=torch.float32), factors(2, dtype=torch.float32)
    packed, received, _ = compress_with_error_feedback(start, trained, LoRA(), encoding)
    records = codec.pack_update(Update(received, 1, 0.5, packed=packed), 0)
    back = upload_checks.validated_update(records, Job(start, upload=encoding))
    assert isinstance(back, Update) and back.packed is not None and back.packed.nbytes == packed.nbytes
    assert all(torch.equal(t, back.lora.side(s)[m]) for s in "ABH" for m, t in received.side(s).items())


def test_an_update_in_another_encoding_than_asked_for_is_refused() -> None:
    start = factors(1, dtype=torch.float32)
    packed, received, _ = compress_with_error_feedback(start, factors(2, dtype=torch.float32), LoRA(), "int8")
    records = codec.pack_update(Update(received, 1, 0.5, packed=packed), 0)
    for asked in ("float32", "bfloat16"):
        with pytest.raises(WireError, match="an update is of int8"):
            upload_checks.validated_update(records, Job(start, upload=asked))
