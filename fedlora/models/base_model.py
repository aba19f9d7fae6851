"""The frozen base model and its tokenizer or image processor, from a folder, the hub or the package itself."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.data.schema import Schema
from fedlora.errors import ModelError
from fedlora.sections import ModelConfig
from fedlora.seeds import seeded

from . import quantization
from .input_limits import vocabulary
from .source import cached, readable, refuse_adapter, refuse_without_tokenizer, revision, source_of

LOADED = {".safetensors", ".bin", ".json", ".model", ".txt", ".jinja"}  # endings of what transformers reads of a model
LAYER = re.compile(r"\.(\d+)(?:\.|$)")  # in the name of a module that lies within a layer, of which there are several
PROBLEMS = {  # in transformers' words, what a head is for
    "class": "single_label_classification",
    "number": "regression",
    "labels": "multi_label_classification",
}


def load_base_model(config: ModelConfig, schema: Schema, seed: int) -> tuple[nn.Module, Any, list[str]]:
    """The model, its processor, and the modules that the checkpoint lacks, as a new head, which are drawn by the seed.

    Raises `ModelError` for a model that cannot be loaded, or is of another kind than the data need.
    """
    source = source_of(config.path)
    with seeded(seed):
        return _load(config, schema, source)


def model_files(path: str) -> list[Path]:
    """The files from which a base model and its processor are loaded; none of a model on the hub."""
    folder = Path(source_of(path))
    return sorted(p for p in folder.iterdir() if p.suffix in LOADED) if folder.is_dir() else []


def fingerprint(net: nn.Module) -> str:
    """A hash by which two parties can tell whether they have the same base.

    It covers names, shapes and up to 1024 numbers of every matrix; of quantised weights the shapes alone, as another
    device may round the last digit otherwise.
    """
    digest = sha256()
    rounded = tuple(f"{name}." for name, module in net.named_modules() if quantization.is_quantized(module))
    for name, tensor in net.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        if tensor.is_floating_point() and not name.startswith(rounded):
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 1024)].to("cpu", torch.float32)
            digest.update(sample.contiguous().numpy().tobytes())
    return digest.hexdigest()


def is_encoder_decoder(net: Any) -> bool:
    """Has the model an encoder for what is given, and a decoder for what is learned?"""
    return bool(getattr(net.config, "is_encoder_decoder", False))


def decoder_inputs(net: Any) -> Callable[[Tensor], Tensor] | None:
    """The function that makes a decoder's inputs (tokens,) of what it is to write, (tokens,); none without an encoder.

    They are the targets one place later, behind the token that this model begins with.
    """
    if not is_encoder_decoder(net):
        return None
    prepare = getattr(net, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        return lambda targets: prepare(labels=targets[None])[0]
    start = net.config.decoder_start_token_id
    if start is None:
        raise ModelError(f"{type(net).__name__} does not say with which token it begins: set decoder_start_token_id")
    return lambda targets: torch.cat([targets.new_tensor([start]), targets[:-1]])


def head_modules(net: nn.Module, new: Sequence[str]) -> list[str]:
    """The modules that a classifier has beside its backbone, and any others that are new; none within another."""
    sizes = _sizes(net)
    beside = [name for name, size in sizes.items() if name != _backbone(net, sizes) and size]
    heads = sorted({*beside, *new})
    return [name for name in heads if not is_inside(name, heads)]


def _sizes(net: nn.Module) -> dict[str, int]:
    """The numbers in each module that a model consists of."""
    return {name: sum(p.numel() for p in module.parameters()) for name, module in net.named_children()}


def _backbone(net: nn.Module, sizes: Mapping[str, int]) -> str:
    """The module to which a head, or an output layer, is put."""
    prefix = getattr(net, "base_model_prefix", "")
    return prefix if prefix in sizes else max(sizes, key=lambda name: sizes[name])  # CLIP's has another name


def _refuse_missing_layers(net: nn.Module, new: Sequence[str], source: str, *, has_head: bool) -> None:
    """Raise `ModelError` for a checkpoint without weights for its layers, which would be drawn at random.

    A classifier may lack some, as the encoder beside a decoder: these are trained whole, and a run says so.
    """
    backbone = _backbone(net, _sizes(net))
    lacking = _layers(new, backbone)
    every = _layers([name.rpartition(".")[0] for name, _ in net.named_parameters()], backbone)
    if lacking and (lacking == every or not has_head):
        raise ModelError(
            f"model {source}: its files have no weights, or of another shape, for {min(lacking)}, of which it says to "
            "consist; get them anew, or have transformers save them anew: names may begin with what does not belong "
            "there, as module."
        )


def _scale_output(net: nn.Module, new: Sequence[str], config: ModelConfig, source: str) -> None:
    """Multiply what a new head computes by `model.head_scale`; raise `ModelError` where no head is new."""
    outputs = [layer for layer in map(net.get_submodule, new) if _is_output(layer, net)]
    if not outputs:
        raise ModelError(
            f"model.head_scale = {config.head_scale:g}, and no head of model {source} is new: its checkpoint has the "
            "weights, or the data need none; leave model.head_scale out"
        )
    for parameter in (parameter for layer in outputs for parameter in layer.parameters()):
        parameter.data.mul_(config.head_scale)


def _is_output(layer: nn.Module, net: Any) -> bool:
    """Does this layer compute a number for every class?"""
    return bool(getattr(layer, "out_features", 0) == net.config.num_labels)


def _layers(modules: Iterable[str], backbone: str) -> set[str]:
    """The layers of a backbone in which these modules lie, by the name up to the layer's number."""
    found = (LAYER.search(name) for name in modules if is_inside(name, [backbone]))
    return {match.string[: match.end(1)] for match in found if match}


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Does a module lie within one of these?"""
    return name.startswith(tuple(f"{module}." for module in modules))


def device(config: ModelConfig) -> torch.device:
    """The device that the model runs on: `model.device`, or with "auto" the GPU if there is one."""
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _load(config: ModelConfig, schema: Schema, source: str) -> tuple[nn.Module, Any, list[str]]:
    from transformers import AutoConfig

    where = {**revision(config), **cached(source), "trust_remote_code": False}  # no code that comes with a model
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype), **where, **_classes(schema)}
    options["use_safetensors"] = True  # the other format is pickle, which is code
    with readable(config.path or source, "the configuration"):
        checkpoint = AutoConfig.from_pretrained(source, **where)
    quantization.refuse_other(config, source, checkpoint)
    model_class = _model_class(config, schema, source, checkpoint)
    if type(checkpoint) not in model_class._model_mapping:
        raise ModelError(
            f"model {source} is of the architecture {checkpoint.model_type}, of which transformers has no "
            f"{model_class.__name__}; choose another model"
        )
    processor = _processor(config, schema, source, where)
    load = partial(model_class.from_pretrained, source, output_loading_info=True, **options)
    with readable(config.path or source, "the weights"):
        net, new = _pretrained(config, schema, load)
    refuse_adapter(net, source)
    _refuse_missing_layers(net, new, source, has_head=schema.has_head)
    if config.head_scale != 1:
        _scale_output(net, new, config, source)
    if schema.kind != "image":
        _pad(net, processor)
    if new and not schema.has_head:
        raise ModelError(
            f"model {source} is no language model: it has no weights for {', '.join(new)}; for a classifier, "
            f"say with data.label which column holds the classes, as {', '.join(schema.columns)} alone is text"
        )
    return net, processor, new


def _processor(config: ModelConfig, schema: Schema, source: str, where: Mapping[str, Any]) -> Any:
    """The model's image processor, or its tokenizer."""
    from transformers import AutoImageProcessor, AutoTokenizer

    image_processor: Any = AutoImageProcessor  # untyped
    if schema.kind == "image":
        with readable(config.path or source, "the image processor"):
            return image_processor.from_pretrained(source, **where)
    refuse_without_tokenizer(source)
    with readable(config.path or source, "the tokenizer"):
        return AutoTokenizer.from_pretrained(source, **where)


