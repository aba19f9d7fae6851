"""The contract is worth what it catches: every check finds a bug planted for it, and passes the sound twin."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.checks import declarations, on_random_factors, on_small_models, structure
from fedlora.checks.contract import CHECKS, Check, verify
from fedlora.checks.report import check as report
from fedlora.client.policy import ClientPolicy
from fedlora.client.runner import JobRunner
from fedlora.encoding.client_data import ClientData
from fedlora.errors import Failure, StrategyError
from fedlora.jobs import Job, shared_part
from fedlora.lora import split_rank
from fedlora.metrics import Metrics
from fedlora.models import optimizer
from fedlora.server.aggregation import Answers
from fedlora.simulations.serial import Serial
from fedlora.strategies.dual import Dual
from fedlora.strategies.fedask import FedASK
from fedlora.strategies.fedavg import FedAvg
from fedlora.strategies.fedex_lora import FedEx
from fedlora.strategies.fedmomentum import FedMomentum
from fedlora.strategies.fedsa_lora import FedSALoRA
from fedlora.strategies.ffa_lora import FFALoRA
from fedlora.strategies.flora import FLoRA
from fedlora.strategies.florist import FLoRIST
from fedlora.strategies.fslora import FSLoRA
from fedlora.strategies.head import Head
from fedlora.strategies.hetlora import HetLoRA
from fedlora.strategies.la_lora import LALoRA
from fedlora.strategies.q_ffl import QFFL
from fedlora.strategies.ravan import Ravan
from fedlora.strategies.scaffold import Scaffold
from fedlora.strategy import Strategy
from tests.support.bugs import (
    AddsInPlace,
    AsksOnce,
    AveragesScalesApart,
    BringsNoA,
    BuildsTheProduct,
    ClustersByPosition,
    ClustersSaySums,
    CorrectsWhatRests,
    CountsOnItself,
    CutsToOwnRank,
    DecaysTheHead,
    DeliversNoOffset,
    FedExSaysDora,
    FedExSaysLittleIsSent,
    FedExSaysSums,
    FFASaysInexact,
    FillsTheBlocks,
    FillsTheRows,
    FLoRASaysItContinues,
    FoldsAlphaTwice,
    ForgetsTheRest,
    IgnoresTheWeights,
    Interpolates,
    KeepsASet,
    KeepsHalf,
    LosesItsScales,
    MergesTheLastOnly,
    NeverSketches,
    PaddedSaysExact,
    ScalesTheRest,
    SendsTheLastResidualOnly,
    SetsItsTraining,
    ShrinksToTheEnergy,
    SketchesForEach,
    SketchesTwiceTheSame,
    SquaresTheWeights,
    SumsInHalf,
    SwapsTheHeads,
    TakesSendersUnsaid,
    TakesTheFirstOnly,
    TakesTheStartForZero,
    TellsFactorsByShape,
    TransposesB,
    TransposesTheResidual,
    TruncatedSaysExact,
    WeighsAllAlike,
    WeighsByLossesUnsaid,
    WeighsByTheScale,
    WeighsTwice,
    turned,
)
from tests.support.clustered import Clustered

BITES: list[tuple[Strategy[Any], Strategy[Any], Check]] = [
    (TransposesTheResidual(), FedEx(), declarations.check_exact_is_as_declared),
    (TransposesTheResidual(), FedEx(), on_small_models.check_real_training_is_exact_where_declared),
    (WeighsTwice(), FedAvg(), declarations.check_sums_only_is_as_declared),
    (TakesTheFirstOnly(), FedAvg(), on_random_factors.check_order_of_clients_changes_nothing),
    (TakesTheFirstOnly(), FedAvg(), on_random_factors.check_equal_updates_do_what_one_does),
    (MergesTheLastOnly(), FLoRA(), declarations.check_exact_is_as_declared),
    (IgnoresTheWeights(), FedEx(), declarations.check_exact_is_as_declared),
    (IgnoresTheWeights(), FedEx(), on_small_models.check_real_training_is_exact_where_declared),
    (SquaresTheWeights(), FedAvg(), on_random_factors.check_twice_the_weight_counts_as_two_clients),
    (WeighsAllAlike(), FedAvg(), on_random_factors.check_twice_the_weight_counts_as_two_clients),
    (WeighsByTheScale(), FedAvg(), on_random_factors.check_scale_of_weights_changes_nothing),
    (TellsFactorsByShape(), FLoRA(), on_random_factors.check_rank_may_be_a_dimension),
    (SendsTheLastResidualOnly(), FedEx(), on_random_factors.check_a_client_that_slept_is_right_after_one_job),
    (SendsTheLastResidualOnly(), FedEx(), on_small_models.check_a_client_that_slept_computes_with_the_model),
    (DeliversNoOffset(), FedEx(), on_random_factors.check_what_is_delivered_is_what_clients_start_from),
    (DeliversNoOffset(), FedEx(), on_small_models.check_an_exported_adapter_is_the_model_that_was_trained),
    (TakesTheStartForZero(), FLoRA(), on_random_factors.check_a_start_that_is_not_zero_is_taken_off),
    (NeverSketches(), FSLoRA(), on_small_models.check_numbers_sent_are_as_declared),
    (NeverSketches(), FSLoRA(), declarations.check_mixed_ranks_are_as_declared),
    (SketchesTwiceTheSame(), FSLoRA(), structure.check_jobs_are_complete),
    (SumsInHalf(), FedAvg(), on_random_factors.check_half_precision_is_summed_in_single),
    (KeepsHalf(), FedAvg(), on_random_factors.check_half_precision_is_summed_in_single),
    (AddsInPlace(), FedAvg(), structure.check_arguments_are_left_alone),
    (Interpolates(), FedAvg(), on_random_factors.check_order_of_clients_changes_nothing),
    (KeepsASet(), FedAvg(), on_random_factors.check_state_survives_a_checkpoint),
    (CountsOnItself(), FedAvg(), structure.check_nothing_is_remembered_but_the_state),
    (CountsOnItself(), FedAvg(), structure.check_options_are_those_of_a_frozen_dataclass),
    (FillsTheRows(), Dual(), on_random_factors.check_rows_that_stay_with_clients_are_theirs_alone),
    (FoldsAlphaTwice(), FLoRA(), declarations.check_exact_is_as_declared),
    (FoldsAlphaTwice(), FLoRA(), on_random_factors.check_one_client_alone_is_followed),
    (BuildsTheProduct(), FedEx(), on_random_factors.check_no_product_is_built_on_the_server),
    (BringsNoA(), FFALoRA(), structure.check_jobs_are_complete),
    (CutsToOwnRank(), HetLoRA(), declarations.check_mixed_ranks_are_as_declared),
    (DecaysTheHead(), FedAvg(), on_random_factors.check_a_head_that_is_not_shared_stays_with_its_owner),
    (TruncatedSaysExact(), FLoRIST(), declarations.check_exact_is_as_declared),
    (PaddedSaysExact(), HetLoRA(), declarations.check_exact_is_as_declared),
    (ScalesTheRest(), FedMomentum(), declarations.check_exact_is_as_declared),
    (ForgetsTheRest(), FedMomentum(), declarations.check_exact_is_as_declared),
    (ForgetsTheRest(), FedMomentum(), on_random_factors.check_a_client_that_slept_is_right_after_one_job),
    (ShrinksToTheEnergy(), FedMomentum(), declarations.check_mixed_ranks_are_as_declared),
    (FedExSaysSums(), FedEx(), declarations.check_sums_only_is_as_declared),
    (FedExSaysLittleIsSent(), FedEx(), on_small_models.check_numbers_sent_are_as_declared),
    (FedExSaysDora(), FedAvg(), on_small_models.check_it_works_with_the_kinds_it_declares),
    (FFASaysInexact(), FFALoRA(), declarations.check_exact_is_as_declared),
    (FLoRASaysItContinues(), FLoRA(), declarations.check_continues_is_as_declared),
    (TakesSendersUnsaid(), Clustered(), declarations.check_needs_senders_is_as_declared),
    (ClustersSaySums(), Clustered(), declarations.check_needs_senders_is_as_declared),
    (ClustersByPosition(), Clustered(), on_random_factors.check_order_of_clients_changes_nothing),
    (AveragesScalesApart(), Ravan(), declarations.check_exact_is_as_declared),
    (SwapsTheHeads(), Ravan(), declarations.check_continues_is_as_declared),
    (FillsTheBlocks(), Ravan(), on_small_models.check_numbers_sent_are_as_declared),
    (LosesItsScales(), Ravan(), structure.check_jobs_are_complete),
    (TransposesB(), FedAvg(), structure.check_adapters_fit_the_modules),
    (AsksOnce(), FedASK(), declarations.check_exchanges_are_as_declared),
    (SketchesForEach(), FedASK(), declarations.check_exchanges_are_as_declared),
    (WeighsByLossesUnsaid(), QFFL(), declarations.check_needs_losses_is_as_declared),
    (CorrectsWhatRests(), Scaffold(), structure.check_jobs_are_complete),
    (SetsItsTraining(), FedAvg(), on_random_factors.check_jobs_leave_to_the_run_what_it_fills_in),
]


@pytest.mark.parametrize(("broken", "sound", "check"), BITES, ids=lambda x: getattr(x, "__name__", type(x).__name__))
def test_a_broken_strategy_fails_where_its_sound_twin_passes(
    broken: Strategy[Any], sound: Strategy[Any], check: Check
) -> None:
    assert verify(check, sound).outcome == "passed"
    failed = verify(check, broken)
    assert failed.outcome == "failed" and failed.detail.startswith(str(broken))


class Altered(Serial):
    """A fleet whose clients do another job than the one they are given."""

    def change(self, job: Job) -> Job:
        raise NotImplementedError

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        return super().train({i: self.change(job) for i, job in jobs.items()})

    def evaluate(self, jobs: Mapping[int, Job]) -> Mapping[int, Metrics | Failure]:
        return super().evaluate({i: self.change(job) for i, job in jobs.items()})


class ThawsA(Altered):
    """The E2E baseline of FedEx-LoRA's release freezes A before PEFT wraps the model, and so not at all."""

    def change(self, job: Job) -> Job:
        return replace(job, trains="ABH")


