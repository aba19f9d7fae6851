"""The order in which a checkpoint's own head scores its classes, and what becomes of that head."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fedlora.data.schema import Schema
from fedlora.sections import ModelConfig

from .source import cached, revision, source_of

NAMED = 8  # classes in a note


def in_checkpoint_order(config: ModelConfig, schema: Schema) -> Schema:
    """The schema with the order in which the checkpoint's own head scores these classes, if it has these very classes.

    So it is where `model.class_order` leaves it to the checkpoint. Names are the same but for case, blanks, hyphens and
    underscores.
    """
    if config.class_order == "data":
        return schema
    own = _own_classes(config) if schema.labels else ()
    by_name = {_plain(name): name for name in schema.labels}
    if sorted(map(_plain, own)) != sorted(by_name) or len(by_name) < len(schema.labels):
        return schema
    outputs = tuple(by_name[_plain(name)] for name in own)
    return replace(schema, outputs=() if outputs == schema.labels else outputs)


def head_notes(config: ModelConfig, schema: Schema, new: Sequence[str]) -> list[str]:
    """What is to be told of the classes that the checkpoint's own head knows; `new` are the modules it lacks."""
    own = _own_classes(config) if schema.labels else ()
    if schema.outputs:
        return [f"the checkpoint's own order of these classes is kept: {_few(schema.outputs)}"]
    if not own or all(re.fullmatch(r"LABEL_\d+", name) for name in own) or {*own} == {*schema.labels}:
        return []
    if new:
        return [f"the checkpoint's head is for other classes, {_few(own)}, so a new one is learned from nothing"]
    return [f"the checkpoint's head was for {_few(own)}; it is trained on, for {_few(schema.labels)} in that order"]


def _few(names: Sequence[str]) -> str:
    """A few of many names."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _own_classes(config: ModelConfig) -> tuple[str, ...]:
    """The names of the classes that the checkpoint's head scores, in order; none where its configuration has none.

    A configuration that cannot be read is left to `load_base_model` to refuse.
    """
    from transformers import AutoConfig

    source = source_of(config.path)
    try:
        read: Any = AutoConfig.from_pretrained(source, **revision(config), **cached(source), trust_remote_code=False)
        return tuple(str(name) for _, name in sorted(read.id2label.items()))
    except (OSError, ValueError, KeyError, AttributeError):
        return ()


def _plain(name: object) -> str:
    """A class name without what may differ between two spellings of it."""
    return "".join(str(name).casefold().replace("-", " ").replace("_", " ").split())
