"""The gradients of single examples: three engines that agree, and what is done with them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from fedlora.encoding.encoder import Example
from fedlora.errors import PrivacyError
from fedlora.lora import LoRA
from fedlora.models.model import Model
from fedlora.privacy.per_sample_gradients import (
    Gradients,
    LoopedGradients,
    OnePassGradients,
    OpacusGradients,
    PerExample,
    add_up,
    clip,
)
from fedlora.privacy.preflight import synthetic
from fedlora.sections import LoRAConfig, ModelConfig
from fedlora.seeds import seeded
from tests.support.models import FORMS, make, random_adapter
from tests.support.zoo import apart

EXACT = 2e-6


Maker = Callable[..., Model]
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(kind, tmp_path_factory.mktemp(kind)) for kind in FORMS}


@pytest.fixture(scope="module")
def build(folders: dict[str, Path]) -> Maker:
    def one(named: str, dtype: Any = "float32", **lora: Any) -> Model:
        base = ModelConfig(path=str(folders[named]), dtype=dtype, max_length=24)
        model = Model(base, LoRAConfig(**({"rank": 3} | lora)), FORMS[named], seed=1)
        g = torch.Generator().manual_seed(2)
        model.set_adapter(LoRA(B={m: torch.randn(b.shape, generator=g) / 20 for m, b in model.get_adapter().B.items()}))
        model.net.train()  # without which Opacus's hooks see nothing
        for module in model.net.modules() if "dropout" not in lora else ():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # it would differ from pass to pass
        return model

    return one


@pytest.fixture(scope="module", params=[(k, t) for k in FORMS for t in ("usual", "all-linear")], ids="-".join)
def model(request: pytest.FixtureRequest, build: Maker) -> Model:
    kind, targets = request.param
    return build(kind, targets=() if targets == "usual" else (targets,))


def made_up(model: Model, n: int = 5) -> list[Example]:
    """Of different lengths."""
    with seeded(3):
        return synthetic(model.encoder, n)


def each(
    engine: type[PerExample], model: Model, parameters: Sequence[nn.Parameter], some: Sequence[Example]
) -> Gradients:
    with engine(model, parameters) as gradients:
        return gradients(some)


def trained(model: Model, wanted: Callable[[str], bool]) -> list[nn.Parameter]:
    """Let gradients reach what has such a name, and nothing else."""
    for name, p in model.net.named_parameters():
        p.requires_grad_(wanted(name))
    return [p for p in model.net.parameters() if p.requires_grad]


def agree(model: Model, parameters: Sequence[nn.Parameter], *engines: type[PerExample], within: float = EXACT) -> None:
    some = made_up(model)
    wanted = each(LoopedGradients, model, parameters, some)
    assert all(g.any() for g in wanted)
    for engine in engines or (OnePassGradients, OpacusGradients):
        assert apart(each(engine, model, parameters, some), wanted) < within


@pytest.mark.parametrize("sides", ["AB", "B", "A", "ABH"])
def test_one_pass_and_hooks_find_what_autograd_finds_of_each_example(model: Model, sides: str) -> None:
    agree(model, model.set_trainable(sides))


def test_a_core_between_the_factors_is_told_apart_too(build: Maker) -> None:
    model, g = build("llama"), torch.Generator().manual_seed(4)
    model.set_adapter(LoRA(R={m: torch.randn(3, 3, generator=g) for m in model.adapted}))
    agree(model, model.set_trainable("R"))
    agree(
        model, model.set_trainable("ABR"), OnePassGradients
    )  # Opacus takes the core for the layer's output, which preflight refuses


def test_a_core_in_blocks_is_told_apart_in_one_pass_and_is_unknown_to_opacus(build: Maker) -> None:
    model, g = build("bert"), torch.Generator().manual_seed(4)
    start = random_adapter(model, 4, rank=4)
    model.set_adapter(LoRA(R={m: torch.randn(2, 2, 2, generator=g) for m in model.adapted}).over(start))
    for sides in ("RH", "ABR"):
        agree(model, model.set_trainable(sides), OnePassGradients)
    with pytest.raises(PrivacyError, match=r"is a BlockDiagonal, of which Opacus cannot tell .* dp.engine = one"):
        each(OpacusGradients, model, model.set_trainable("R"), made_up(model))


def test_examples_meet_the_same_dropout_as_in_an_ordinary_pass(build: Maker) -> None:
    """The reference is the gradient of one loss of the whole batch, under the same masks."""
    model = build("bert", dropout=0.2)
    parameters, some = model.set_trainable("ABH"), made_up(model)

    def loss(i: int) -> Tensor:
        torch.manual_seed(7)
        return model.losses(model.encoder.collate(some))[i]

    rows = [torch.autograd.grad(loss(i), parameters) for i in range(len(some))]
    for engine in (OnePassGradients, OpacusGradients):
        torch.manual_seed(7)
        assert apart(each(engine, model, parameters, some), [torch.stack(g) for g in zip(*rows, strict=True)]) < EXACT


def test_a_layer_that_is_used_twice_has_the_sum(build: Maker) -> None:
    model = build("llama")
    layers = model.net.base_model.model.model.layers
    layers[1].self_attn.q_proj = layers[0].self_attn.q_proj
    agree(model, trained(model, lambda name: "q_proj.lora" in name), OnePassGradients)  # Opacus hooks it twice


@pytest.mark.parametrize("wanted", ["LayerNorm", "bias", "classifier"])
def test_layer_norms_biases_and_heads_are_told_apart(build: Maker, wanted: str) -> None:
    """Of BERT: norms over tokens, biases of linear layers and norms alone, a head with a norm of its own."""
    model = build("bert")
    head = model.net.base_model.model.classifier.modules_to_save
    head["default"] = nn.Sequential(nn.LayerNorm(24), head["default"])
    zero = ("original", "key.bias")  # what stands idle, and what softmax takes off again
    agree(model, trained(model, lambda name: wanted in name and not any(word in name for word in zero)))


def test_gradients_of_a_base_in_bf16_are_float32(build: Maker) -> None:
    model = build("llama", dtype="bfloat16")
    agree(model, model.set_trainable("AB"), within=0.05)  # a batch is rounded otherwise than one example
    for engine in (OnePassGradients, OpacusGradients, LoopedGradients):
        assert {g.dtype for g in each(engine, model, model.set_trainable("AB"), made_up(model))} == {torch.float32}


def traces(model: Model) -> dict[str, Any]:
    """All that an engine might leave behind."""
    found: dict[str, Any] = {n: p.detach().numpy().tobytes() for n, p in model.net.named_parameters()}
    for name, module in model.net.named_modules():
        hooks = [len(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
        found[f"{name}: own"] = sorted(k for k in module.__dict__ if not k.startswith("_")), hooks
    found["gradients"] = [(p.grad, sorted(p.__dict__)) for p in model.net.parameters()]
    return found


@pytest.mark.parametrize("engine", [OnePassGradients, OpacusGradients, LoopedGradients])
def test_a_model_is_as_it_was_when_the_block_is_left(build: Maker, engine: type[PerExample]) -> None:
    model = build("bert")
    parameters, before = model.set_trainable("ABH"), traces(model)
    with engine(model, parameters) as gradients:
        gradients(made_up(model))
        assert all(p.grad is None for p in model.net.parameters())
        gradients(made_up(model, 2))
    assert traces(model) == before


@pytest.mark.parametrize("engine", [OnePassGradients, OpacusGradients])
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_model_is_as_it_was_after_an_exception(build: Maker, engine: type[PerExample], when: str) -> None:
    model = build("bert")
    parameters = model.set_trainable("ABH")
    layer = model.net.base_model.model.bert.encoder.layer[0]
    kind = layer.register_forward_hook if when == "forward" else layer.output.register_full_backward_pre_hook
    handle = kind(lambda *_: 1 / 0)
    before = traces(model)
    with pytest.raises(ZeroDivisionError), engine(model, parameters) as gradients:
        gradients(made_up(model))
    assert traces(model) == before
    handle.remove()
    agree(model, parameters)


@pytest.mark.parametrize("engine", [OnePassGradients, OpacusGradients])
def test_a_model_that_is_refused_is_as_it_was(build: Maker, engine: type[PerExample]) -> None:
    model = build("llama", kind="dora")
    parameters, before = model.set_trainable("ABH"), traces(model)
    with pytest.raises(PrivacyError, match=r"layers.0.*lora_magnitude_vector.default is a DoraLinearLayer"):
        each(engine, model, parameters, made_up(model))
    assert traces(model) == before


def test_a_layer_gets_back_the_forward_that_it_had(build: Maker) -> None:
    model = build("llama")
    layer = next(iter(model.adapted.values())).lora_A["default"]
    layer.forward = own = lambda x: nn.Linear.forward(layer, x)
    each(OnePassGradients, model, model.set_trainable("AB"), made_up(model))
    assert layer.forward is own


def test_a_parameter_that_is_used_outside_its_layer_is_refused(build: Maker) -> None:
    model = build("llama")
    layer = next(iter(model.adapted.values()))
    handle = layer.register_forward_hook(lambda layer, _, y: y + layer.lora_A["default"].weight.sum())
    with pytest.raises(PrivacyError, match=r"q_proj.lora_A.default.weight is used outside the layer that holds it"):
        each(OnePassGradients, model, model.set_trainable("AB"), made_up(model))
    assert all(p.grad is None for p in model.net.parameters())
    handle.remove()


def test_a_parameter_without_a_gradient_is_refused(build: Maker) -> None:
    model = build("llama")
    parameters = [*model.set_trainable("AB"), nn.Parameter(torch.zeros(1))]
    model.net.register_parameter("idle", parameters[-1])
    parameters[-1].requires_grad_(False)
    for engine in (OnePassGradients, OpacusGradients):
        with pytest.raises(PrivacyError, match=r"gradient of single examples.* idle|idle got no gradient"):
            each(engine, model, parameters, made_up(model))


def drawn(seed: int, n: int = 8) -> Gradients:
    """Of three parameters, of examples of very different lengths."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 3, n).view(n, 1, 1)
    return [sizes * torch.randn(n, *shape, generator=g) for shape in ((3, 4), (5, 2), (2, 2))]


