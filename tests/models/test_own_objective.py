"""A loss and a figure of the user's own: what they are given, what they may give, and that no target has two says."""

import pytest
import torch

from fedlora.checks.small_models import small_model
from fedlora.errors import ConfigError
from fedlora.kernels.evaluation import measure
from fedlora.kernels.losses import example_losses
from fedlora.models.objectives import DPO, Objective, OneClass, OneNumber, SeveralLabels, Tokens
from fedlora.models.own_objective import losses_by_example, mixes_targets, with_own_loss, with_own_metric
from fedlora.sections import Training
from tests.support import own_training
from tests.support.own_training import HERE

G = torch.Generator().manual_seed(1)
CLASSES = torch.tensor([0, 2, 1, 2])
SCORES = torch.randn(4, 3, generator=G)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_tasks_own_loss_by_its_path_is_the_tasks_own_loss(kind: str, private: bool) -> None:
    small = small_model(kind)  # type: ignore[arg-type]
    small.model.net.eval()
    plain, by_example = small.model.losses(small.batch), example_losses(small.model, small.batch)
    with small.model.learning(Training(loss=f"{HERE}:task_loss"), private=private):
        assert torch.allclose(small.model.losses(small.batch), plain, atol=1e-6)
        assert torch.allclose(example_losses(small.model, small.batch), by_example, atol=1e-5)
    assert isinstance(small.model.objective, OneClass if kind == "bert" else Tokens)


def test_a_private_loss_sees_one_example_at_a_time_and_only_targets_that_count() -> None:
    targets = torch.tensor([-100, 3, 1, 0, -100, -100, 2, -100, 1])  # of three examples
    own = with_own_loss(Tokens(shifted=True), "p:noted", own_training.noted, one_by_one=True)
    own_training.SEEN.clear()
    found = losses_by_example(own, torch.randn(9, 5, generator=G), targets, 3)
    assert own_training.SEEN == [2, 1, 2]
    assert found.shape == (3, 3) and (found.flatten()[targets == -100] == 0).all()


def test_an_example_of_which_nothing_counts_has_a_loss_of_zero_with_a_gradient() -> None:
    own = with_own_loss(Tokens(shifted=True), "p:focal", own_training.focal, one_by_one=True)
    scores = torch.randn(2, 5, generator=G, requires_grad=True)
    own.losses(scores, torch.tensor([-100, -100])).sum().backward()
    assert scores.grad is not None and not scores.grad.any()


@pytest.mark.parametrize(("name", "mixes"), [("focal", False), ("centred", True)])
def test_a_loss_in_which_targets_have_a_share_in_one_another_is_told_apart(name: str, mixes: bool) -> None:
    own = with_own_loss(OneClass(3), name, getattr(own_training, name), one_by_one=False)
    assert mixes_targets(own, SCORES, CLASSES) == mixes


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (own_training.mean, r"is to give a number for each target, \(4,\), and gave a torch.float32 of \(\)"),
        (lambda s, t: t, "gave a torch.int64"),
        (lambda s, t: None, "gave NoneType"),
        (lambda s, t: s / "x", r"train\.loss = lab:f failed on scores \(4, 3\) and targets \(4,\): TypeError"),
    ],
)
def test_what_is_no_loss_is_a_sentence(function: object, said: str) -> None:
    own = with_own_loss(OneClass(3), "lab:f", function, one_by_one=False)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=said):
        own.losses(SCORES, CLASSES)


OTHERS: list[tuple[Objective, torch.Tensor, torch.Tensor]] = [
    (OneNumber(), torch.randn(4, generator=G), torch.randn(4, generator=G)),
    (SeveralLabels(3), SCORES, (SCORES > 0.2).float()),
    (DPO(0.1), torch.randn(4, 2, generator=G), torch.zeros(4, dtype=torch.int64)),
]


@pytest.mark.parametrize(("objective", "scores", "targets"), OTHERS, ids=lambda x: type(x).__name__)
def test_every_task_takes_a_loss_of_ones_own(objective: Objective, scores: torch.Tensor, targets: torch.Tensor) -> None:
    own = with_own_loss(objective, "p:f", objective.losses, one_by_one=True)
    assert torch.allclose(losses_by_example(own, scores, targets, 4)[:, 0], objective.losses(scores, targets))


def test_a_figure_of_ones_own_is_the_mean_over_all_targets_beside_what_there_was() -> None:
    small = small_model("llama")
    examples = [*small.clients[0].heldout, *small.clients[1].train]
    plain = measure(small.model, examples).values()
    with small.model.measuring(f"{HERE}:right"):
        found = measure(small.model, examples).values()
        assert small.model.metrics(examples).values()["right"] == pytest.approx(found["right"])
    assert found.pop("right") == pytest.approx(plain["token_accuracy"])
    assert found == pytest.approx(plain)


def test_figures_of_ones_own_add_up_where_some_sums_have_none() -> None:
    own = with_own_metric(OneClass(3), "p:right", own_training.right)
    half = own.metrics(SCORES[:2], CLASSES[:2], examples=2)
    total = half + own.metrics(SCORES[2:], CLASSES[2:], examples=2)
    assert total.values()["right"] == total.values()["accuracy"]
