"""A run is joined once, on terms that are shown and kept; every message of it is bound to them."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlora.checks.small_models import small_model
from fedlora.client import agreement
from fedlora.client.policy import ClientPolicy
from fedlora.errors import PrivacyError, WireError
from fedlora.jobs import MaskingTerms, PrivacyTerms
from fedlora.messages.agreement import RunAgreement
from fedlora.sections import Training
from fedlora.strategy import Job

SMALL = small_model("gpt2")
MINE = ClientPolicy()
PRIVATE = {"dp.epsilon": 3.0, "dp.clip": 1.0, "dp.delta": 1e-5}
TERMS = PrivacyTerms(noise=1.0, clip=1.0, head_share=0.5, rate=0.5, steps=2, delta=1e-5)


def offered(trains: str = "AB", shares: str = "A", **settings: Any) -> RunAgreement:
    return RunAgreement(settings={"rounds": 9, **settings}, trains=trains, shares=shares)


def job(**fields: Any) -> Job:
    return Job(SMALL.start, **{"trains": "AB", "shares": "A", "rounds": 9, **fields})


def test_it_is_shown_in_words_once_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fedlora"):
        for _ in range(2):
            agreement.join(tmp_path, offered(**PRIVATE), MINE, "a-run")
    assert agreement.kept(tmp_path) == offered(**PRIVATE)
    assert caplog.text.count("run a-run asks of this client:") == 1
    assert "trained here: A, B; sent back: A" in caplog.text
    assert "DP-SGD by row, epsilon 3, delta 1e-05 at most" in caplog.text


def test_rows_that_were_to_stay_do_and_a_stage_of_ones_own_is_agreed_with_its_steps(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    agreed = replace(offered(shares="AB", **{"personal.steps": 5}, **PRIVATE), keeps_rank=1)
    with caplog.at_level(logging.INFO, "fedlora"):
        agreement.join(tmp_path, agreed, MINE, "a-run")
    assert "sent back: A, B, without the last 1 of the rank's rows" in caplog.text
    assert "for this client's own use: 5 steps from the model that it has; nothing of it is sent" in caplog.text
    alone = job(shares="AB", metrics=False, keeps_rank=1, stage="personal", training=Training(steps=5))
    agreement.refuse_unagreed(agreed, agreed.hash, alone)  # without DP-SGD, as nothing of it leaves
    for wrong, said in (
        (replace(alone, keeps_rank=0), "leaves 0 rows of the rank here, agreed were 1"),
        (replace(alone, training=Training(steps=6)), "has 6 steps done after the rounds, agreed were 5"),
        (replace(alone, stage="alone"), "trained alone, which was not agreed"),
        (replace(alone, metrics=True), "asks for word of what a client does for its own use"),
    ):
        with pytest.raises(PrivacyError, match=said):
            agreement.refuse_unagreed(agreed, agreed.hash, wrong)


def test_a_run_cannot_be_offered_again_on_other_terms(tmp_path: Path) -> None:
    agreement.join(tmp_path, offered(), MINE, "a-run")
    for other in (offered(shares="AB"), offered(**{"lora.rank": 16}), replace(offered(), base="0" * 64)):
        with pytest.raises(PrivacyError, match="run a-run was agreed with other"):
            agreement.join(tmp_path, other, MINE, "a-run")
    assert agreement.kept(tmp_path) == offered()


def test_a_run_that_is_resumed_with_more_rounds_is_agreed_anew(tmp_path: Path) -> None:
    agreement.join(tmp_path, offered(), MINE, "a-run")
    agreement.join(tmp_path, offered(rounds=12), MINE, "a-run")
    assert agreement.kept(tmp_path).config.rounds == 12


@pytest.mark.parametrize(
    "setting", ["data.path", "dp.ledger", "client.egress", "model.device", "no.such", "lora.init_data"]
)
def test_an_agreement_names_no_setting_that_is_not_the_servers(setting: str, tmp_path: Path) -> None:
    with pytest.raises(WireError, match="names a setting that is no part of an agreement"):
        agreement.join(tmp_path, offered(**{setting: "/"}), MINE, "a-run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("setting", "most"), [("lora.rank", 4096), ("model.max_length", 131_072)])
def test_an_agreement_has_bounds(setting: str, most: int, tmp_path: Path) -> None:
    with pytest.raises(WireError, match=f"has {setting} = 1000000000; the most is {most}"):
        agreement.join(tmp_path, offered(**{setting: 10**9}), MINE, "a-run")


def test_without_an_agreement_there_are_no_jobs(tmp_path: Path) -> None:
    with pytest.raises(WireError, match="this run's settings are not known here"):
        agreement.kept(tmp_path)


def test_a_message_of_another_agreement_is_refused() -> None:
    agreement.refuse_unagreed(offered(), offered().hash, job())
    for named in ("", offered(rounds=8).hash):
        with pytest.raises(PrivacyError, match="a message names agreement"):
            agreement.refuse_unagreed(offered(), named)


@pytest.mark.parametrize(
    ("settings", "asked", "says"),
    [
        ({}, {"shares": "AB"}, "has AB sent back, agreed were A"),
        ({}, {"trains": "ABH"}, "trains ABH, agreed were AB"),
        ({}, {"rounds": 10}, "is of round 1 of 10, agreed were 9"),
        ({}, {"round": 9}, "is of round 10 of 9"),
        ({}, {"upload": "int8"}, "has the update sent as int8, agreed was float32"),
        ({}, {"privacy": TERMS}, "has DP-SGD where that was not agreed"),
        ({"secure.aggregation": True}, {}, "masks the update where that was not agreed, or does not where it was"),
        (PRIVATE, {"metrics": False}, "has DP-SGD where that was not agreed, or none where it was"),
        (PRIVATE, {"metrics": True, "privacy": TERMS}, "asks for the training loss"),
        (PRIVATE, {"metrics": False, "privacy": replace(TERMS, delta=1e-4)}, "has delta = 0.0001, agreed was 1e-05"),
        (PRIVATE, {"metrics": False, "privacy": replace(TERMS, clip=9.0)}, "clips, or draws its noise, other than"),
        (PRIVATE, {"metrics": False, "privacy": replace(TERMS, seeded=True)}, "clips, or draws its noise, other than"),
        ({"dp.noise": 2.0}, {"metrics": False, "privacy": TERMS}, "has noise = 1, agreed was 2"),
    ],
)
def test_a_job_that_differs_in_an_agreed_point_is_refused(
    settings: dict[str, Any], asked: dict[str, Any], says: str
) -> None:
    with pytest.raises(PrivacyError, match=says):
        agreement.refuse_unagreed(offered(**settings), offered(**settings).hash, job(**asked))


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        (PRIVATE, {"metrics": False, "privacy": TERMS}),
        (PRIVATE, {"metrics": False, "privacy": replace(TERMS, delta=1e-6, noise=5.0)}),
        ({"messages.up": "int8"}, {"upload": "int8"}),
        (
            {"secure.aggregation": True},
            {"masking": MaskingTerms(context="", weight=1.0, reach=1.0, members=3, inbox={})},
        ),
        ({}, {"trains": "B", "shares": ""}),
    ],
)
def test_a_job_as_it_was_agreed_is_done(settings: dict[str, Any], asked: dict[str, Any]) -> None:
    agreement.refuse_unagreed(offered(**settings), offered(**settings).hash, job(**asked))
