"""Messages come back as they were, carry only what is lacking, and are refused where they are not what they say."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import WireError
from fedlora.lora import SIDES, LoRA, map_factors
from fedlora.message_types import MetricsHead, MissingParts
from fedlora.messages import codec
from fedlora.messages.compression import compress, compress_with_error_feedback
from fedlora.messages.envelope import as_array, pack, unpack
from fedlora.messages.parts import Parts, PartTracker, content_hash, unflatten
from fedlora.metrics import Metrics
from fedlora.sections import Encoding, Training
from fedlora.server import upload_checks
from fedlora.strategy import Client, Job, Update
from fedlora.svd import at_least_float32
from fedlora.tensors import number_bytes, to_bytes
from tests.support.adapters import factors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def equal(x: LoRA, y: LoRA) -> bool:
    return all(
        x.side(s).keys() == y.side(s).keys()
        and all(t.dtype == y.side(s)[m].dtype and torch.equal(t, y.side(s)[m]) for m, t in x.side(s).items())
        for s in SIDES
    )


def order(x: LoRA) -> list[list[str]]:
    return [list(x.side(s)) for s in SIDES]


def send(job: Job, traffic: PartTracker | None = None, dtype: torch.dtype = torch.float32) -> RecordDict:
    parts = Parts(dtype).of(job)
    return codec.JobEncoder().job(job, parts, (traffic or PartTracker()).send(0, parts))


def receive(order: codec.IncomingJob) -> Job:
    """The job where all its parts came with it."""
    return order.job({name: unflatten(flat.content) for name, flat in order.sent.items()})


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
    plain |= {"turns": ("H", "BH"), "smoothing": (0.25, 0.5, 0.25)}
    start = factors(1, rank, dtype).only(sides)
    plain |= {"correction": factors(3, rank, dtype).only(sides)}
    job = Job(start, offset=offset, training=training, seed=seed, round=round, rounds=rounds, **plain)  # type: ignore[arg-type]
    records = send(job, dtype=dtype)
    back = receive(codec.read_job(unpack(records)))
    assert equal(back.start, job.start)
    assert len(back.offset) == offsets and all(map(equal, back.offset, offset))
    assert equal(back.correction, job.correction)
    assert replace(back, start=job.start, offset=job.offset, correction=job.correction).__dict__ == job.__dict__
    assert len(arrays(records)) == (1 if sides or offsets else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_update_comes_back_with_its_numbers_in_the_type_of_the_state(dtype: torch.dtype) -> None:
    """A state is of float32 at least, and an update travels in the type it has."""
    job = Job(factors(1, dtype=dtype), shares="AH")
    update = Update(factors(2, dtype=dtype).only("AH"), 17, 0.1)
    records = codec.pack_update(update, 0)
    back = upload_checks.validated_update(unpack(records), job)
    assert isinstance(back, Update)
    assert (
        equal(back.lora, map_factors(at_least_float32, update.lora))
        and order(back.lora) == order(job.start.only("AH"))
        and (back.examples, back.loss) == (17, 0.1)
    )
    assert len(arrays(records)) == 1


TABLES = {
    "lm": {},
    "classify": {"confusion": torch.arange(9).view(3, 3)},
    "preferences": {"rewards": torch.tensor([3.5, -2.0, 1.0], dtype=torch.float64)},
    "several labels": {"label_counts": torch.arange(12).view(4, 3)},
    "regression": {"moments": torch.tensor([1.0, -2.0, 3.0, 4.0, 0.5], dtype=torch.float64)},
}


@pytest.mark.parametrize("loss", [1.5, 1e6, 9e6])  # a sum over targets, each at most 1e6
@pytest.mark.parametrize("tables", TABLES.values(), ids=TABLES)
def test_metrics_come_back(loss: float, tables: dict[str, torch.Tensor]) -> None:
    back = upload_checks.read_metrics(unpack(codec.pack_metrics(Metrics(4, 9, loss, 3, **tables))))
    assert isinstance(back, Metrics)
    assert (back.examples, back.targets, back.loss, back.correct) == (4, 9, loss, 3)
    assert back.tables().keys() == tables.keys()
    assert all(torch.equal(back.tables()[name], table) for name, table in tables.items())


def test_numbers_and_predictions_of_single_examples_do_not_travel() -> None:
    metrics = Metrics(2, 2, 0.5, 0, moments=torch.ones(5, dtype=torch.float64), pairs=torch.ones(2, 2))
    back = upload_checks.read_metrics(unpack(codec.pack_metrics(metrics)))
    assert isinstance(back, Metrics) and back.pairs is None


@pytest.mark.parametrize(
    "tables",
    [
        {"moments": torch.tensor([1.0, 2.0, float("nan"), 4.0, 5.0], dtype=torch.float64)},
        {"moments": torch.ones(4, dtype=torch.float64)},
        {"moments": torch.ones(5)},
        {"label_counts": -torch.ones(2, 3, dtype=torch.int64)},
        {"label_counts": torch.ones(3, 2, dtype=torch.int64)},
        {"confusion": torch.ones(3, 2, dtype=torch.int64)},
        {"pairs": torch.ones(2, 2, dtype=torch.float64)},
        {"confusion": torch.ones(2, 2, dtype=torch.int64), "label_counts": torch.ones(2, 3, dtype=torch.int64)},
    ],
)
def test_another_table_of_sums_is_refused(tables: dict[str, torch.Tensor]) -> None:
    message = unpack(pack(MetricsHead(4, 9, 0.5, 3), as_array(to_bytes(tables))))
    with pytest.raises(WireError, match="metrics came with"):
        upload_checks.read_metrics(message)


def test_a_client_comes_back() -> None:
    assert upload_checks.read_client(unpack(codec.pack_client(Client(3, 99, 8), "ab"))) == (Client(3, 99, 8), "ab")


def test_what_a_client_lacks_comes_back() -> None:
    lacks = MissingParts(("ab" * 32, "cd" * 32))
    message = unpack(codec.pack_missing_parts(lacks))
    assert upload_checks.validated_update(message, Job(factors(1))) == upload_checks.read_metrics(message) == lacks


def test_only_parts_that_the_client_lacks_travel() -> None:
    """A frozen A and an old residual go once; what goes is what the traffic says."""
    old, new = factors(5, 2).only("AB"), factors(6, 3).only("AB")
    first = Job(factors(1), offset=(old,))
    second = Job(LoRA(first.start.A, factors(2).B, first.start.H), offset=(old, new))
    traffic = PartTracker()
    assert len(codec.read_job(unpack(send(first, traffic))).sent) == 4
    before = traffic.down
    records = send(second, traffic)
    order = codec.read_job(unpack(records))
    sent = [unflatten(flat.content) for flat in order.sent.values()]
    assert [(list(x.A) != [], list(x.B) != []) for x in sent] == [(False, True), (True, True)]  # B, and `new`
    assert sum(number_bytes(flat.content) for flat in order.sent.values()) == traffic.down - before
    assert len(arrays(records)[0].data) == sum(len(flat.content) for flat in order.sent.values())
    assert len(order.names) == 5


def test_a_part_that_is_there_twice_travels_once() -> None:
    part = factors(5).only("AB")
    order = codec.read_job(unpack(send(Job(factors(1), offset=(part, part)))))
    assert len(order.sent) == 4 and len(receive(order).offset) == 2


def test_clients_that_lack_the_same_share_one_array() -> None:
    job, packer = Job(factors(1)), codec.JobEncoder()
    parts = Parts().of(job)
    first, second = (packer.job(job, parts, parts) for _ in range(2))
    assert first["array"] is second["array"]


def test_no_array_is_pickled() -> None:
    """Every array is in the safetensors format, which opens with the length of a JSON header."""
    for records in (send(Job(factors(1))), codec.pack_update(Update(factors(1, dtype=torch.bfloat16), 1, 0.0), 0)):
        assert all(a.stype == "safetensors" and a.data[8:10] == b'{"' for a in arrays(records))


def with_array(records: RecordDict, array: ArrayRecord | Array) -> RecordDict:
    made = ArrayRecord({"numbers": array}) if isinstance(array, Array) else array
    return RecordDict({"head": records["head"], "array": made})


def with_head(records: RecordDict, old: str, new: str) -> RecordDict:
    text = str(records.config_records["head"]["json"])
    assert old in text
    return RecordDict({**dict(records.items()), "head": ConfigRecord({"json": text.replace(old, new, 1)})})


def with_part(content: bytes) -> RecordDict:
    """The job with another first part, of the size and the hash that the head gives."""
    first, *others = (part.content for part in PARTS.values())
    name, size = content_hash(first), len(first)
    records = with_head(SENT, f'["{name}",{size}]', f'["{content_hash(content)}",{len(content)}]')
    records = with_head(records, f'"start":["{name}"', f'"start":["{content_hash(content)}"')
    return with_array(records, as_array(b"".join([content, *others])))


def damaged(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


JOB = Job(factors(1))
SENT = send(JOB)
PARTS = Parts(torch.float32).of(JOB)
PART = next(iter(PARTS.values())).content
CONTENT = arrays(SENT)[0].data
LENGTH = len(PART)
PICKLE = Array(dtype="float32", shape=(1,), stype="numpy.ndarray", data=b"\x80\x04K\x01.")
OTHER = Array(dtype="float32", shape=(1,), stype="pickle", data=b"\x80\x04K\x01.")


def test_a_job_that_leaves_rows_with_its_client_comes_back_and_one_that_leaves_all_is_refused() -> None:
    for rows, said in ((1, ""), (4, "of rank 4 that leaves none to share")):
        message = codec.read_job(unpack(send(Job(factors(1), keeps_rank=rows))))
        if said:
            with pytest.raises(WireError, match=said):
                receive(message)
        else:
            assert receive(message).keeps_rank == rows


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (RecordDict(), "no head"),
        (RecordDict({"head": ConfigRecord({"json": 3})}), "no head"),
        (RecordDict({"head": ConfigRecord({"json": "{"})}), "JobHead"),
        (with_head(SENT, '"trains":"ABH"', '"trains":7'), "trains"),
        (with_head(SENT, '"trains"', '"run":"rm","trains"'), "run"),
        (with_head(SENT, '"batch_size":16', '"batch_size":0'), "batch_size"),
        (with_head(SENT, f",{LENGTH}]", ',"x"]'), "sent.0.1"),
        (with_head(SENT, f",{LENGTH}]", f",{LENGTH + 8}]"), f"parts are {len(CONTENT) + 8} bytes"),
        (with_head(SENT, f",{LENGTH}]", f",{-LENGTH}]"), "sent.0.1"),
        (with_head(SENT, '"sent":[["', '"sent":[["f'), "sent.0.0"),
        (with_head(SENT, f'"sent":[["{content_hash(PART)}', '"sent":[["' + "0" * 64), "hash"),
        (with_array(SENT, as_array(CONTENT[:-1])), f"{len(CONTENT) - 1} came"),
        (with_array(SENT, as_array(damaged(CONTENT, LENGTH - 1))), "damaged"),
        (with_array(SENT, as_array(damaged(CONTENT, 20))), "damaged"),
        (with_array(SENT, Array("uint8", (1, len(CONTENT)), "safetensors", CONTENT)), "says it is"),
        (with_array(SENT, Array("float64", (len(CONTENT),), "safetensors", CONTENT)), "float64"),
        (with_array(SENT, PICKLE), "says it is float32"),
        (with_array(SENT, OTHER), "in the form 'pickle'"),
        (with_part(to_bytes({"X q": torch.ones(2)})), "called 'X q'"),
        (with_part(to_bytes({"A q": torch.ones(2, dtype=torch.uint8)})), "is of U8"),
        (with_part(PART[:-4]), "not in the safetensors format"),
        (with_part(b"\xff" * 80), "the header of these numbers has"),
        (with_part(PART.replace(b'"shape":[4,6]', b'"shape":[4,7]', 1)), "not in the safetensors format"),
        (RecordDict({"head": SENT["head"]}), "0 came"),
        (RecordDict({**dict(SENT.items()), "more": SENT["array"]}), "more than was asked for: more"),
        (RecordDict({**dict(SENT.items()), "array": ArrayRecord({"a": PICKLE, "b": PICKLE})}), "2 arrays"),
    ],
)
def test_a_malformed_job_is_refused_with_what_is_wrong(records: RecordDict, said: str) -> None:
    with pytest.raises(WireError, match=said):
        receive(codec.read_job(unpack(records)))


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
        upload_checks.validated_update(unpack(codec.pack_update(Update(lora, 1, 0.0), 0)), JOB)


def test_an_update_may_not_share_more_than_was_asked() -> None:
    with pytest.raises(WireError, match=r"H is .* asked for nothing"):
        upload_checks.validated_update(
            unpack(codec.pack_update(Update(factors(1), 1, 0.0), 0)), Job(factors(1), shares="AB")
        )


@settings(max_examples=300)
@given(at=st.integers(0, LENGTH) | st.integers(0, 10**6), byte=st.integers(0, 255))  # header and numbers of a part
def test_no_byte_can_be_changed_unseen(at: int, byte: int) -> None:
    """Whatever one byte becomes, the job is refused, or it is the job that was sent."""
    data = bytearray(CONTENT)
    data[at % len(data)] = byte
    try:
        back = receive(codec.read_job(unpack(with_array(SENT, as_array(bytes(data))))))
    except WireError:
        return
    assert equal(back.start, receive(codec.read_job(unpack(SENT))).start)


@pytest.mark.parametrize("encoding", ["bfloat16", "int8"])
def test_a_small_update_arrives_as_its_client_reckons_with_it(encoding: Encoding) -> None:
    """In a half or a quarter of the bytes, and bit for bit what `with_feedback` says that the server will have."""
    start, trained = factors(1, dtype=torch.float32), factors(2, dtype=torch.float32)
    packed, received, _ = compress_with_error_feedback(start, trained, LoRA(), encoding)
    records = codec.pack_update(Update(received, 1, 0.5, packed=packed), 0)
    back = upload_checks.validated_update(unpack(records), Job(start, upload=encoding))
    assert isinstance(back, Update) and back.packed is not None and back.packed.nbytes == packed.nbytes
    assert all(torch.equal(t, back.lora.side(s)[m]) for s in "ABH" for m, t in received.side(s).items())


def test_an_update_in_another_encoding_than_asked_for_is_refused() -> None:
    start = factors(1, dtype=torch.float32)
    packed, received, _ = compress_with_error_feedback(start, factors(2, dtype=torch.float32), LoRA(), "int8")
    records = codec.pack_update(Update(received, 1, 0.5, packed=packed), 0)
    for asked in ("float32", "bfloat16"):
        with pytest.raises(WireError, match="an update is of int8"):
            upload_checks.validated_update(unpack(records), Job(start, upload=asked))


def test_the_hash_of_a_small_update_is_of_numbers_scales_and_names() -> None:
    start, change = factors(1, dtype=torch.float32), compress(factors(2, dtype=torch.float32), "int8")
    numbers, scales = change.numbers, change.scales
    others = [
        replace(change, numbers=LoRA({m: t + 1 for m, t in numbers.A.items()}, numbers.B, numbers.H)),
        replace(change, scales=LoRA({m: t * 2 for m, t in scales.A.items()}, scales.B, scales.H)),
        replace(change, numbers=LoRA({f"{m}2": t for m, t in numbers.A.items()}, numbers.B, numbers.H)),
    ]
    records = [codec.pack_update(Update(start, 1, 0.5, packed=packed), 0) for packed in (change, change, *others)]
    names = [json.loads(unpack(r).head)["name"] for r in records]
    assert names[0] == names[1] and len(set(names)) == 4


def test_projections_come_back_and_are_sent_once() -> None:
    right, left = {m: t.float() for m, t in factors(3, 9).A.items()}, dict(factors(4, 3).B)
    right = {m: torch.ones(t.shape[1], 9) for m, t in right.items()}  # (d_in, w)
    first, traffic = Job(factors(1), shares="BH", right=right), PartTracker()
    assert equal(LoRA(A=receive(codec.read_job(unpack(send(first, traffic)))).right), LoRA(A=right))
    second = Job(first.start, trains="", shares="A", left=left)
    sent = codec.read_job(unpack(send(second, traffic, torch.float64)))
    assert sent.head.left and set(sent.head.left) <= set(sent.sent) and not sent.head.right


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"right": factors(3).A, "shares": "BH"}, r"right is \(d_in, w\) and left \(d_out, w\)"),
        ({"left": {"q": torch.ones(8, 2)}, "shares": "A", "trains": ""}, r"right is \(d_in, w\) and left \(d_out, w\)"),
        ({"left": factors(3).B, "shares": "A"}, "with left it trains nothing and shares A"),
        ({"right": {m: t.T for m, t in factors(3).A.items()}}, "with right it trains A and B and shares B"),
        ({"right": factors(3).A, "resumes": True}, "no factors that a client resumes"),
    ],
)
def test_a_projection_that_cannot_be_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(WireError, match=said):
        receive(codec.read_job(unpack(send(Job(factors(1), **wrong)))))