def _model_class(config: ModelConfig, schema: Schema, source: str, checkpoint: Any) -> Any:
    """The class of transformers that has the output that the data need; see `_refuse_for_encoder_decoder`."""
    import transformers

    if schema.has_head:
        kind = "Sequence" if schema.kind == "label" else "Image"
        return getattr(transformers, f"AutoModelFor{kind}Classification")
    if not checkpoint.is_encoder_decoder:
        if config.task == "seq2seq":
            raise ModelError(
                f"model.task = seq2seq: model {source} has no encoder beside its decoder, as T5 and BART have; "
                "leave model.task at auto, and it learns the response after the prompt"
            )
        return transformers.AutoModelForCausalLM
    if schema.kind != "response":
        raise ModelError(
            f"model {source} is an encoder-decoder, which learns a response to a prompt, and the data are of the kind "
            f'"{schema.kind}"; give data.prompt and data.response, or model.task = seq2seq to a server without data'
        )
    return transformers.AutoModelForSeq2SeqLM


def _pretrained(config: ModelConfig, schema: Schema, load: Callable[..., Any]) -> tuple[Any, list[str]]:
    """The model in the bits of `model.quantize`, and the modules that are new in it; `load` takes more options.

    Where modules that are trained whole were quantised, it is loaded once more without that: which modules those are
    differs by architecture and by checkpoint, and is known only then.
    """
    quantize = partial(quantization.options, config, device(config))
    net, info = load(**quantize())
    new = _new_modules(info)
    whole = quantization.left_whole(net, head_modules(net, new)) if schema.has_head else []
    if whole:
        del net  # there may be no memory for two
        net, _ = load(**quantize(whole))
    quantization.settle(net)
    return net, new


