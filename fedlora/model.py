"""A base model wearing one LoRA adapter: read its factors, write factors of any rank. The only file that knows PEFT."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor, nn

from . import base
from .config import LoRAConfig, ModelConfig
from .data import Form
from .encode import Encoder, Example, length
from .errors import ModelError, StrategyError, nearest
from .lora import LoRA, Side, join
from .metrics import Metrics

NAME = "default"  # PEFT's name of the one adapter
PREFIX = "base_model.model."  # what PEFT puts before a module's name
USUAL = (("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"), ("c_attn",), ("qkv",), ("Wqkv",), ("q", "v"))
TASKS = {"label": TaskType.SEQ_CLS, "image": None}


class Model:
    """One resident base; adapters are swapped in and out of it."""

    def __init__(self, config: ModelConfig, lora: LoRAConfig, form: Form, seed: int) -> None:
        self.form = form
        self.device = base.device(config)
        net, self.processor, new = base.load(config, form, seed)
        with base.seeded(seed):
            self.net = _wear(net, lora, form, new)
        if config.quantize == "none":  # a quantised base is where it belongs already
            self.net.to(self.device)
        self.encoder = Encoder(self.processor, form, config.max_length)
        layers: dict[str, Any] = {n: m for n, m in self.net.named_modules() if isinstance(m, LoraLayer)}
        self.adapted = {name.removeprefix(PREFIX): layer for name, layer in layers.items()}
        self.heads = {
            f"{name.removeprefix(PREFIX)}.{key}": p
            for name, module in self.net.named_modules()
            if isinstance(module, ModulesToSaveWrapper)
            for key, p in module.modules_to_save[NAME].named_parameters()
        }
        self.scale = float(next(iter(self.adapted.values())).scaling[NAME])
        # A weight in half precision, or quantised, would swallow small residuals: there they stay a branch.
        self.folds = config.quantize == "none" and config.dtype == "float32"
        self._worn: tuple[LoRA, ...] = ()
        self._pretrained: dict[str, Tensor] = {}  # of what the offset is folded into
        self._branch: dict[str, tuple[Tensor, Tensor]] = {}
        _check_rank(lora.rank, self.adapted)

    @property
    def size(self) -> int:
        """Numbers in the base model, without the adapter and without the second copy that PEFT makes of a head."""
        worn = [*self._matrices("A"), *self._matrices("B"), *self.heads.items()]
        return sum(p.numel() for p in self.net.parameters()) - sum(p.numel() for _, p in worn)

    def read(self) -> LoRA:
        """The adapter it wears, on the CPU: A (r, d_in), B (d_out, r), head."""

        def side(pairs: Iterable[tuple[str, Tensor]]) -> Side:
            return {name: p.detach().to("cpu", copy=True) for name, p in pairs}

        return LoRA(side(self._matrices("A")), side(self._matrices("B")), side(self.heads.items()))

    def write(self, lora: LoRA, offset: tuple[LoRA, ...] = ()) -> None:
        """Wear this adapter, over the pretrained weights plus the offset. A side it has not stays as it is."""
        for letter, parameters in (("A", self._matrices("A")), ("B", self._matrices("B")), ("H", self.heads.items())):
            given = lora.side(letter)
            for name, p in parameters if given else ():
                p.data = _fitting(letter, name, p, given).to(p.device, p.dtype, copy=True)
        for name, layer in self.adapted.items():
            a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            if a.shape[0] != b.shape[1]:
                raise StrategyError(f"{name}: A {tuple(a.shape)} and B {tuple(b.shape)} have different ranks")
        self._wear_offset(offset)

    def trains(self, sides: str) -> list[nn.Parameter]:
        """Let gradients reach these sides alone; their parameters, in a fixed order."""
        parameters = {
            "A": [p for _, p in self._matrices("A")],
            "B": [p for _, p in self._matrices("B")],
            "H": list(self.heads.values()),
        }
        for p in self.net.parameters():
            p.requires_grad_(False)
        chosen = [p for side, ps in parameters.items() if side in sides for p in ps]
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

    def save(self, lora: LoRA, folder: Path) -> None:
        """Write the adapter as PEFT does, at whatever rank it has, so that its scale is exactly the run's."""
        self.write(lora)
        ranks = {m: a.shape[0] for m, a in lora.A.items()}
        rank = max(ranks.values())
        odd = {m: r for m, r in ranks.items() if r != rank}
        was: Any = self.net.peft_config[NAME]
        shown = copy(was)
        shown.r, shown.lora_alpha, shown.use_rslora = rank, self.scale * rank, False
        shown.rank_pattern, shown.alpha_pattern = odd, {m: self.scale * r for m, r in odd.items()}
        shown.inference_mode = True
        self.net.peft_config[NAME] = shown
        try:
            self.net.save_pretrained(str(folder))
        finally:
            self.net.peft_config[NAME] = was

    def open(self, folder: Path) -> LoRA:
        """The adapter that `save` wrote, read for this model; its scale must be the model's."""
        shown: Any = LoraConfig.from_pretrained(str(folder))
        tensors = load_file(folder / "adapter_model.safetensors")
        found: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}, "H": {}}
        for key, t in tensors.items():
            name, dot, letter = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
            found[letter if dot else "H"][name if dot else key.removeprefix(PREFIX)] = t
        for name, a in found["A"].items():
            r, alpha = shown.rank_pattern.get(name, shown.r), shown.alpha_pattern.get(name, shown.lora_alpha)
            s = alpha / r**0.5 if shown.use_rslora else alpha / r
            found["B"][name] = found["B"][name] * (s / self.scale)
            if a.shape[0] != r:
                raise ModelError(f"{folder}: {name} has rank {a.shape[0]}, its configuration says {r}")
        return LoRA(**found)

    def _matrices(self, letter: str) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self.adapted.items():
            yield name, (layer.lora_A if letter == "A" else layer.lora_B)[NAME].weight

    def _wear_offset(self, parts: tuple[LoRA, ...]) -> None:
        if len(parts) == len(self._worn) and all(x is y for x, y in zip(parts, self._worn, strict=True)):
            return
        whole = join(*parts)
        for name, layer in self.adapted.items():
            a, b = whole.A.get(name), whole.B.get(name)
            if self.folds:
                self._fold(name, layer, a, b)
            elif a is not None and b is not None:
                if name not in self._branch:
                    layer.register_forward_hook(self._add_branch(name))
                self._branch[name] = (a.to(self.device), b.to(self.device))
            elif name in self._branch:
                a, b = self._branch[name]
                self._branch[name] = (a[:0], b[:, :0])
        self._worn = parts

    @torch.no_grad()
    def _fold(self, name: str, layer: Any, a: Tensor | None, b: Tensor | None) -> None:
        """Set the weight to W + s B A, always from the pretrained W, so that nothing accumulates."""
        weight = layer.get_base_layer().weight
        pretrained = self._pretrained.setdefault(name, weight.detach().clone())
        weight.copy_(pretrained)
        if a is not None and b is not None:
            product = b.to(weight) @ a.to(weight)  # (d_out, d_in)
            weight.add_(product.T if layer.fan_in_fan_out else product, alpha=self.scale)

    def _add_branch(self, name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            a, b = self._branch[name]
            return output + (self.scale * F.linear(F.linear(inputs[0].to(a.dtype), a), b)).to(output.dtype)

        return add


def _wear(net: nn.Module, lora: LoRAConfig, form: Form, new: list[str]) -> PeftModel:
    """The model with a fresh adapter, and its head, where it has one, as a part to train."""
    heads = sorted({*_heads(net), *new}) if form.labels else None
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a float is well for PEFT, and said to be an int
        use_rslora=lora.rslora,
        lora_dropout=lora.dropout,
        target_modules=_targets(net, lora.targets),
        modules_to_save=heads,
        task_type=TASKS.get(form.kind, TaskType.CAUSAL_LM),
        exclude_modules=heads,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # PEFT finds GPT-2's Conv1D by itself, and says so
        return get_peft_model(net, config)


def _targets(net: nn.Module, targets: tuple[str, ...]) -> list[str] | str:
    """The modules that were asked for, each of which must be there; else the query and value projections."""
    if targets == ("all-linear",):
        return "all-linear"
    linear = [name for name, m in net.named_modules() if _is_linear(m)]
    ends = {name.rsplit(".", 1)[-1] for name in linear}
    if not targets:
        return next((list(names) for names in USUAL if ends.issuperset(names)), "all-linear")
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise ModelError(f'lora.targets: {type(net).__name__} has no module "{target}"; {nearest(target, ends)}')
    return list(targets)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _heads(net: nn.Module) -> list[str]:
    """What a classifier has beside its backbone."""
    prefix = getattr(net, "base_model_prefix", "")
    return [name for name, m in net.named_children() if name != prefix and any(True for _ in m.parameters())]


def _check_rank(rank: int, adapted: dict[str, Any]) -> None:
    for name, layer in adapted.items():
        if rank > min(layer.in_features, layer.out_features):
            raise ModelError(
                f"lora.rank = {rank} is above the smaller dimension of {name} "
                f"({layer.out_features} x {layer.in_features}); choose a rank of at most "
                f"{min(min(x.in_features, x.out_features) for x in adapted.values())}"
            )


def _fitting(letter: str, name: str, p: Tensor, given: Side) -> Tensor:
    """The given matrix, refused where the module cannot wear it; the rank is free."""
    fixed = {"A": slice(1, None), "B": slice(0, 1), "H": slice(None)}[letter]
    if name not in given or given[name].dim() != p.dim() or given[name].shape[fixed] != p.shape[fixed]:
        got = tuple(given[name].shape) if name in given else "nothing"
        raise StrategyError(f"{letter} of {name}: got {got}, the model takes {tuple(p.shape)}, of any rank")
    return given[name]


def _by_length(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    """Batches of like lengths, so that little is padding."""
    ordered = sorted(examples, key=length)
    for i in range(0, len(ordered), size):
        yield list(ordered[i : i + size])
