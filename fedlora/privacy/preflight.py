"""Checks before a client's first private step, on made-up records: can this model be trained by DP-SGD?

There are two checks, as each overlooks something. The engine's gradients of single examples are held against autograd's
of each example alone; and the sum of clipped gradients with and without each record may differ by the clip and no more.
The model is checked as it trains, except that its adapter is moved off zero, and that dropout is switched off, as it
would differ between two passes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedlora.data.targets import made_up_target
from fedlora.encoding.encoder import Encoder, Example
from fedlora.errors import PrivacyError
from fedlora.jobs import Job
from fedlora.kernels.dropout import without_dropout
from fedlora.lora import LoRA, map_factors
from fedlora.models.model import Model
from fedlora.models.own_objective import OwnObjective, mixes_targets
from fedlora.sections import Training
from fedlora.seeds import seeded

from . import dpsgd
from .dpsgd import STANDARD, Engine, Mechanism
from .noise import secret_draws
from .per_sample_gradients import GradientFn, Gradients, LoopedGradients

RECORDS = 4  # made-up ones
CLIPS = (1e-3, 0.1, 10.0, 1e3)  # from one that cuts all gradients to one that cuts none
EXACT, ROUNDED = 1e-3, 0.1  # relative errors allowed: of weights of 32 bits, and of fewer, which are rounded
OVER = {
    True: 1.001,
    False: 1.1,
}  # sensitivity allowed, over the clip, with weights of 32 bits or not: rounding adds to it
_passed: WeakKeyDictionary[Model, dict[tuple[object, ...], "Findings"]] = WeakKeyDictionary()
_mixed: WeakKeyDictionary[Model, dict[str, bool]] = WeakKeyDictionary()  # by the path of the loss


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The measurements of a model that passed both checks."""

    error: float  # of single examples' gradients, relative
    sensitivity: float  # largest change of the sum by one record, over the clip


@dataclass(frozen=True, eq=False)
class Probe:
    """A model ready to be checked, with everything that the checks need."""

    model: Model
    job: Job
    sides: dict[str, list[nn.Parameter]]
    examples: list[Example]
    mechanism: Mechanism
    engine: Engine  # which is checked

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters that are trained."""
        return [p for side in self.sides.values() for p in side]

    @property
    def precise(self) -> bool:
        """Are the weights of 32 bits or more?"""
        return dpsgd.is_precise(self.model.net)

    def name(self, j: int) -> str:
        """Return the name of the module that holds parameter j."""
        found = next(n for n, p in self.model.net.named_parameters() if p is self.parameters[j])
        return found.rpartition(".")[0]


def check_once(model: Model, job: Job) -> Findings:
    """Return the findings of `check`, or those from when this model last had a job with the same sides and ranks.

    Of a job that trains sides in turn, each turn is checked by itself; the findings are the largest.
    """
    found = [_check_once(model, replace(job, trains=sides, turns=())) for sides in job.each_turn]
    return Findings(error=max(f.error for f in found), sensitivity=max(f.sensitivity for f in found))


def _check_once(model: Model, job: Job) -> Findings:
    key = (job.trains, dpsgd.privacy_of(job).engine, ranks(job.start), job.training.loss)
    passed = _passed.setdefault(model, {})
    if key not in passed:
        passed[key] = check(model, job)
    return passed[key]


def ranks(start: LoRA) -> tuple[object, ...]:
    """What tells one adapter's layers from another's: the ranks of its modules, and the shapes of its cores."""
    cores = sorted({tuple(core.shape) for core in start.R.values()})
    return (*sorted({a.shape[0] for a in start.A.values()}), *cores)


def check(model: Model, job: Job, mechanism: Mechanism = STANDARD, engine: Engine | None = None) -> Findings:
    """Run both checks and return what they measured; the model has another adapter afterwards.

    What is checked is the given engine of single gradients, or else the one that the job names.
    Raises `PrivacyError`, naming the module, for a model that cannot be trained by DP-SGD.
    """
    refuse_mixed_losses(model, job.training)
    model.net.train()
    _refuse_shared_statistics(model.net)
    with secret_draws(bytes(32)):  # what a job would find only after it was charged
        pass
    buffers = {name: b.clone() for name, b in model.net.named_buffers()}
    with model.learning(job.training, private=True), seeded(7), no_dropout(model.net):
        model.set_adapter(random_start(job.start), gain=job.gain)
        sides = {side: model.set_trainable(side) for side in job.trains}
        parameters = model.set_trainable(job.trains)
        checked = engine or dpsgd.engine(model, parameters, dpsgd.privacy_of(job))
        probe = Probe(model, job, sides, synthetic(model.encoder, RECORDS), mechanism, checked)
        findings = Findings(error=_error(probe), sensitivity=_sensitivity(probe))
    _refuse_changed_buffers(model.net, buffers)
    return findings


def refuse_mixed_losses(model: Model, training: Training) -> None:
    """Raise `PrivacyError` for a loss of the user's own that depends on other targets than its own."""
    if mixes_losses(model, training):
        raise PrivacyError(
            f"train.loss = {training.loss} gives a target another loss beside others than alone, so that no clip "
            "bounds what one record does; take a loss of each target by itself, or leave dp.epsilon and dp.noise out"
        )