def lengths(gradients: Gradients, factors: Sequence[Tensor]) -> Tensor:
    """Of each example, over these parameters."""
    return torch.stack([(c * g.flatten(1).norm(dim=1)) for g, c in zip(gradients, factors, strict=True)]).norm(dim=0)


def test_no_example_is_longer_than_the_bound_and_a_short_one_is_as_it_was() -> None:
    g = drawn(0)
    factors, before = clip(g, [0, 0, 0], [1.0]), lengths(g, [torch.ones(8)] * 3)
    assert float(lengths(g, factors).max()) <= 1 + 1e-6
    assert_close(lengths(g, factors), before.clamp(max=1.0))
    assert all(torch.equal(factors[0][before < 1], c[before < 1]) and bool((c[before < 1] == 1).all()) for c in factors)


def test_groups_are_clipped_apart_each_at_its_own_bound() -> None:
    g = drawn(1)
    factors = clip(g, [0, 1, 0], [2.0, 0.01])
    assert_close(factors[0], clip([g[0], g[2]], [0, 0], [2.0])[0])
    assert_close(factors[1], clip([g[1]], [0], [0.01])[0])
    assert float(lengths([g[0], g[2]], [factors[0], factors[2]]).max()) <= 2 + 1e-6
    assert float(lengths(g, factors).max()) <= (2**2 + 0.01**2) ** 0.5 + 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_an_example_that_is_not_finite_counts_as_nothing_in_any_group(bad: float) -> None:
    """As does one whose square is too large for a number."""
    g, rest = drawn(2), [t[torch.arange(8) != 3] for t in drawn(2)]
    g[1][3, 0, 0] = bad
    sums = add_up(g, clip(g, [0, 1, 0], [1.0, 0.5]))
    assert_close(sums, add_up(rest, clip(rest, [0, 1, 0], [1.0, 0.5])))


def test_sums_by_owner_are_what_each_owner_has_alone() -> None:
    g, owner = drawn(3), torch.tensor([2, 0, 0, 2, 0, 2, 2, 0])  # of owner 1 none came
    sums = add_up(g, clip(g, [0, 0, 1], [0.3, 0.4]), owner, 3)
    for i in range(3):
        own = [t[owner == i] for t in g]
        assert_close([t[i] for t in sums], [t[0] for t in add_up(own, clip(own, [0, 0, 1], [0.3, 0.4]))])
    assert_close([t.sum(0) for t in sums], [t[0] for t in add_up(g, clip(g, [0, 0, 1], [0.3, 0.4]))])
