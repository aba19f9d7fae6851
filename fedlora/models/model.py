"""A base model with one adapter, whose factors can be read and replaced by others of any rank."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from fedlora.data.images import image_channels
from fedlora.data.rows import Rows, take
from fedlora.data.schema import Schema
from fedlora.encoding.encoder import Encoder, Example
from fedlora.errors import ModelError, StrategyError
from fedlora.lora import LoRA, Side, at_least_float32
from fedlora.metrics import Metrics
from fedlora.own_code import find_own
from fedlora.sections import LoRAConfig, ModelConfig, Training

from . import adapter, base_model, behaviour, class_order, input_limits, probe, quantization
from .adapted_modules import coverage, find_targets, reach_notes
from .adapter import NAME, PREFIX
from .cores import HeadScales, check_core, core_layer, folded
from .objectives import answer_log_probabilities, network_inputs, objective
from .offset import Offset
from .own_objective import losses_by_example, with_own_loss, with_own_metric
from .source import base_name

MIXED_TYPES = re.compile("dtype|scalar type|[Ii]nput type|Half|BFloat16")  # in torch's errors
REFUSALS = {
    "dora": "takes no offset: its magnitudes are those of W + s B A, and would scale what else is added to W; nor a "
    "core, which their norms would leave out",
    "vera": "takes no offset, core or gain: a client trains two vectors a module, beside A and B that are fixed",
}


class Model:
    """A base model that stays in memory while adapters are swapped in and out of it."""

    def __init__(self, config: ModelConfig, lora: LoRAConfig, schema: Schema, seed: int, public: Rows = ()) -> None:
        """Load the base and attach a fresh adapter.

        `public` are the rows of `lora.init_data`, in the run's schema; only `lora.init = eva` looks at them. Raises
        `ModelError` if the base cannot be had, or cannot take the adapter.
        """
        self.schema, self.kind = class_order.in_checkpoint_order(config, schema), lora.kind
        self.device, self.dtype = base_model.device(config), config.dtype
        net, self.processor, new = base_model.load_base_model(config, self.schema, seed)
        self.fingerprint = base_model.fingerprint(net)
        self.base_name = base_name(config, self.fingerprint)
        limits = input_limits.input_limits(net, self.processor, schema)
        decoder_inputs = None if schema.has_head else base_model.decoder_inputs(net)
        encoder_decoder = decoder_inputs is not None
        self.objective = objective(self.schema, is_encoder_decoder=encoder_decoder, dpo_beta=config.dpo_beta)
        called = probe.called_modules(net, self.processor, self.schema, config.dtype)
        targets = find_targets(net, lora, self.schema, new, called)
        self.coverage = coverage(net, targets)
        self.notes = (
            *class_order.head_notes(config, self.schema, new),
            *reach_notes(self.coverage, lora),
            *input_limits.warnings(net, self.processor, self.schema, max_length=config.max_length),
        )
        self.net = adapter.attach_adapter(net, lora, self.schema, targets, seed)
        if config.quantize == "none":  # a quantised base is where it belongs already
            self.net.to(self.device)
        self.encoder = Encoder(
            self.processor,
            self.schema,
            config.max_length,
            decoder_inputs,
            limits,
            channels=image_channels(net.config),
            with_reference=self.with_reference,
        )
        self.encoder = behaviour.encoder_for(self.net, self.encoder)
        self.adapted = adapter.layers(self.net)
        self.scales = {m: 1.0 if self.kind == "vera" else layer.scaling[NAME] for m, layer in self.adapted.items()}
        self.heads = _heads(self.net)
        self.extras = _magnitudes(self.adapted) if self.kind == "dora" else {}  # trained with the head
        self._sides: dict[str, dict[str, nn.Parameter]] = {
            "A": adapter.side("A", self.adapted),
            "B": adapter.side("B", self.adapted),
            "R": {},
            "S": {},  # the scales of R's heads, of a job that trains them: in no adapter, as R is read with them
            "H": {**self.heads, **self.extras},
        }
        # A weight in half precision, or quantised, would swallow small residuals: there they stay beside it.
        folds = config.quantize == "none" and config.dtype == "float32"
        self.offset = Offset(self.adapted, self.scales, folds, adapter.tied(self.net, self.adapted))
        self.products: Callable[[], AbstractContextManager[None]] = nullcontext  # in which the network computes
        self._hooks: list[Any] = []  # of the cores
        if lora.init == "eva":
            self._start_from_inputs(public)

    def _start_from_inputs(self, public: Rows) -> None:
        """Draw the start of EVA from how the base sees these rows."""
        examples = self.encoder(take(public, range(min(adapter.INPUTS, len(public)))))
        self.net.eval()
        adapter.eva(self.adapted, (self.logits(self.encoder.collate([e])) for e in examples))

    @property
    def size(self) -> int:
        """The count of numbers in the base model, without the adapter and the second copy that PEFT makes of a head."""
        return sum(map(quantization.numbers, self.net.parameters())) - sum(p.numel() for p in self.parameters_of())

    @property
    def adapter_dtype(self) -> torch.dtype:
        """The type of the factors' numbers: float32, whatever the base is in."""
        return next(iter(self._sides["A"].values())).dtype

    def parameters_of(self, sides: str = "ABRSH") -> list[nn.Parameter]:
        """The parameters of these sides of the adapter, in a fixed order."""
        chosen = [parameters.values() for side, parameters in self._sides.items() if side in sides]
        return list(chain.from_iterable(chosen))

    def memory(self, rank: int, batch_size: int = 16) -> int:
        """Bytes that training at this rank takes, estimated.

        These are the base as it is; weight, gradient and the two moments of Adam in float32 of the adapter and head;
        and the activations of a batch of the longest examples. The copy of weights that an offset is folded into is
        not counted.
        """
        trained = {id(p) for p in self.parameters_of()}
        base_tensors = [t for t in (*self.net.parameters(), *self.net.buffers()) if id(t) not in trained]
        base_bytes = sum(t.numel() * t.element_size() for t in base_tensors)
        return int(base_bytes + 16 * self._trained_numbers(rank) + self._activation_bytes(batch_size))

    def _trained_numbers(self, rank: int) -> int:
        """The count of numbers in an adapter of this rank and in the head."""
        head = sum(p.numel() for p in self._sides["H"].values())
        sizes: list[tuple[int, int]] = [(layer.in_features, layer.out_features) for layer in self.adapted.values()]
        if self.kind == "vera":
            return head + sum(rank + d_out for _, d_out in sizes)
        return head + sum(rank * (d_in + d_out) for d_in, d_out in sizes)

    def _activation_bytes(self, batch_size: int) -> int:
        """Bytes of the activations of a batch of the longest examples.

        These are 17 numbers of the base's type a token, layer and hidden unit (the 34 bytes of Korthikanti et al.,
        https://arxiv.org/abs/2205.05198, without attention scores), and two in float32 a token and word of a language
        model.
        """
        shape: Any = self.net.config
        tokens = batch_size * (_patches(shape) if self.schema.kind == "image" else self.encoder.max_length)
        tokens *= self.objective.rows
        width = getattr(shape, "hidden_size", 0) * getattr(shape, "num_hidden_layers", 0)
        scores = 0 if self.schema.has_head else 8 * shape.vocab_size
        return int(tokens * (17 * width * self.net.dtype.itemsize + scores))

    def get_adapter(self) -> LoRA:
        """A copy of the adapter on the CPU: A (r, d_in), B (d_out, r), core R if there is one, and head H.

        Where the heads of R have scales, each is in its head.
        """
        sides = {side: _copies(parameters) for side, parameters in self._sides.items()}
        scales = sides.pop("S")
        sides["R"] |= {name: folded(sides["R"][name], scale) for name, scale in scales.items()}
        return LoRA(**sides)

    def set_adapter(
        self,
        lora: LoRA,
        offset: tuple[LoRA, ...] = (),
        gain: Mapping[str, float] = MappingProxyType({}),
        *,
        scales: bool = False,
    ) -> None:
        """Replace the adapter by this one, over the pretrained weights plus the offset; module m's s is times gain[m].

        With `scales` the heads of the cores have scales of 1, which are the side S to `set_trainable`. A side of A, B
        and H that `lora` lacks stays as it is; cores, scales, gains and the offset are those of this call alone.
        Raises `StrategyError` for what this model, or this kind of adapter, cannot take.
        """
        if lora.D:
            offset = (*offset, LoRA(D=lora.D))
        self._refuse_what_the_kind_lacks(offset=any(offset), core=bool(lora.R), gain=bool(gain))
        for letter in "ABH":
            self._replace_side(letter, lora.side(letter))
        if self.kind != "vera":
            self._set_gains_and_cores(lora.R, gain, scales=scales)
        self.offset.set(offset)

    def _refuse_what_the_kind_lacks(self, *, offset: bool, core: bool, gain: bool) -> None:
        impossible = {"lora": False, "dora": offset or core, "vera": offset or core or gain}
        if impossible[self.kind]:
            raise StrategyError(f"lora.kind = {self.kind} {REFUSALS[self.kind]}; choose lora.kind = lora")

    def _replace_side(self, letter: str, given: Side) -> None:
        """Copy the given matrices into the model; a side that is empty changes nothing."""
        if given:
            for name, p in self._sides[letter].items():
                p.data = self._fitting(letter, name, given).to(p.device, p.dtype, copy=True)

    def check_fit(self, lora: LoRA) -> None:
        """Raise `StrategyError` where `set_adapter` would for these matrices, and for unlike ranks."""
        for letter in "ABH":
            given = lora.side(letter)
            for name in self._sides[letter] if given else ():
                self._fitting(letter, name, given)
        for name in lora.A.keys() & lora.B.keys() if self.kind != "vera" else ():
            _check_ranks(name, lora.A[name], lora.B[name])
        for name in lora.R.keys() & lora.A.keys():
            check_core(name, lora.R[name], lora.A[name])

    def keep_offset_beside(self) -> None:
        """Let offsets be computed beside the pretrained weights, and none be folded into them, from here on."""
        self.offset.set(())
        self.offset = Offset(self.adapted, self.scales, folds=False, tied=adapter.tied(self.net, self.adapted))

    def modules(self, side: str) -> frozenset[str]:
        """The names of the modules that have a matrix of their own on this side."""
        return frozenset(self._sides.get(side, {}))

    def trained(self, sides: str) -> Iterator[tuple[str, str, nn.Parameter]]:
        """Yield the letter of the side, the name of the module and the parameter, of these sides in a fixed order."""
        for side, parameters in self._sides.items():
            if side in sides:
                yield from ((side, module, p) for module, p in parameters.items())

    def set_trainable(self, sides: str) -> list[nn.Parameter]:
        """Let gradients reach these sides alone, and return their parameters in a fixed order."""
        for p in self.net.parameters():
            p.requires_grad_(False)
            p.grad = None
        chosen = self.parameters_of(sides)
        for p in chosen:
            p.requires_grad_(True)
        return chosen

    def begin_training(self) -> None:
        """Set the model to train; see `behaviour.begin_training`."""
        behaviour.begin_training(self.net)

    def logits(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Scores and targets, a row for each target; of tokens, a target of -100 does not count."""
        scores = self._scores(batch)
        return self.objective.aligned(scores, {k: v.to(self.device) for k, v in batch.items()})

    def outputs(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The network's scores of a batch, as it returns them.

        Raises `ModelError` where the architecture cannot compute in `model.dtype`.
        """
        try:
            with self.products():
                scores: Tensor = self.net(**network_inputs(batch, self.device, getattr(torch, self.dtype))).logits
        except RuntimeError as e:  # of transformers' own code, which makes some tensors in float32
            if self.dtype == "float32" or not MIXED_TYPES.search(str(e)):
                raise
            raise ModelError(
                f"{type(self.net.get_base_model()).__name__} cannot compute in model.dtype = {self.dtype}: "
                f"{str(e).splitlines()[0]}; set model.dtype = float32"
            ) from e
        return scores

    def _scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The network's scores of a batch, in float32 or wider."""
        return at_least_float32(self.outputs(batch))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss summed over the targets of a batch."""
        return self.objective.losses(*self.logits(batch)).sum()

    @contextmanager
    def learning(self, training: Training, *, private: bool = False) -> Iterator[None]:
        """Within the block the model's loss is that of the settings, where they name one of the user's own.

        In a `private` step that loss sees one example at a time. Raises `ConfigError` where it cannot be imported.
        """
        before = self.objective
        if training.loss:
            function = find_own("train.loss", training.loss)
            self.objective = with_own_loss(before, training.loss, function, one_by_one=private)
        try:
            yield
        finally:
            self.objective = before

    @contextmanager
    def measuring(self, target_metric: str) -> Iterator[None]:
        """Within the block what is measured has a figure of the user's own besides, where its path is given."""
        before = self.objective
        if target_metric:
            self.objective = with_own_metric(before, target_metric, find_own("eval.target_metric", target_metric))
        try:
            yield
        finally:
            self.objective = before

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Each example's mean loss over its own targets: (examples,)."""
        scores, targets = self.logits(batch)
        examples = len(batch["labels"]) // self.objective.rows
        by_target = losses_by_example(self.objective, scores, targets, examples)
        return by_target.sum(1) / self.objective.counted(targets).view(by_target.shape).sum(1).clamp(min=1)

    def targets(self, examples: Sequence[Example]) -> int:
        """The count of predictions that these examples ask for."""
        return sum(map(self.objective.count, examples))

    @torch.no_grad()
    def metrics(self, examples: Sequence[Example], batch_size: int = 32) -> Metrics:
        """How good the model with its present adapter is on these examples."""
        self.net.eval()
        total = Metrics(0, 0, 0.0, 0)
        for batch in self.encoder.batches(examples, batch_size):
            scores, targets = self.logits(self.encoder.collate(batch))
            total += self.objective.metrics(scores, targets, examples=len(batch))
        return total

    @torch.no_grad()
    def with_reference(self, preferences: Sequence[Example], batch_size: int = 16) -> list[Example]:
        """The same preferences with `reference`, (2,): the log-probability of either answer by the base alone.

        The base has neither adapter nor offset then, whatever the run has come to; the model is left as it was.
        """
        found: dict[int, Tensor] = {}
        with self._as_pretrained():
            for batch in self.encoder.batches(preferences, batch_size):
                collated = self.encoder.collate(batch)
                by_row = answer_log_probabilities(self._scores(collated), collated["labels"].to(self.device))
                found |= zip(map(id, batch), torch.stack(by_row.chunk(2), dim=1).cpu(), strict=True)
        return [example | {"reference": found[id(example)]} for example in preferences]

    @contextmanager
    def _as_pretrained(self) -> Iterator[None]:
        """Within the block the network is the base as it was loaded, in evaluation."""
        parts, training, net = self.offset.parts, self.net.training, self.net
        trainable = [(p, p.requires_grad) for p in net.parameters()]  # PEFT sets these anew
        self.offset.set(())
        net.eval()
        try:
            with net.disable_adapter():
                yield
        finally:
            self.offset.set(parts)
            net.train(training)
            for p, is_trainable in trainable:
                p.requires_grad_(is_trainable)

    def _set_gains_and_cores(self, cores: Side, gain: Mapping[str, float], *, scales: bool) -> None:
        """Set the factor on every module's product and the core between its A and B, once A and B are set."""
        while self._hooks:
            self._hooks.pop().remove()
        self._sides["R"], self._sides["S"] = {}, {}
        for name, layer in self.adapted.items():
            a, b = layer.lora_A[NAME], layer.lora_B[NAME].weight
            _check_ranks(name, a.weight, b)
            layer.scaling[NAME] = self.scales[name] * gain.get(name, 1.0)
            layer.lora_R = core_layer(name, cores[name], a.weight) if name in cores else None
            layer.lora_S = HeadScales(layer.lora_R.weight) if name in cores and scales else None
            for letter, between in (("R", layer.lora_R), ("S", layer.lora_S)):
                if between is not None:
                    self._sides[letter][name] = between.weight
                    self._hooks.append(a.register_forward_hook(lambda _m, _x, y, between=between: between(y)))

    def _fitting(self, letter: str, name: str, given: Side) -> Tensor:
        """The given matrix of this module; raises `StrategyError` if there is none, or one of another shape.

        The rank is free, but for VeRA.
        """
        wanted = self._sides[letter][name].shape
        if name in given and _fixed(letter, self.kind, given[name].shape) == _fixed(letter, self.kind, wanted):
            return given[name]
        got = tuple(given[name].shape) if name in given else "nothing"
        free = "" if letter == "H" or self.kind == "vera" else ", of any rank"
        raise StrategyError(f"{letter} of {name}: got {got}, the model takes {tuple(wanted)}{free}")


def _check_ranks(name: str, a: Tensor, b: Tensor) -> None:
    if a.shape[0] != b.shape[1]:
        raise StrategyError(f"{name}: A {tuple(a.shape)} and B {tuple(b.shape)} have different ranks")


def _copies(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}


def _fixed(letter: str, kind: str, shape: torch.Size) -> tuple[int, ...]:
    """A matrix's shape with -1 for the rank, if that is free: (-1, d_in), (d_out, -1)."""
    rank_at = {"A": 0, "B": 1}.get(letter)
    if kind == "vera" or rank_at is None:
        return tuple(shape)
    return tuple(-1 if i == rank_at else n for i, n in enumerate(shape))


def _heads(net: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters of the modules that are trained whole, by their names in the base."""
    heads: dict[str, nn.Parameter] = {}
    for name, module in net.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            parameters = module.modules_to_save[NAME].named_parameters()
            heads |= {f"{name.removeprefix(PREFIX)}.{key}": p for key, p in parameters}
    return heads


def _magnitudes(adapted: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    """DoRA's magnitudes, (d_out,) a module."""
    return {f"{m}.lora_magnitude_vector": layer.lora_magnitude_vector[NAME].weight for m, layer in adapted.items()}


def _patches(shape: Any) -> int:
    """The count of patches that a vision transformer cuts an image into; 1 for other models."""
    side, patch = getattr(shape, "image_size", 1), getattr(shape, "patch_size", 1)
    return int((side // patch) ** 2) if isinstance(side, int) and isinstance(patch, int) else 1