class NeverTrains(Altered):
    """A learning rate that a schedule, made anew every round, never lets off the ground."""

    def change(self, job: Job) -> Job:
        return replace(job, training=replace(job.training, lr=1e-30))


class TrainsBothInATurn(Altered):
    """A client that knows of no turns: every step moves A and B."""

    def change(self, job: Job) -> Job:
        return replace(job, turns=())


class BeginsWithA(Altered):
    """LA-LoRA's release trains A in its first step, where B is zero: it has no gradient, and with noise is noise."""

    def change(self, job: Job) -> Job:
        return replace(job, turns=job.turns[1:] + job.turns[:1])


class RestsWithAZeroGradient(Serial):
    """The gradient of a side that rests is zero, not none: momentum and weight decay move it all the same."""

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        with pytest.MonkeyPatch.context() as planted:
            planted.setattr(optimizer, "turn_to", _all_with_a_zero_gradient)
            return [*super().train(jobs)]


def _all_with_a_zero_gradient(model: Any, sides: Any, job: Job, turn: str) -> Any:
    for side, parameters in sides.items():
        for p in parameters:
            p.grad = torch.zeros_like(p)
            p.requires_grad_(side in turn)
    return {side: parameters for side, parameters in sides.items() if side in turn}


class TransposesTheOffset(Altered):
    """The released FedEx-LoRA, on the client: right for Conv1D, wrong for Linear, silent where a module is square."""

    def change(self, job: Job) -> Job:
        return replace(job, offset=tuple(turned(part) for part in job.offset))


