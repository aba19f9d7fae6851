"""The server trusts nobody: ten thousand malformed uploads are refused, and what honest clients sent comes out as ever.

FEDLORA_FUZZ=100000 tries that many of every kind, others each time.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.errors import Failure, FailureKind, WireError
from fedlora.jobs import MaskingTerms
from fedlora.lora import SIDES, LoRA
from fedlora.message_types import MOST_COUNT, MissingParts
from fedlora.messages import codec, envelope
from fedlora.messages.compression import compress, restore
from fedlora.messages.envelope import unpack
from fedlora.messages.parts import unflatten
from fedlora.metrics import Metrics
from fedlora.privacy.masked_update import size
from fedlora.run.plan import Plan, RoundResult
from fedlora.sections import Policy
from fedlora.server import upload_checks
from fedlora.server.fleet import FleetRules, FlowerFleet
from fedlora.server.rounds import fit
from fedlora.strategy import Client, Job, Update, load
from tests.server.test_fleet import Threads
from tests.support import malform
from tests.support.adapters import factors
from tests.support.malform import INF, NAN, NO_COUNT, NOT_FLOAT, NOT_TEXT, Kind

STEP = 1000.0  # largest norm of a change
FUZZ = int(os.environ.get("FEDLORA_FUZZ", 0))
EACH = max(FUZZ, 1300)  # malformed uploads of each kind
HAND = 10  # of one seed: hypothesis takes longer over an example than the server over its refusal
SLOWEST = 1.0  # CPU seconds of a refusal

SPENT = (
    {"epsilon": -1, "charges": 1},
    {"epsilon": NAN, "charges": 1},
    {"epsilon": 1, "charges": -1},
    {},
    {"epsilon": 1},
)
UPDATE: dict[tuple[str, ...], Any] = {
    ("examples",): NO_COUNT,
    ("loss",): [*NOT_FLOAT, INF, -INF, 10**4000],
    ("spent",): [*SPENT, "x", 1, [], True, {"epsilon": 1, "charges": 1, "x": 1}, {"epsilon": "1", "charges": 1}],
    ("kind",): [*NOT_TEXT, "", "metrics", "lacks", "Update", "x" * 10**4],
    ("name",): [*NOT_TEXT, "", "0" * 64, "x" * 10**4, "\n\x1b[2J"],
    ("round",): [*NO_COUNT, 0, 2, 10**4300 - 2],
}
METRICS = {(k,): NO_COUNT for k in ("examples", "targets", "correct")}
METRICS |= {
    ("loss",): [*NOT_FLOAT, None],
    ("kind",): [*NOT_TEXT, "", "update", "lacks", "x" * 10**4],
}
CLIENT = {("client", k): NO_COUNT for k in ("id", "examples", "rank", "records")}
CLIENT |= {("client",): [*NOT_TEXT, {"id": 1}], ("base",): NOT_TEXT}


def equal(x: LoRA, y: LoRA) -> bool:
    return all(
        list(x.side(s)) == list(y.side(s)) and all(torch.equal(t, y.side(s)[m]) for m, t in x.side(s).items())
        for s in SIDES
    )


def update_kind(job: Job, update: Update) -> Kind:
    """An upload that answers a job; of what is read, its numbers are the valid one's to the last bit."""

    def same(got: Any) -> bool:
        if isinstance(got, MissingParts):
            return False
        hidden = update.masked is None or torch.equal(got.masked, update.masked)
        return hidden and equal(got.lora, update.lora) and 1 <= got.examples <= MOST_COUNT

    def read(records: RecordDict) -> Any:
        return upload_checks.validated_update(unpack(records), job, STEP)

    return Kind(codec.pack_update(update, job.round), read, same, UPDATE)


def possible(got: Any) -> bool:
    """Could these be a client's metrics? They have no hash, so other ones are nobody's mistake."""
    counts = all(bool((table >= 0).all()) for name, table in got.tables().items() if name != "moments")
    return counts and 0 <= got.correct <= got.targets and got.examples >= 0 and got.loss == got.loss


def small(start: LoRA, to: LoRA) -> Update:
    delta = LoRA(**{s: {m: t - start.side(s)[m] for m, t in to.side(s).items()} for s in SIDES})
    packed = compress(delta, "int8")
    return Update(restore(start, packed), 17, 0.5, packed=packed)


