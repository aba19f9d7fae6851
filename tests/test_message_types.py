"""Every type of message holds its bounds: what lies within comes back as it was, what lies outside is one refusal."""

import json
from collections.abc import Mapping
from dataclasses import replace
from math import inf, nan
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from fedlora.errors import PrivacyError, ReasonCode, WireError
from fedlora.jobs import Charge, Client, MaskingTerms, PrivacySpent, PrivacyTerms, SecAggStep
from fedlora.message_types import (
    MOST_COUNT,
    MOST_LOSS,
    MOST_MEMBERS,
    MOST_PARTS,
    MOST_REPEATS,
    MOST_STEPS,
    MOST_TURNS,
    ClientInfo,
    JobHead,
    MetricsHead,
    MissingParts,
    SecAggReply,
    UpdateHead,
)
from fedlora.messages.envelope import RawMessage, read_head
from fedlora.sections import Training

NO_NUMBER = (nan, inf, -inf, "1", None, True, [], {})
NO_COUNT = (*NO_NUMBER, -1, 1.5, MOST_COUNT + 1, 10**4000)
NO_TEXT = (7, None, ["x"], "a\nb", "\x1b[2J", "x" * 10**6)
NO_PART = (*NO_TEXT, "", "ab", "AB" * 32, "../" * 20 + "abcd", "g" * 64)
NAMES = [f"{i:064x}" for i in range(MOST_PARTS + 1)]
COUNTS = st.integers(1, MOST_COUNT)
FLOATS = st.floats(1e-3, 1.0)
PART = st.sampled_from(NAMES[:9])
HEX = st.text("0123456789abcdef", min_size=2, max_size=64)
KEY = st.text("0123456789abcdef", min_size=64, max_size=64)
CLIENT = st.builds(Client, st.integers(0, 2**31 - 1), COUNTS, st.integers(1, 2**20), COUNTS)
PRIVACY = st.builds(
    PrivacyTerms,
    noise=st.floats(1e-3, 1e6),
    clip=st.floats(1e-19, 1e19),
    head_share=st.floats(1e-6, 0.999),
    rate=st.floats(1e-9, 1.0),
    steps=st.integers(1, MOST_STEPS),
    delta=st.floats(1e-300, 0.999),
    seeded=st.booleans(),
    known=COUNTS,
)
MASKING = st.builds(
    MaskingTerms,
    context=st.just("round 3 (a1)"),
    weight=FLOATS,
    reach=st.floats(1e-30, 1e30),
    members=st.integers(1, MOST_MEMBERS),
    inbox=st.dictionaries(st.integers(0, 99), HEX, max_size=3),
    clip=st.floats(0, 1e19),
)
JOBS = st.builds(
    JobHead,
    trains=st.sampled_from(["A", "ABH", "", "BA"]),
    shares=st.sampled_from(["A", "ABRDH", ""]),
    sketch=st.dictionaries(st.just("model.layers.0.q-proj_1"), st.just((0, 5, 3))),
    gain=st.dictionaries(st.just("q"), st.floats(-1e6, 1e6)),
    resumes=st.booleans(),
    example_clip=st.floats(0, 1e19),
    privacy=st.none() | PRIVACY,
    masking=st.none() | MASKING,
    metrics=st.booleans(),
    upload=st.sampled_from(["float32", "bfloat16", "int8"]),
    feedback=st.booleans(),
    training=st.builds(Training, lr=st.floats(1e-9, 1e3)),
    scales=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
    round=st.integers(0, 10**6),
    rounds=st.integers(1, 10**6),
    start=st.lists(PART, max_size=5, unique=True).map(tuple),
    offset=st.lists(PART, max_size=5).map(tuple),
    right=st.lists(PART, max_size=1).map(tuple),
    left=st.lists(PART, max_size=1).map(tuple),
    sent=st.lists(st.tuples(PART, COUNTS), max_size=3).map(tuple),
    agreement=st.just("") | PART,
    keeps_rank=st.integers(0, 2**20 - 1),
    stage=st.sampled_from(["round", "personal", "alone"]),
)
TURNED = st.builds(
    replace,
    JOBS,
    trains=st.just("ABH"),
    turns=st.sampled_from([("BH", "AH"), ("B", "B", "HA")]),
    smoothing=st.sampled_from([(), (1.0,), (0.25, 0.5, 0.25)]),
)
VALUES: dict[type, st.SearchStrategy[Any]] = {
    JobHead: JOBS | TURNED,
    UpdateHead: st.builds(
        UpdateHead,
        COUNTS,
        st.none() | st.floats(-MOST_LOSS, MOST_LOSS),
        st.none() | st.builds(PrivacySpent, epsilon=st.floats(0, 1e18), charges=COUNTS),
        PART,
        st.integers(0, 10**6),
    ),
    MetricsHead: COUNTS.flatmap(
        lambda n: st.builds(MetricsHead, COUNTS, st.just(n), st.floats(-MOST_LOSS, MOST_LOSS), st.integers(0, n))
    ),
    ClientInfo: st.builds(ClientInfo, CLIENT, st.sampled_from(["", "ab12"])),
    MissingParts: st.builds(MissingParts, st.lists(PART, min_size=1, max_size=9).map(tuple)),
    SecAggReply: st.builds(SecAggReply, st.dictionaries(st.sampled_from(["1", "own", "sealing"]), HEX)),
    SecAggStep: st.builds(
        SecAggStep,
        st.sampled_from(["join", "share", "reveal"]),
        st.just("round 3 (a1)"),
        round=st.integers(0, 10**6),
        roster=st.dictionaries(st.integers(0, 99), st.tuples(KEY, KEY, KEY), max_size=3),
        threshold=st.integers(0, MOST_MEMBERS),
        survivors=st.lists(st.integers(0, 99), max_size=3).map(tuple),
        exchange=st.integers(0, 1),
        agreement=st.just("") | PART,
    ),
}
PRIVACY_BOUNDS = {
    "noise": (*NO_NUMBER, 0, -1, 1e-9, 1e300),
    "clip": (*NO_NUMBER, 0, -1, 1e-45, 1e-20, 1e20),
    "head_share": (*NO_NUMBER, 0, 1, -3),
    "rate": (*NO_NUMBER, 0, -0.1, 1.1),
    "steps": (*NO_COUNT, 0, -1000, -(10**6), MOST_STEPS + 1),
    "delta": (*NO_NUMBER, 0, 1, -1),
    "engine": (*NO_TEXT, "", "mine"),
    "seeded": (None, 1, "yes"),
    "known": NO_COUNT,
}
MASKING_BOUNDS = {
    "context": NO_TEXT,
    "weight": (*NO_NUMBER, 0, -1, 1.1),
    "reach": (*NO_NUMBER, 0, -1, 1e-31, 1e31),
    "members": (*NO_COUNT, 0, MOST_MEMBERS + 1),
    "inbox": (
        7,
        {"x": "ab"},
        {"-1": "ab"},
        {"1": "xy"},
        {"1": "a" * 10**6},
        dict.fromkeys(map(str, range(20000)), "ab"),
    ),
    "clip": (*NO_NUMBER, -1, 1e20),
}
TRAINING_BOUNDS = {
    "lr": (*NO_NUMBER, 0, -1, 3e38),
    "head_lr": (*NO_NUMBER, -1, 3e38),
    "lora_plus": (*NO_NUMBER, 0, 1e7),
    "momentum": (*NO_NUMBER, -1, 1),
    "weight_decay": (*NO_NUMBER, -1, 1e7),
    "epochs": (*NO_NUMBER, -1, 1e6),
    "steps": (*NO_COUNT, 10**8),
    "batch_size": (*NO_COUNT, 0, 2**21),
    "accumulate": (*NO_COUNT, 0, 2**21),
    "clip": (*NO_NUMBER, -1, 1e21),
    "warmup": (*NO_NUMBER, -1, 1.1),
    "prox": (*NO_NUMBER, -1, 1e10),
    "optimizer": (*NO_TEXT, "lion", "os:system()", "a b:c"),
    "loss": (*NO_TEXT, "focal", ":", "a:b:c", "../x:f"),
    "regulariser": (*NO_TEXT, "ridge", "a.b"),
}
MODULES = ({"a\n": 1}, {"\x1b[2J": 1}, {"": 1}, {"x" * 501: 1}, {"a b": 1})
JOB_BOUNDS = {
    "trains": (*NO_TEXT, "AA", "X", "abh"),
    "shares": (*NO_TEXT, "BAB", "A "),
    "sketch": (
        *({name: [0] for name in names} for names in MODULES),
        *({"q": rows} for rows in ([0, 0], [0] * 10**5, [-1], [2**20], [], [0.5], list(range(2**16 + 1)))),
    ),
    "gain": (*MODULES, *({"q": x} for x in (*NO_NUMBER, 1e7))),
    "example_clip": (*NO_NUMBER, -1, 1e20),
    "scales": (7, "yes", None),
    "upload": (*NO_TEXT, "float64"),
    "keeps_rank": (*NO_COUNT, 2**20),
    "stage": (*NO_TEXT, "", "later"),
    "seed": (*NO_COUNT[:-2], 2**64),
    "round": (*NO_COUNT, 10**7),
    "rounds": (*NO_COUNT, 0, 10**7 + 1),
    "start": (7, NAMES, [NAMES[0]] * (MOST_REPEATS + 1), *([name] for name in NO_PART)),
    "offset": (7, NAMES, [NAMES[0]] * (MOST_REPEATS + 1), *([name] for name in NO_PART)),
    "right": (7, NAMES, [NAMES[0]] * (MOST_REPEATS + 1), *([name] for name in NO_PART)),
    "left": (7, NAMES, [NAMES[0]] * (MOST_REPEATS + 1), *([name] for name in NO_PART)),
    "correction": (7, NAMES, [NAMES[0]] * (MOST_REPEATS + 1), *([name] for name in NO_PART)),
    "agreement": NO_PART[:5],
    "turns": (7, None, [""], ["B"], ["A", "B"], ["AA"], ["X"], ["D"], [7], ["A"] * (MOST_TURNS + 1)),
    "smoothing": (7, None, *([x] for x in NO_NUMBER), [0.5], [0.5, 0.5], [0.2, 0.3, 0.5], [20, -39, 20]),
    "sent": (7, [[NAMES[0], -1]], [[NAMES[0], 2**60]], [["ab", 1]], [[NAMES[0], 1]] * (MOST_PARTS + 1)),
}
CLIENT_BOUNDS = {
    "id": (*NO_COUNT, 2**31),
    "examples": NO_COUNT,
    "rank": (*NO_COUNT, 0, 2**20 + 1),
    "records": NO_COUNT,
}
STEP_BOUNDS = {
    "step": (*NO_TEXT, "steal"),
    "context": NO_TEXT,
    "round": (*NO_COUNT, 10**7),
    "roster": (7, {"x": ["ab" * 32] * 3}, {"1": ["ab"] * 3}, {"1": ["ab" * 32] * 2}, {"-1": ["ab" * 32] * 3}),
    "threshold": (*NO_COUNT, MOST_MEMBERS + 1),
    "agreement": NO_PART[:5],
    "exchange": (*NO_COUNT, 2),
    "survivors": (7, [-1], ["x"], list(range(MOST_MEMBERS + 1))),
}
BOUNDS: dict[type, dict[str, Mapping[str, Any]]] = {  # type -> place in it, as "" or a field -> field -> wrong values
    JobHead: {"": JOB_BOUNDS, "privacy": PRIVACY_BOUNDS, "masking": MASKING_BOUNDS, "training": TRAINING_BOUNDS},
    UpdateHead: {
        "": {
            "examples": (*NO_COUNT, 0),
            "loss": (nan, inf, -inf, "1", [], 1e7, 1.7e308),
            "name": NO_PART,
            "round": (*NO_COUNT, 10**7),
        },
        "spent": {"epsilon": (*NO_NUMBER, -1, 1e19), "charges": NO_COUNT},
    },
    MetricsHead: {
        "": {
            "examples": (*NO_COUNT, 0),
            "targets": (*NO_COUNT, 0),
            "loss": (*NO_NUMBER, 1e7, -1.7e308),
            "correct": (*NO_COUNT, MOST_COUNT),
        }
    },
    ClientInfo: {"": {"base": ("xyz", "a" * 65, 7, None)}, "client": CLIENT_BOUNDS},
    MissingParts: {"": {"lacks": (7, [], [*NAMES, *NAMES, *NAMES], *([name] for name in NO_PART))}},
    SecAggReply: {
        "": {"said": (7, {"A": "ab"}, {"x\n": "ab"}, {"1": "-30"}, {"1": "nan"}, {"1": "a" * 10**4}, {"1": ""})}
    },
    SecAggStep: {"": STEP_BOUNDS},
}
PLACES = [(kind, where, name) for kind, places in BOUNDS.items() for where, all in places.items() for name in all]


