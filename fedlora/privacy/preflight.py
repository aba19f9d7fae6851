"""Before a client's first private step: can one record's share be told in this model, and bounded? On made-up records.

Two looks, as each is blind to something: the gradients of single examples against autograd's of each alone, and the sum
of clipped gradients with and without each record, which may differ by the clip and no more. It is the model as it
trains, but with its adapter moved off zero, and with its dropout still, which would differ between two passes.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedlora.data.encoding import Encoder, Example
from fedlora.errors import PrivacyError
from fedlora.jobs import Job
from fedlora.lora import SIDES, LoRA
from fedlora.models.model import Model
from fedlora.seeds import seeded

from . import dpsgd
from .dpsgd import STANDARD, Mechanism
from .per_sample_gradients import GradientFn, Gradients, LoopedGradients

RECORDS = 4
CLIPS = (1e-3, 0.1, 10.0, 1e3)  # from all of the gradients clipped to none
EXACT, ROUNDED = 1e-3, 0.1  # relative errors allowed: with weights of 32 bits, and with fewer, where it is rounding
OVER = {True: 1.001, False: 1.1}  # sensitivity allowed, over the clip: what rounding adds
_passed: WeakKeyDictionary[Model, dict[tuple[object, ...], "Findings"]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Findings:
    """What was seen of a model that passed."""

    error: float  # of single examples' gradients, relative
    sensitivity: float  # largest change of the sum by one record, over the clip


@dataclass(frozen=True, eq=False)
class Bench:
    """A model ready to be looked at."""

    model: Model
    job: Job
    sides: dict[str, list[nn.Parameter]]
    examples: list[Example]
    mechanism: Mechanism

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for side in self.sides.values() for p in side]

    @property
    def precise(self) -> bool:
        return bool(self.model.net.dtype.itemsize >= 4)

    def name(self, j: int) -> str:
        """The module of parameter j."""
        found = next(n for n, p in self.model.net.named_parameters() if p is self.parameters[j])
        return found.rpartition(".")[0]


def check_once(model: Model, job: Job) -> Findings:
    """What `check` finds, or found when this model last had such a job."""
    ranks = tuple(sorted({a.shape[0] for a in job.start.A.values()}))
    key = (job.trains, dpsgd.privacy_of(job).engine, ranks)
    passed = _passed.setdefault(model, {})
    if key not in passed:
        passed[key] = check(model, job)
    return passed[key]


def check(model: Model, job: Job, mechanism: Mechanism = STANDARD) -> Findings:
    """What can be seen of a model that can be private; the model wears another adapter afterwards.

    Raises `PrivacyError`, naming the module, for one that cannot.
    """
    model.net.train()
    _refuse_shared_statistics(model.net)
    buffers = {name: b.clone() for name, b in model.net.named_buffers()}
    with seeded(7), no_dropout(model.net):
        model.set_adapter(random_start(job.start), gain=job.gain)
        sides = {side: model.set_trainable(side) for side in job.trains}
        model.set_trainable(job.trains)
        bench = Bench(model, job, sides, synthetic(model.encoder, RECORDS), mechanism)
        findings = Findings(_error(bench), _sensitivity(bench))
    for name, b in model.net.named_buffers():
        if name in buffers and not torch.equal(b, buffers[name]):
            raise PrivacyError(f"{name} changes while the model trains, with no noise on it; choose another model")
    return findings


def _refuse_shared_statistics(net: nn.Module) -> None:
    for name, module in net.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise PrivacyError(
                f"{name} is a {type(module).__name__}: in training it mixes the records of a batch, and keeps their "
                "mean with no noise on it; choose a model with layer norms"
            )


def _error(bench: Bench) -> float:
    """The largest relative error of the engine's gradients of single examples."""
    engine = dpsgd.engine(bench.model, bench.parameters, dpsgd.privacy_of(bench.job))
    with engine(bench.model, bench.parameters) as gradients:
        got = gradients(bench.examples)
    with LoopedGradients(bench.model, bench.parameters) as gradients:
        wanted = gradients(bench.examples)
    sizes = torch.stack([w.abs().max() for w in wanted])
    sizes = sizes.clamp(min=max(1e-6 * float(sizes.max()), 1e-12))  # of what is zero but for rounding
    errors = torch.stack([(g - w).abs().max() for g, w in zip(got, wanted, strict=True)]) / sizes
    worst = int(errors.argmax())  # what is not a number counts as the largest
    if not float(errors[worst]) <= (EXACT if bench.precise else ROUNDED):
        raise PrivacyError(
            f"{bench.name(worst)}: gradients of single records are {float(errors[worst]):.0%} off what each has alone, "
            "so that records mix; choose other lora.targets, or dp.engine = one, which takes one record at a time"
        )
    return float(errors[worst])