@torch.no_grad()
def mixes_losses(model: Model, training: Training) -> bool:
    """Does a loss of the user's own give a target another loss beside others than alone, on made-up records?"""
    if not training.loss:
        return False
    found = _mixed.setdefault(model, {})
    if training.loss not in found:
        with model.learning(training), seeded(7):
            model.net.eval()
            batch = model.encoder.collate(synthetic(model.encoder, RECORDS))
            objective = model.objective
            found[training.loss] = isinstance(objective, OwnObjective) and mixes_targets(
                objective, *model.logits(batch)
            )
    return found[training.loss]


def _refuse_changed_buffers(net: nn.Module, before: Mapping[str, Tensor]) -> None:
    for name, buffer in net.named_buffers():
        if name in before and not torch.equal(buffer, before[name]):
            raise PrivacyError(f"{name} changes while the model trains, with no noise on it; choose another model")


def _refuse_shared_statistics(net: nn.Module) -> None:
    for name, module in net.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise PrivacyError(
                f"{name} is a {type(module).__name__}: in training it mixes the records of a batch, and keeps their "
                "mean with no noise on it; choose a model with layer norms"
            )


def _error(probe: Probe) -> float:
    """Return the largest relative error of the engine's gradients of single examples."""
    with probe.engine(probe.model, probe.parameters) as gradients:
        got = gradients(probe.examples)
    with LoopedGradients(probe.model, probe.parameters) as gradients:
        wanted = gradients(probe.examples)
    errors = _relative_errors(got, wanted)
    worst = int(errors.argmax())  # NaN counts as the largest
    if not float(errors[worst]) <= (EXACT if probe.precise else ROUNDED):
        raise PrivacyError(
            f"{probe.name(worst)}: gradients of single records are {float(errors[worst]):.0%} off what each has alone, "
            "so that records mix; choose other lora.targets, or dp.engine = one, which takes one record at a time"
        )
    return float(errors[worst])


def _relative_errors(got: Gradients, wanted: Gradients) -> Tensor:
    """Return the largest error of each parameter's gradients over the largest of these gradients, (parameters,)."""
    sizes = torch.stack([w.abs().max() for w in wanted])
    sizes = sizes.clamp(min=max(1e-6 * float(sizes.max()), 1e-12))  # where all gradients are zero but for rounding
    return torch.stack([(g - w).abs().max() for g, w in zip(got, wanted, strict=True)]) / sizes


def _sensitivity(probe: Probe) -> float:
    """Return the largest change of the clipped sum when one record is left out, over the clip."""
    seen: dict[tuple[int, ...], Gradients] = {}  # a pass is the same whatever the clip
    with probe.engine(probe.model, probe.parameters) as gradients:

        def remembered(examples: Sequence[Example]) -> Gradients:
            key = tuple(map(id, examples))
            if key not in seen:
                seen[key] = gradients(examples)
            return [g.clone() for g in seen[key]]

        return max(_change(probe, C, remembered) for C in CLIPS)