def text(kind: type, value: Any) -> str:
    return TypeAdapter(kind).dump_json(value).decode()


def read(kind: type, head: str) -> Any:
    return read_head(RawMessage(head, "", None), kind)


def example(kind: type) -> dict[str, Any]:
    """A valid head as JSON, with nothing left out that may be left out."""
    terms = PrivacyTerms(noise=1.0, clip=1.0, head_share=0.5, rate=0.1, steps=3, delta=1e-5)
    masking = MaskingTerms(context="round 1 (a)", weight=0.5, reach=1.0, members=3, inbox={1: "ab"})
    plain: dict[str, Any] = {"sketch": {}, "gain": {}, "resumes": False, "example_clip": 0.0, "metrics": True}
    more: dict[str, Any] = {"upload": "int8", "feedback": False, "training": Training(), "seed": 1, "round": 0}
    parts: dict[str, Any] = {"rounds": 1, "start": (), "offset": (), "sent": ()}
    made = {
        JobHead: lambda: JobHead(trains="A", shares="A", privacy=terms, masking=masking, **plain, **more, **parts),
        UpdateHead: lambda: UpdateHead(3, 0.5, PrivacySpent(epsilon=1.0, charges=1), NAMES[0], 0),
        MetricsHead: lambda: MetricsHead(3, 9, 0.5, 4),
        ClientInfo: lambda: ClientInfo(Client(0, 3, 4, 3), "ab"),
        MissingParts: lambda: MissingParts((NAMES[0],)),
        SecAggReply: lambda: SecAggReply({"1": "ab"}),
        SecAggStep: lambda: SecAggStep("join", "round 1 (a)"),
    }[kind]()
    head: dict[str, Any] = json.loads(text(kind, made))
    return head


