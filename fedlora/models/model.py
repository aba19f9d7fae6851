"""A base model wearing one adapter: read its factors, write factors of any rank. Knows PEFT, as wear and reload do."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from fedlora.data.encoding import Encoder, Example, length
from fedlora.data.rows import Rows, take
from fedlora.data.schema import Form
from fedlora.errors import StrategyError
from fedlora.lora import LoRA, Side
from fedlora.metrics import Metrics
from fedlora.sections import LoRAConfig, ModelConfig

from . import adapter, base_model
from . import offset as offset_module
from .adapter import NAME, PREFIX

REFUSALS = {
    "dora": "takes no offset: its magnitudes are those of W + s B A, and would scale what else is added to W",
    "vera": "takes no offset, core or gain: a client trains two vectors a module, beside A and B that are fixed",
}
LETTERS = {"lora_A": "A", "lora_B": "B", "vera_lambda_d": "A", "vera_lambda_b": "B"}


class Model:
    """One resident base; adapters are swapped in and out of it."""

    def __init__(self, config: ModelConfig, lora: LoRAConfig, form: Form, seed: int, public: Rows = ()) -> None:
        """`public` are the rows of `lora.init_data`, of the run's form; only `lora.init = eva` looks at them.

        Raises `ModelError` where the base cannot be had, or cannot wear the adapter.
        """
        self.form, self.kind = form, lora.kind
        self.device = base_model.device(config)
        net, self.processor, new = base_model.load(config, form, seed)
        self.fingerprint = base_model.fingerprint(net)
        self.net = adapter.wear(net, lora, form, new, seed)
        if config.quantize == "none":  # a quantised base is where it belongs already
            self.net.to(self.device)
        self.encoder = Encoder(self.processor, form, config.max_length)
        self.adapted = adapter.layers(self.net)
        self.scales = {m: 1.0 if self.kind == "vera" else layer.scaling[NAME] for m, layer in self.adapted.items()}
        self.heads = {
            f"{name.removeprefix(PREFIX)}.{key}": p
            for name, module in self.net.named_modules()
            if isinstance(module, ModulesToSaveWrapper)
            for key, p in module.modules_to_save[NAME].named_parameters()
        }
        self.extras = {  # DoRA's magnitudes, which are trained with the head
            f"{m}.lora_magnitude_vector": layer.lora_magnitude_vector[NAME].weight
            for m, layer in self.adapted.items()
            if self.kind == "dora"
        }
        self._sides: dict[str, dict[str, nn.Parameter]] = {
            "A": adapter.side("A", self.adapted),
            "B": adapter.side("B", self.adapted),
            "R": {},
            "H": {**self.heads, **self.extras},
        }
        # A weight in half precision, or quantised, would swallow small residuals: there they stay beside it.
        folds = config.quantize == "none" and config.dtype == "float32"
        self.offset = offset_module.Offset(self.adapted, self.scales, folds)
        self._hooks: list[Any] = []  # of the cores
        if lora.init == "eva":
            examples = self.encoder(take(public, range(min(adapter.INPUTS, len(public)))))
            self.net.eval()
            adapter.eva(self.adapted, (self.logits(self.encoder.collate([e])) for e in examples))

    @property
    def size(self) -> int:
        """Numbers in the base model, without the adapter and without the second copy that PEFT makes of a head."""
        worn = sum(p.numel() for side in self._sides.values() for p in side.values())
        return sum(p.numel() for p in self.net.parameters()) - worn

    def memory(self, rank: int, batch_size: int = 16) -> int:
        """Bytes that training at this rank takes, estimated.

        These are the base as it is; weight, gradient and the two moments of Adam in float32 of the adapter and head;
        and the activations of a batch of the longest examples: 17 numbers of the base's type a token, layer and hidden
        unit (the 34 bytes of Korthikanti et al., https://arxiv.org/abs/2205.05198, without attention scores), and two
        in float32 a token and word of a language model. The copy of weights that an offset is folded into is not in it.
        """
        shape: Any = self.net.config
        worn = {id(p) for side in self._sides.values() for p in side.values()}
        held = [t for t in (*self.net.parameters(), *self.net.buffers()) if id(t) not in worn]
        sizes = [(layer.in_features, layer.out_features) for layer in self.adapted.values()]
        trained = sum(rank + d_out if self.kind == "vera" else rank * (d_in + d_out) for d_in, d_out in sizes)
        trained += sum(p.numel() for p in self._sides["H"].values())
        tokens = batch_size * (_patches(shape) if self.form.kind == "image" else self.encoder.max_length)
        width = getattr(shape, "hidden_size", 0) * getattr(shape, "num_hidden_layers", 0)
        scores = 0 if self.form.labels else 8 * shape.vocab_size
        kept = tokens * (17 * width * self.net.dtype.itemsize + scores)
        return int(sum(t.numel() * t.element_size() for t in held) + 16 * trained + kept)

    def read(self) -> LoRA:
        """The adapter it wears, on the CPU: A (r, d_in), B (d_out, r), core (r, r) where there is one, head."""
        return LoRA(
            **{s: {m: p.detach().to("cpu", copy=True) for m, p in own.items()} for s, own in self._sides.items()}
        )

    def write(
        self, lora: LoRA, offset: tuple[LoRA, ...] = (), gain: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        """Wear this adapter, over the pretrained weights plus the offset, with module m's s times gain[m].

        Of A, B and H, a side that it has not stays as it is; cores and gains hold until the next write. Raises
        `StrategyError` for what this model, or this kind of adapter, cannot wear.
        """
        if lora.D:
            offset = (*offset, LoRA(D=lora.D))
        if (self.kind != "lora" and any(offset)) or (self.kind == "vera" and (lora.R or gain)):
            raise StrategyError(f"lora.kind = {self.kind} {REFUSALS[self.kind]}; choose lora.kind = lora")
        for letter in "ABH":
            given = lora.side(letter)
            for name, p in self._sides[letter].items() if given else ():
                p.data = self._fitting(letter, name, given).to(p.device, p.dtype, copy=True)
        if self.kind != "vera":
            self._wear_factors(lora.R, gain)
        self.offset.wear(offset)

    def trains(self, sides: str) -> list[nn.Parameter]:
        """Let gradients reach these sides alone; their parameters, in a fixed order."""
        for p in self.net.parameters():
            p.requires_grad_(False)
            p.grad = None
        chosen = [p for side in self._sides if side in sides for p in self._sides[side].values()]
        for p in chosen:
            p.requires_grad_(True)
        return chosen

    def logits(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Scores and targets, flat: (n, classes or vocabulary) and (n,), where a target of -100 does not count."""
        inputs = {k: v.to(self.device) for k, v in batch.items() if k != "labels"}
        labels = batch["labels"].to(self.device)
        scores = self.net(**inputs).logits.float()
        if self.form.labels:
            return scores, labels
        return scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy summed over the targets of a batch."""
        scores, targets = self.logits(batch)
        return F.cross_entropy(scores, targets, ignore_index=-100, reduction="sum")

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Of each example by itself, the mean over its own targets: (examples,)."""
        scores, targets = self.logits(batch)
        each = F.cross_entropy(scores, targets, ignore_index=-100, reduction="none").view(len(batch["labels"]), -1)
        return each.sum(1) / (targets != -100).view(each.shape).sum(1).clamp(min=1)

    def targets(self, examples: Sequence[Example]) -> int:
        """How many predictions these examples ask for."""
        if self.form.labels:
            return len(examples)
        return sum(int((e["labels"][1:] != -100).sum()) for e in examples)

    @torch.no_grad()
    def metrics(self, examples: Sequence[Example], batch_size: int = 32) -> Metrics:
        """How good the model, as it is worn, is on these examples."""
        self.net.eval()
        classes = len(self.form.labels)
        total = Metrics(0, 0, 0.0, 0, torch.zeros(classes, classes, dtype=torch.int64) if classes else None)
        for batch in _by_length(examples, batch_size):
            scores, targets = self.logits(self.encoder.collate(batch))
            counts = targets != -100
            scores, targets = scores[counts], targets[counts]
            guess = scores.argmax(-1)
            loss = float(F.cross_entropy(scores, targets, reduction="sum"))
            confusion = None
            if classes:
                pairs = torch.bincount(targets * classes + guess, minlength=classes**2)
                confusion = pairs.view(classes, classes).cpu()
            total += Metrics(len(batch), len(targets), loss, int((guess == targets).sum()), confusion)
        return total

    def _wear_factors(self, cores: Side, gain: Mapping[str, float]) -> None:
        """What is around A and B: the scale of their product, and the core between them."""
        while self._hooks:
            self._hooks.pop().remove()
        self._sides["R"] = {}
        for name, layer in self.adapted.items():
            a, b = layer.lora_A[NAME], layer.lora_B[NAME].weight
            if a.weight.shape[0] != b.shape[1]:
                raise StrategyError(f"{name}: A {tuple(a.weight.shape)} and B {tuple(b.shape)} have different ranks")
            layer.scaling[NAME] = self.scales[name] * gain.get(name, 1.0)
            layer.lora_R = None
            if name in cores:
                layer.lora_R = _core(name, cores[name], a.weight)
                self._sides["R"][name] = layer.lora_R.weight
                self._hooks.append(a.register_forward_hook(lambda _m, _x, y, core=layer.lora_R: core(y)))

    def _fitting(self, letter: str, name: str, given: Side) -> Tensor:
        """The given matrix, refused where the module cannot wear it; the rank is free, but for VeRA."""
        p = self._sides[letter][name]
        fixed = (
            slice(None) if self.kind == "vera" else {"A": slice(1, None), "B": slice(0, 1), "H": slice(None)}[letter]
        )
        if name not in given or given[name].dim() != p.dim() or given[name].shape[fixed] != p.shape[fixed]:
            got = tuple(given[name].shape) if name in given else "nothing"
            free = "" if letter == "H" or self.kind == "vera" else ", of any rank"
            raise StrategyError(f"{letter} of {name}: got {got}, the model takes {tuple(p.shape)}{free}")
        return given[name]


def _core(name: str, given: Tensor, a: Tensor) -> nn.Linear:
    """A layer for the core, refused where it is not as wide as A is high."""
    r = a.shape[0]
    if given.shape != (r, r):
        raise StrategyError(f"R of {name}: got {tuple(given.shape)}, with this A the model takes {(r, r)}")
    core = nn.Linear(r, r, bias=False, device="meta")  # elsewhere it would draw from the run's generator
    core.weight = nn.Parameter(given.to(a.device, a.dtype, copy=True))
    return core


def _patches(shape: Any) -> int:
    """Of an image, as a vision transformer cuts it up; 1 where it does not."""
    side, patch = getattr(shape, "image_size", 1), getattr(shape, "patch_size", 1)
    return int((side // patch) ** 2) if isinstance(side, int) and isinstance(patch, int) else 1


def _by_length(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    """Batches of like lengths, so that little is padding."""
    ordered = sorted(examples, key=length)
    for i in range(0, len(ordered), size):
        yield list(ordered[i : i + size])