def _classes(schema: Schema) -> dict[str, Any]:
    """Options for transformers to give the model a head for these classes, or a number; none for data without."""
    if not schema.has_head:
        return {}
    head: dict[str, Any] = {"ignore_mismatched_sizes": True, "problem_type": PROBLEMS[schema.target]}
    if schema.target == "number":
        return head | {"num_labels": 1}
    return head | {
        "num_labels": len(schema.labels),
        "id2label": dict(enumerate(schema.class_order)),
        "label2id": {name: i for i, name in enumerate(schema.class_order)},
    }


def _new_modules(loading_info: Mapping[str, Any]) -> list[str]:
    """The modules for which the checkpoint has no weights, or weights of another shape."""
    mismatched = (name for name, *_ in loading_info["mismatched_keys"])
    return sorted({name.rsplit(".", 1)[0] for name in (*loading_info["missing_keys"], *mismatched)})


def _pad(net: Any, tokenizer: Any) -> None:
    """Make sure that tokenizer and model have a token to pad with, by which a decoder that classifies finds the last
    token; raises `ModelError` if the tokenizer has none that could serve."""
    rows = vocabulary(net)
    names = ("pad_token", "eos_token", "unk_token", "bos_token")
    named = ((getattr(tokenizer, name), getattr(tokenizer, f"{name}_id")) for name in names)
    known = [token for token, id in named if token is not None and (rows is None or id < rows)]
    if not known:
        raise ModelError(f"the tokenizer of {tokenizer.name_or_path} has no token to pad with; set pad_token in it")
    if tokenizer.pad_token != known[0]:  # it has none, or one that was added and has no row in the embedding
        tokenizer.pad_token = known[0]  # padding never counts, so any token does
    net.config.pad_token_id = net.config.get_text_config().pad_token_id = tokenizer.pad_token_id