class LoadsTheLastPartOnly(Altered):
    """The client takes an absolute offset for one since last time, and starts from the base every time."""

    def change(self, job: Job) -> Job:
        return replace(job, offset=job.offset[-1:])


class TakesSTwice(Altered):
    """alpha is in the configuration, and in the factors once more."""

    def change(self, job: Job) -> Job:
        return replace(job, gain=dict.fromkeys(job.start.A, 2.0))


class ForgetsTheGain(Altered):
    """A sketch of k of r directions without its factor r / k."""

    def change(self, job: Job) -> Job:
        return replace(job, gain={})


class HandsOneAdapterAround(Serial):
    """FedSA-LoRA's release trains one model object: B and head go from client to client."""

    def __init__(self, *args: Any) -> None:
        def in_one_folder(i: int, data: ClientData, folder: Path, policy: ClientPolicy) -> JobRunner:
            return JobRunner(i, data, folder.parent / "0", policy)

        super().__init__(*args, make=in_one_folder)


class AnswersForAnother(Serial):
    """Every answer is taken for that of the client before."""

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        answers = list(super().train(jobs))
        ids = [i for i, _ in answers]
        return zip([*ids[1:], ids[0]], [answer for _, answer in answers], strict=True)


class SendsTheHead(Serial):
    """A head that is the client's own is in its message all the same."""

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        for i, answer in super().train(jobs):
            assert not isinstance(answer, Failure)
            yield i, replace(answer, lora=answer.lora.over(self._model.get_adapter().only("H")))