def _sensitivity(bench: Bench) -> float:
    """The largest change of the clipped sum when one record is left out, over the clip."""
    engine = dpsgd.engine(bench.model, bench.parameters, dpsgd.privacy_of(bench.job))
    seen: dict[tuple[int, ...], Gradients] = {}  # a pass is the same whatever the clip
    with engine(bench.model, bench.parameters) as gradients:

        def remembered(examples: Sequence[Example]) -> Gradients:
            key = tuple(map(id, examples))
            if key not in seen:
                seen[key] = gradients(examples)
            return [g.clone() for g in seen[key]]

        return max(_change(bench, C, remembered) for C in CLIPS)


def _change(bench: Bench, C: float, gradients: GradientFn) -> float:
    """The same, at one clip."""
    job = replace(bench.job, privacy=replace(dpsgd.privacy_of(bench.job), clip=C))

    def clipped(examples: Sequence[Example]) -> Gradients:
        return dpsgd.clipped_sum(gradients, bench.parameters, examples, bench.sides, job, bench.mechanism)

    whole = clipped(bench.examples)
    without = [clipped([e for k, e in enumerate(bench.examples) if k != i]) for i in range(len(bench.examples))]
    changes = torch.stack([torch.stack([(w - r).norm() for w, r in zip(whole, rest, strict=True)]) for rest in without])
    over = changes.double().norm(dim=1) / C  # (records,), of (records, parameters)
    most = int(over.argmax())
    if not float(over[most]) <= OVER[bench.precise]:
        raise PrivacyError(
            f"{bench.name(int(changes[most].argmax()))}: one record moves the sum of clipped gradients by "
            f"{float(over[most]):.3g} times the clip, which no noise is for; choose other lora.targets or another model"
        )
    return float(over[most])


def random_start(start: LoRA) -> LoRA:
    """The adapter with its zeros replaced, so that every factor has a gradient."""

    def side(letter: str) -> dict[str, Tensor]:
        own = start.side(letter)
        return {m: t + 0.3 * torch.randn(t.shape) / t.shape[-1] ** 0.5 for m, t in own.items()}

    return LoRA(**{s: side(s) if s in "ABRH" else start.side(s) for s in SIDES})


def synthetic(encoder: Encoder, n: int) -> list[Example]:
    """Made-up examples of the task's form, of different lengths, in the model's own tokens."""
    form, examples = encoder.form, list[Example]()
    while len(examples) < n:
        row: dict[str, Any] = {}
        for column in form.columns:
            row[column] = _words(encoder.processor, 3 + 3 * len(examples)) if form.kind != "image" else _noise()
        if form.kind == "chat":
            turns = [{"role": role, "content": row[form.columns[0]]} for role in ("user", "assistant")]
            row[form.columns[0]] = turns
        if form.labels:
            row[form.columns[-1]] = form.labels[len(examples) % len(form.labels)]
        examples += encoder.by_row([row])[0][:1]
    return examples


def _words(tokenizer: Any, n: int) -> str:
    special = set(tokenizer.all_special_ids)
    ids = [i for i in torch.randint(len(tokenizer), (4 * n,)).tolist() if i not in special]
    return str(tokenizer.decode(ids[:n])) or "a"


def _noise() -> Any:
    from PIL import Image

    return Image.fromarray(torch.randint(256, (32, 32, 3), dtype=torch.uint8).numpy())


@contextmanager
def no_dropout(net: nn.Module) -> Iterator[None]:
    """No dropout, whether it is a module or a function."""
    moving = [m for m in net.modules() if "Drop" in type(m).__name__ and m.training]
    still: Any = _Undropped  # untyped
    with ExitStack() as stack:
        for module in moving:
            module.eval()
            stack.callback(module.train)
        stack.enter_context(still())
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