@pytest.mark.parametrize("kind", VALUES, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_a_value_within_its_bounds_comes_back_as_it_was(kind: type, data: st.DataObject) -> None:
    value = data.draw(VALUES[kind])
    assert read(kind, text(kind, value)) == value


def test_a_job_of_before_there_were_turns_trains_all_its_sides_in_every_step() -> None:
    head = example(JobHead)
    del head["turns"], head["smoothing"], head["keeps_rank"], head["stage"]
    found = read(JobHead, json.dumps(head))
    assert (found.turns, found.smoothing) == ((), ())


@pytest.mark.parametrize(("kind", "where", "name"), PLACES, ids=lambda x: getattr(x, "__name__", x))
def test_a_value_out_of_its_bounds_is_one_coded_refusal(kind: type, where: str, name: str) -> None:
    for wrong in BOUNDS[kind][where][name]:
        head = example(kind)
        (head[where] if where else head)[name] = "@@"
        said = "9" * 4001 if wrong == 10**4000 else json.dumps(wrong)
        with pytest.raises(WireError) as refused:
            read(kind, json.dumps(head).replace('"@@"', said))
        assert refused.value.code == ReasonCode.MESSAGE and len(str(refused.value)) < 700
        assert str(refused.value).isprintable()


@pytest.mark.parametrize("kind", BOUNDS, ids=lambda kind: kind.__name__)
def test_a_field_that_is_not_known_is_refused(kind: type) -> None:
    with pytest.raises(WireError):
        read(kind, json.dumps({**example(kind), "more": 1}))


@pytest.mark.parametrize("kind", BOUNDS, ids=lambda kind: kind.__name__)
def test_the_bounds_of_every_field_are_tried(kind: type) -> None:
    tried = {*BOUNDS[kind][""], *BOUNDS[kind]}
    decided = {"kind", "resumes", "metrics", "feedback"}  # two values, or one
    assert set(example(kind)) - decided <= tried


@given(
    noise=st.floats() | st.sampled_from([0.0, 1.0]),
    rate=st.floats() | st.sampled_from([0.0, 1.0]),
    steps=st.integers() | st.floats(),
)
def test_no_charge_pays_a_ledger_back(noise: float, rate: float, steps: int) -> None:
    """One that exists has whole steps of 0 or more, and a noise and a rate that can be."""
    try:
        charge = Charge(noise=noise, rate=rate, steps=steps)
    except PrivacyError:
        return
    assert charge.steps >= 0 and isinstance(charge.steps, int) and 0 <= charge.noise < inf and 0 <= charge.rate <= 1


@pytest.mark.parametrize("wrong", [{"noise": nan}, {"noise": -1.0}, {"rate": 2.0}, {"steps": -1000}, {"steps": nan}])
def test_a_charge_that_would_pay_back_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(PrivacyError, match="cannot be"):
        Charge(**({"noise": 1.0, "rate": 0.1, "steps": 4} | wrong))