def kinds() -> dict[str, Kind]:
    """A valid upload of every kind."""
    start, trained = factors(1, dtype=torch.float32), factors(2, dtype=torch.float32)
    masked = Job(start, masking=MaskingTerms(context="round 2", weight=0.5, reach=1.0, members=3, inbox={}), round=1)
    numbers = torch.arange(size(masked), dtype=torch.int32) * 7919
    table = torch.arange(9).view(3, 3)
    lacks, introduced = MissingParts(("ab" * 32, "cd" * 32)), Client(3, 99, 8)
    made = {
        "plain": update_kind(Job(start, round=1), Update(trained, 17, 0.5)),
        "half": update_kind(Job(start, round=1), Update(factors(2, dtype=torch.float16), 17, 0.5)),
        "resuming": update_kind(Job(start, resumes=True, round=1), Update(factors(3, 7, torch.float32), 17, 0.5)),
        "small": update_kind(Job(start, upload="int8", round=1), small(start, trained)),
        "masked": update_kind(masked, Update(LoRA(), 17, None, masked=numbers)),
        "metrics": Kind(
            codec.pack_metrics(Metrics(4, 9, 0.5, 3, table)),
            lambda records: upload_checks.read_metrics(unpack(records)),
            possible,
            METRICS,
        ),
        "introduction": Kind(
            codec.pack_client(introduced, "ab"),
            lambda records: upload_checks.read_client(unpack(records)),
            lambda got: got[0].rank > 0,
            CLIENT,
        ),
        "said": Kind(
            codec.pack_secagg_reply({"1": "ab", "2": "cd"}),
            lambda records: upload_checks.read_secagg_reply(unpack(records)),
            lambda got: all(isinstance(x, str) for pair in got.items() for x in pair),
            {("said",): NOT_TEXT[:-3], ("said", "1"): NOT_TEXT},
        ),
        "lacks": Kind(
            codec.pack_missing_parts(lacks),
            lambda records: upload_checks.validated_update(unpack(records), Job(start)),
            lambda got: bool(got.lacks) and all(isinstance(x, str) for x in got.lacks),
            {("lacks",): [*NOT_TEXT[:6], "x", [1], [None], [["x"]], ["x", 1], {"x": "y"}], ("kind",): NOT_TEXT},
        ),
    }
    return made


KINDS = kinds()


def refused(kind: Kind, records: RecordDict) -> bool:
    """Is it refused, soon, and in few words? Whatever else it raises comes out."""
    began = time.process_time()
    try:
        got = kind.read(records)
    except WireError as e:
        assert len(str(e)) < 600 and str(e).isprintable()
        return True
    finally:
        assert time.process_time() - began < SLOWEST
    assert kind.same(got)
    return False


