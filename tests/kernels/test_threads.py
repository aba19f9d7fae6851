"""A network of its own for each thread, over the same weights."""

from dataclasses import replace

from fedlora.checks.small_models import small_model
from fedlora.kernels.threads import at_once, twin
from fedlora.models.adapter import PREFIX
from fedlora.models.model import Model
from fedlora.models.own_objective import with_own_metric
from tests.support.threads import on


def test_each_has_modules_of_its_own_and_the_same_weights() -> None:
    model = small_model("bert").model
    other = twin(model)
    assert not set(map(id, model.net.modules())) & set(map(id, other.net.modules()))
    assert list(map(id, model.net.parameters())) == list(map(id, other.net.parameters()))
    assert all(layer is other.net.get_submodule(PREFIX + name) for name, layer in other.adapted.items())


def test_a_users_own_function_is_called_once_at_a_time() -> None:
    small = small_model("bert")
    model = Model(small.config, replace(small.lora), small.schema, seed=0)
    with on(2):
        assert at_once(model) == 2
        model.objective = with_own_metric(model.objective, "tests:f", lambda scores, targets: targets.double())
        assert at_once(model) == 1
