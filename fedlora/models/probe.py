"""What a model does with one made-up example: which of its modules it calls, and whether its scores are numbers."""

from typing import Any

import torch
from torch import Tensor, nn

from fedlora.data.schema import Schema
from fedlora.errors import ModelError

from .adapter import PREFIX

WORDS = "Federated learning trains one model on data that stay where they are."
TOKENS = 16  # of the made-up example at most: fewer than any model has positions
SIDE = 224  # of the made-up image, in pixels


def called_modules(net: nn.Module, processor: Any, schema: Schema, dtype: str) -> frozenset[str] | None:
    """The names of the modules that run while the model looks at a made-up example; None where it cannot.

    Which these are depends on the kind of the data alone, so that all parties to a run find the same. Raises
    `ModelError` where the scores are no numbers.
    """
    called: set[str] = set()
    hooks = [m.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, m in net.named_modules()]
    try:
        scores = _scores(net, inputs(net, processor, schema))
    except Exception:  # of a model's own code, whatever it lacks in this example: then all its modules count
        return None
    finally:
        for hook in hooks:
            hook.remove()
    if not bool(scores.isfinite().all()):
        raise ModelError(not_finite(net, dtype))
    return frozenset(called)


@torch.no_grad()
def _scores(net: Any, inputs: dict[str, Tensor]) -> Tensor:
    trained = net.training
    scores: Tensor = net.eval()(**{name: t.to(net.device) for name, t in inputs.items()}).logits
    net.train(trained)
    return scores


def inputs(net: Any, processor: Any, schema: Schema) -> dict[str, Tensor]:
    """What the model takes of a made-up example."""
    if schema.kind == "image":
        from PIL import Image

        picture = Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB")
        pixels: Tensor = processor(images=picture, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels.to(net.dtype)}
    ids = torch.tensor([processor(WORDS)["input_ids"][-TOKENS:]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if net.config.is_encoder_decoder and not schema.has_head:
        inputs["decoder_input_ids"] = ids
    return inputs


def not_finite(net: nn.Module, dtype: str) -> str:
    """What to say of a base model whose scores or loss are no numbers before it was trained."""
    if dtype == "float16":
        return (
            "the base model gives scores that are no numbers before any training with model.dtype = float16: its "
            "activations or weights are too large for it; set model.dtype = bfloat16 or float32"
        )
    damaged = next((name for name, p in net.named_parameters() if not bool(p.isfinite().all())), "")
    if damaged:
        name = damaged.removeprefix(PREFIX).replace(".base_layer", "")
        return f"the weights of {name} in the base model hold nan or infinity; get its files anew"
    return "the base model gives scores that are no numbers before any training; choose another model"