examples = settings(
    max_examples=EACH // HAND,
    derandomize=not FUZZ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
randoms = st.randoms(use_true_random=True)  # of a seed that hypothesis draws


@pytest.mark.parametrize("name", KINDS)
def test_a_malformed_upload_is_refused(name: str) -> None:
    """In all 11700, or 9 times FEDLORA_FUZZ; each is counted once it has been refused."""
    kind, count = KINDS[name], Counter[bool]()

    @examples
    @given(randoms)
    def spoilt(random: Random) -> None:
        for way in random.choices(kind.ways, k=HAND):
            count[refused(kind, way(kind, random))] += 1
            assert not count[False], way

    assert refused(kind, kind.records) is False
    spoilt()
    assert count[True] >= EACH - HAND and len(KINDS) * (EACH - HAND) >= 10_000
    assert not malform.PICKLED.exists()


@pytest.mark.parametrize("name", KINDS)
def test_a_message_that_was_damaged_is_refused_or_means_what_it_did(name: str) -> None:
    """Bits flipped and pieces cut, spliced and put in, in the bytes of the whole message."""
    kind, came = KINDS[name], Counter[str]()

    @settings(examples, max_examples=FUZZ or 300)
    @given(randoms)
    def damaged(random: Random) -> None:
        try:
            records = malform.over_the_wire(kind, random.choice(list(KINDS.values())), random)
        except Exception:  # Flower makes nothing of it
            came["Flower"] += 1
            return
        came["refused" if refused(kind, records) else "harmless"] += 1

    damaged()
    assert came["refused"] > 20


LIARS = range(3, 13)


class Held:
    """A client's jobs, and the parts that it holds: the server sends it none of them twice."""

    def __init__(self) -> None:
        self._parts: dict[str, LoRA] = {}

    def job(self, message: Message) -> Job:
        order = codec.read_job(unpack(message.content))
        self._parts |= {name: unflatten(flat.content) for name, flat in order.sent.items()}
        return order.job(self._parts)


def honest(i: int) -> ClientApp:
    """A client that moves at random from where its job has it start."""
    app, held = ClientApp(), Held()

    @app.query()
    def describe(message: Message, context: Context) -> Message:
        return reply(message, codec.pack_client(Client(i, 10 + i, 4)))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        told = held.job(message)
        away = factors(100 * told.round + i, dtype=torch.float32)
        moved = LoRA(**{s: {m: t + 0.1 * away.side(s)[m] for m, t in told.start.side(s).items()} for s in "ABH"})
        return reply(message, codec.pack_update(Update(moved, 10 + i, 0.5), told.round))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return reply(
            message, codec.pack_metrics(Metrics(9, 9, 4.5 + held.job(message).round, i, torch.eye(3).long() * 3))
        )

    return app


def reply(message: Message, records: RecordDict) -> Message:
    if isinstance(records.get("head"), ConfigRecord):
        envelope.stamp(records, unpack(message.content).run)
    return Message(records, reply_to=message)


def liar(i: int) -> ClientApp:
    """A client that answers each job as an honest one would, but for one thing that is wrong."""
    app, lies, random, held = honest(i), ClientApp(), Random(i), Held()

    @lies.train()
    def train(message: Message, context: Context) -> Message:
        job = held.job(message)
        kind = update_kind(job, Update(job.start, 1, 0.5))
        answer = reply(message, random.choice(kind.ways)(kind, random))
        if random.random() < 0.1:
            answer = reply(message, kind.records)
            envelope.stamp(answer.content, random.choice(["another-run", "", "../x", "x" * 10**5]))
        return answer

    @lies.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        held.job(message)
        kind = KINDS["metrics"]
        return reply(message, random.choice(kind.ways)(kind, random))

    return lambda message, context: (app if message.metadata.message_type == "query" else lies)(message, context)  # type: ignore[return-value]


class Watched(FlowerFleet):
    """A fleet that counts what it refused; that a client failed by itself is no such thing."""

    refusals = 0

    def train(self, jobs: Mapping[int, Job]) -> Iterator[tuple[int, Update | Failure]]:
        for i, answer in super().train(jobs):
            if isinstance(answer, Failure):
                assert answer.kind == FailureKind.REFUSED, answer
                self.refusals += 1
            yield i, answer


def run(spec: str, rounds: int, apps: list[ClientApp]) -> tuple[list[RoundResult], int]:
    fleet = Watched(Threads(*apps), FleetRules(len(apps), largest_step=STEP, run="r"))
    plan = Plan(rounds, len(apps), policy=Policy(quorum=0.1, eval_every=5), evaluate_clients=True)
    return list(fit(load(spec), fleet, factors(1, dtype=torch.float32), plan)), fleet.refusals


@pytest.mark.parametrize("spec", ["fedavg", "fedex_lora"])
def test_what_honest_clients_come_to_is_bit_for_bit_what_it_is_without_liars(spec: str) -> None:
    strategy, rounds = load(spec), 20
    alone, none = run(spec, rounds, [honest(i) for i in range(3)])
    among, refusals = run(spec, rounds, [*(honest(i) for i in range(3)), *(liar(i) for i in LIARS)])
    assert none == 0 and refusals == rounds * len(LIARS)
    for x, y in zip(alone, among, strict=True):
        assert not x.failed and sorted(y.failed) == sorted(LIARS) and all(f.reason for f in y.failed.values())
        assert equal(strategy.adapter(x.state), strategy.adapter(y.state))
        assert (x.train_loss, x.eval_clients) == (y.train_loss, y.eval_clients)
    assert not equal(strategy.adapter(alone[0].state), strategy.adapter(alone[1].state))
