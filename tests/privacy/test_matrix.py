"""Every kind of transformer, by one pass and by Opacus's hooks, against autograd on one example at a time.

Checkpoints, dropout, bf16 and torch.compile take minutes, and a command of their own: `python -m tests.support.matrix`,
which writes docs/privacy_matrix.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from torch import Tensor, nn

from fedlora.encoding.encoder import Example
from fedlora.errors import PrivacyError
from fedlora.privacy.per_sample_gradients import LoopedGradients, OnePassGradients, OpacusGradients, PerExample
from tests.support.zoo import ROWS, Learner, apart, build, examples, quiet

EXACT = 5e-6  # float32's rounding is up to 3e-6; what is wrong is wrong by tenths


@dataclass(frozen=True, eq=False)
class Animal:
    learner: Learner
    examples: list[Example]
    wanted: dict[nn.Parameter, Tensor]  # every example's gradient, alone
    refused: str  # module at which an engine must
    unbiased: bool  # has its head a layer norm without bias?


@pytest.fixture(scope="module", params=ROWS)
def animal(request: pytest.FixtureRequest) -> Iterator[Animal]:
    row = ROWS[request.param]
    with quiet():
        learner, some = build(row), examples(row)
        parameters = learner.set_trainable("ABH")
        with LoopedGradients(learner, parameters) as gradients:
            wanted = dict(zip(parameters, gradients(some), strict=True))
        yield Animal(learner, some, wanted, row.refused, request.param == "modernbert-cls")


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("sides", ["AB", "B", "A", "ABH"])
@pytest.mark.parametrize("engine", [OnePassGradients, OpacusGradients])
def test_every_examples_gradient_is_autograds_or_the_module_is_named(
    animal: Animal, engine: type[PerExample], sides: str
) -> None:
    if animal.unbiased and (engine, sides) == (OpacusGradients, "ABH"):
        pytest.skip("Opacus 1.6 fails on a layer norm without bias")
    parameters = animal.learner.set_trainable(sides)
    if animal.refused:
        with pytest.raises(PrivacyError, match=animal.refused), engine(animal.learner, parameters) as gradients:
            gradients(animal.examples)
    else:
        with engine(animal.learner, parameters) as gradients:
            got = gradients(animal.examples)
        assert apart(got, [animal.wanted[p] for p in parameters]) < EXACT
        assert all(bool(g.flatten(1).any(1).all()) for g in got)
    assert all(p.grad is None and not hasattr(p, "grad_sample") for p in animal.learner.net.parameters())


@pytest.mark.parametrize("name", ["bert-cls", "roberta-cls", "gpt2-cls (Conv1D)", "vit-img", "t5-s2s"])
def test_what_is_left_between_them_is_rounding(name: str) -> None:
    """In float64 they agree nine digits further."""
    with quiet():
        learner, some = build(ROWS[name]), examples(ROWS[name])
    learner.net.double()
    some = [{k: t.double() if t.is_floating_point() else t for k, t in e.items()} for e in some]
    parameters = learner.set_trainable("AB")
    with LoopedGradients(learner, parameters) as gradients:
        wanted = gradients(some)
    with OnePassGradients(learner, parameters) as gradients:
        assert apart(gradients(some), wanted) < 1e-13