def _change(probe: Probe, C: float, gradients: GradientFn) -> float:
    """Return the largest change of the clipped sum at one clip, over that clip."""
    job = replace(probe.job, privacy=replace(dpsgd.privacy_of(probe.job), clip=C))

    def clipped(examples: Sequence[Example]) -> Gradients:
        batches = probe.model.encoder.batches(examples, job.training.batch_size)
        return dpsgd.clipped_sum(gradients, probe.parameters, batches, probe.sides, job, probe.mechanism)

    whole = clipped(probe.examples)
    fewer = [probe.examples[:i] + probe.examples[i + 1 :] for i in range(len(probe.examples))]
    changes = torch.stack([_distances(whole, clipped(examples)) for examples in fewer])  # (records, parameters)
    over = changes.double().norm(dim=1) / C  # (records,)
    most = int(over.argmax())
    if not float(over[most]) <= OVER[probe.precise]:
        raise PrivacyError(
            f"{probe.name(int(changes[most].argmax()))}: one record moves the sum of clipped gradients by "
            f"{float(over[most]):.3g} times the clip, which no noise is for; choose other lora.targets or another model"
        )
    return float(over[most])


def _distances(one: Gradients, other: Gradients) -> Tensor:
    """Return the norm of the difference for each parameter, (parameters,)."""
    return torch.stack([(x - y).norm() for x, y in zip(one, other, strict=True)])


def random_start(start: LoRA) -> LoRA:
    """Return the adapter with noise added to its factors, so that none is zero and every factor has a gradient."""

    def moved(t: Tensor) -> Tensor:
        noise: Tensor = 0.3 * torch.randn(t.shape) / t.shape[-1] ** 0.5
        return t + noise

    return map_factors(moved, start.only("ABRH")).over(start)


def synthetic(encoder: Encoder, n: int) -> list[Example]:
    """Return n made-up examples of the task's schema, of different lengths, in the model's own tokens."""
    examples: list[Example] = []
    while len(examples) < n:
        examples += encoder.by_row([_row(encoder, len(examples))])[0][:1]
    return examples


def _row(encoder: Encoder, i: int) -> dict[str, Any]:
    """Return a made-up row of data; the larger i is, the longer are its texts."""
    schema = encoder.schema
    row = {column: _content(encoder, i) for column in schema.columns}
    if schema.kind == "chat" and not schema.asking:
        [name] = schema.spoken
        content = row[name]
        row[name] = [{"role": role, "content": content} for role in ("user", "assistant")]
    if schema.has_head:
        row[schema.columns[-1]] = made_up_target(schema, i)
    return row


def _content(encoder: Encoder, i: int) -> Any:
    if encoder.schema.kind == "image":
        return _noise()
    return _words(encoder.processor, 3 + 3 * i)


def _words(tokenizer: Any, n: int) -> str:
    special = set(tokenizer.all_special_ids)
    ids = [i for i in torch.randint(len(tokenizer), (4 * n,)).tolist() if i not in special]
    return str(tokenizer.decode(ids[:n])) or "a"


def _noise() -> Any:
    from PIL import Image

    return Image.fromarray(torch.randint(256, (32, 32, 3), dtype=torch.uint8).numpy())


@contextmanager
def no_dropout(net: nn.Module) -> Iterator[None]:
    """Switch dropout off within the block, modules and functions alike."""
    dropouts = [m for m in net.modules() if "Drop" in type(m).__name__ and m.training]
    mode: Any = _Undropped  # untyped
    with ExitStack() as stack:
        stack.enter_context(without_dropout())
        for module in dropouts:
            module.eval()
            stack.callback(module.train)
        stack.enter_context(mode())
        yield


class _Undropped(TorchFunctionMode):
    """Torch's functions without dropout."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is F.dropout:
            return args[0] if args else given["input"]
        if func is F.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                given["dropout_p"] = 0.0
        return func(*args, **given)