class ProjectsItsStart(Serial):
    """The second pass finds the model as the job would load it, and not as the client left it."""

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        for i, answer in super().train(jobs):
            assert not isinstance(answer, Failure)
            yield i, replace(answer, lora=shared_part(jobs[i], jobs[i].start)) if jobs[i].left else answer


class SendsTheLastRows(Serial):
    """Of an adapter whose last rows stay with their client, these are sent, and the first ones stay."""

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        for i, answer in super().train(jobs):
            assert not isinstance(answer, Failure)
            rows = split_rank(self._model.get_adapter().only("AB"), jobs[i].keeps_rank)[1]
            yield i, replace(answer, lora=rows.over(answer.lora))


class WearsNoRows(Altered):
    """A client that starts every job from the server's rows: what it trained of its own is lost."""

    def change(self, job: Job) -> Job:
        return replace(job, keeps_rank=0)


CLIENTS: list[tuple[type[Serial], Strategy[Any], Any]] = [
    (ThawsA, FFALoRA(), on_small_models.check_what_trains_moves_and_nothing_else),
    (ThawsA, FFALoRA(), on_small_models.check_gradients_reach_what_trains_alone),
    (NeverTrains, FedAvg(), on_small_models.check_what_trains_moves_and_nothing_else),
    (TrainsBothInATurn, LALoRA(), on_small_models.check_local_steps_train_the_sides_in_turn),
    (BeginsWithA, LALoRA(), on_small_models.check_local_steps_train_the_sides_in_turn),
    (RestsWithAZeroGradient, LALoRA(), on_small_models.check_local_steps_train_the_sides_in_turn),
    (TransposesTheOffset, FedEx(), on_small_models.check_a_model_is_its_weights_plus_s_times_the_product),
    (LoadsTheLastPartOnly, FedEx(), on_small_models.check_a_client_that_slept_computes_with_the_model),
    (TakesSTwice, FedAvg(), on_small_models.check_a_model_is_its_weights_plus_s_times_the_product),
    (TakesSTwice, FedAvg(), on_small_models.check_an_exported_adapter_is_the_model_that_was_trained),
    (ForgetsTheGain, FSLoRA(), on_small_models.check_a_model_is_its_weights_plus_s_times_the_product),
    (HandsOneAdapterAround, FedSALoRA(), on_small_models.check_what_a_client_keeps_is_its_own),
    (HandsOneAdapterAround, FedAvg(), on_small_models.check_what_a_client_keeps_is_its_own),
    (AnswersForAnother, Clustered(), on_small_models.check_senders_are_those_of_the_updates),
    (ProjectsItsStart, FedASK(), on_small_models.check_a_second_pass_is_of_what_the_first_trained),
    (SendsTheLastRows, Dual(), on_small_models.check_messages_hold_what_is_shared_alone),
    (WearsNoRows, Dual(), on_small_models.check_messages_hold_what_is_shared_alone),
    (HandsOneAdapterAround, Dual(), on_small_models.check_what_a_client_keeps_is_its_own),
    (SendsTheHead, FedSALoRA(), on_small_models.check_messages_hold_what_is_shared_alone),
    (SendsTheHead, Head(FedAvg(), "local"), on_small_models.check_messages_hold_what_is_shared_alone),
]


@pytest.mark.parametrize(("fleet", "strategy", "check"), CLIENTS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_broken_client_fails_where_a_sound_one_passes(
    fleet: type[Serial], strategy: Strategy[Any], check: Any
) -> None:
    assert check(strategy) is None
    with pytest.raises(AssertionError):
        check(strategy, fleet)


def test_every_check_is_seen_to_fail() -> None:
    assert {*CHECKS} == {bite[2] for bite in (*BITES, *CLIENTS)}


def test_a_failure_names_the_strategy_the_module_and_the_numbers() -> None:
    found = verify(declarations.check_exact_is_as_declared, TransposesTheResidual())
    assert found.detail.startswith("TransposesTheResidual(rank=0, assignment='average') declares exact, and it is off")
    assert re.search(r"by \d+ of \d+ at query of client 0; take exact = True back", found.detail)


MINE = """
from dataclasses import dataclass
from fedlora.lora import average
from fedlora.strategy import Job, Strategy

@dataclass(frozen=True)
class Mine(Strategy):
    sums_only = continues = True

    def init(self, lora): return lora
    def client_init(self, state, client): return Job(start=state)
    def aggregate(self, state, updates, weights): return average(updates, weights)
    def adapter(self, state): return state
"""
TORN = """
class Torn(Mine):
    def init(self, lora): raise KeyError("q_proj")

class Worn(Torn):
    pass
"""


HALF = """
class Half(Strategy):
    def init(self, lora): return lora
"""


def test_a_strangers_file_is_checked_line_by_line_but_for_a_class_that_cannot_be_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(MINE + HALF)
    assert not report([str(tmp_path / "mine.py")], {})
    said = capsys.readouterr().out
    assert "The order in which clients answer changes nothing." in said and " 0 failed" in said
    assert "Half was not checked: strategy Half does not define adapter, aggregate, client_init" in said


def test_several_strategies_stand_in_a_table_with_what_fails_below(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(MINE + TORN)
    assert not report([f"{tmp_path}/mine.py:{name}" for name in ("Torn", "Worn")], {})
    said = capsys.readouterr().out
    assert re.search(r"^adapters fit the modules +X X *$", said, re.MULTILINE)
    assert re.search(r"check_adapters_fit_the_modules: Worn\(\): KeyError: 'q_proj', raised in init, line \d+ of", said)
    assert "checks after this failure were not run" in said and " 2 failed" in said


@pytest.mark.parametrize(
    ("content", "spec", "said"),
    [
        (MINE, "mine.py:Main", 'has no strategy "Main"; did you mean "Mine"?'),
        (MINE + HALF, "mine.py:Half", "strategy Half does not define adapter, aggregate, client_init"),
        ("x = 1", "mine.py", "defines no strategy"),
        ("import nowhere_at_all", "mine.py", "cannot be imported: ModuleNotFoundError"),
        (MINE, "yours.py", "there is no such file"),
        (MINE, "no_such_strategy", 'there is no strategy "no_such_strategy"'),
    ],
)
def test_what_cannot_be_checked_is_one_sentence(
    content: str, spec: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StrategyError, match=re.escape(said)):
        report([spec], {})
