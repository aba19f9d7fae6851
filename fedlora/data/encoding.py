"""Rows encoded as tensors: the inputs of the model, and the tokens or classes that it is to learn."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import chain, takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedlora.errors import DataError

from .rows import Rows
from .schema import Schema

Example = dict[str, Tensor]
IGNORED = -100  # the label of a token that is not learned
SHORTEST = 8  # tokens of the last block of a long text
IMAGES = 64  # images that are held in memory as they were before they were scaled
MARKS_ANSWERS = re.compile(r"{%-?\s*generation\b")  # in a chat template


def length(example: Example) -> int:
    """The count of an example's tokens; 0 for an image, as all images are of one size."""
    return len(example["input_ids"]) if "input_ids" in example else 0


@dataclass(frozen=True, eq=False)
class Encoder:
    """Encodes rows of one schema as examples for one model."""

    processor: Any  # a tokenizer, or an image processor
    schema: Schema
    max_length: int
    decoder_inputs: Callable[[Tensor], Tensor] | None = None  # of an encoder-decoder: what its decoder sees of targets

    def __call__(self, rows: Rows) -> list[Example]:
        """The examples of all rows, without padding.

        An example for a language model has input_ids, attention_mask and labels, each (tokens,), with labels = -100
        where nothing is to be learned; a long text gives several examples, a row with nothing to learn none. One for an
        encoder-decoder has the prompt in input_ids, and decoder_input_ids as long as its labels. One for a
        classifier has what its tokenizer gives, (tokens,), or pixel_values (channels, height, width), and labels, a
        scalar. Raises `DataError` for rows that cannot be encoded, or if none has anything to learn.
        """
        return list(chain.from_iterable(self.by_row(rows)))

    def by_row(self, rows: Rows) -> list[list[Example]]:
        """The examples of each row; see `__call__`."""
        if not len(rows):
            return []
        encode = seq2seq if self.decoder_inputs else KINDS[self.schema.kind]
        examples = [list(of_row) for of_row in encode(self, rows)]
        if not any(examples):
            raise DataError(
                f"of {len(rows)} examples none has a token to learn within {self.max_length}; "
                "raise model.max_length, or look whether they are empty"
            )
        return examples

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A batch, padded on the right to its longest example: (examples, tokens), or images and classes stacked."""
        return {key: self._batched(key, [example[key] for example in examples]) for key in examples[0]}

    def _batched(self, key: str, tensors: Sequence[Tensor]) -> Tensor:
        if tensors[0].dim() != 1:
            return torch.stack(list(tensors))
        pad = getattr(self.processor, "pad_token_id", None) or 0
        padding = {
            "input_ids": pad,
            "decoder_input_ids": pad,
            "token_type_ids": getattr(self.processor, "pad_token_type_id", 0),
            "labels": IGNORED,
        }
        return pad_sequence(list(tensors), batch_first=True, padding_value=padding.get(key, 0))


def _text(encoder: Encoder, rows: Rows) -> Iterator[Iterable[Example]]:
    """Yield the examples of every text: its consecutive blocks."""
    first, last = _ends(encoder.processor)
    for ids in _tokens(encoder, [row[encoder.schema.columns[0]] for row in rows]):
        yield _blocks([*first, *ids, *last], encoder.max_length) if ids else ()


def _blocks(whole: list[int], size: int) -> Iterator[Example]:
    """Yield blocks of `size` tokens; the last one only if it is not too short."""
    for start in range(0, len(whole), size):
        block = whole[start : start + size]
        if start == 0 or len(block) >= SHORTEST:
            yield from _causal(block, block)


def _response(encoder: Encoder, rows: Rows) -> Iterator[Iterable[Example]]:
    """Yield one example a row: prompt, newline, response, of which the response is learned.

    Where both are too long, the prompt is cut first, from its left, and then the response, from its right.
    """
    first, last = _ends(encoder.processor)
    ask, answer = encoder.schema.columns
    prompts = _tokens(encoder, [row[ask] + "\n" for row in rows])
    responses = _tokens(encoder, [row[answer] for row in rows])
    for prompt, response in zip(prompts, responses, strict=True):
        learned = [*response, *last][: encoder.max_length - len(first)]
        left = encoder.max_length - len(first) - len(learned)
        given = [*first, *prompt[max(0, len(prompt) - left) :]]
        yield _causal(given + learned, [IGNORED] * len(given) + learned)


def seq2seq(encoder: Encoder, rows: Rows) -> Iterator[Iterable[Example]]:
    """Yield one example a row for an encoder-decoder: the encoder reads the prompt, the decoder writes the response.

    Each has the special tokens that the tokenizer gives it, and is cut at its end where it is too long; a response
    that was cut does not teach the model to stop there.
    """
    ask, answer = encoder.schema.columns
    tokenizer, most = encoder.processor, encoder.max_length
    sources = tokenizer([row[ask] for row in rows], truncation=True, max_length=most)["input_ids"]
    wholes = tokenizer(text_target=[row[answer] for row in rows], verbose=False)["input_ids"]
    targets = tokenizer(text_target=[row[answer] for row in rows], truncation=True, max_length=most)["input_ids"]
    for source, whole, target in zip(sources, wholes, targets, strict=True):
        yield _encoder_decoder(encoder, source, target, cut=len(whole) > len(target))


def _encoder_decoder(encoder: Encoder, source: list[int], target: list[int], *, cut: bool) -> Iterator[Example]:
    """Yield the example of a prompt and a response in tokens, unless it has nothing to learn."""
    special, make = encoder.processor.all_special_ids, encoder.decoder_inputs
    ids = torch.tensor(source or [encoder.processor.pad_token_id])
    written = torch.tensor(target, dtype=torch.int64)
    closing = len(list(takewhile(special.__contains__, reversed(target)))) if cut else 0
    labels = torch.cat([written[: len(target) - closing], torch.full((closing,), IGNORED)])
    if make is not None and bool((labels != IGNORED).any()):
        yield {
            "input_ids": ids,
            "attention_mask": torch.ones(len(ids), dtype=torch.int64),
            "decoder_input_ids": make(written),
            "labels": labels,
        }


def _chat(encoder: Encoder, rows: Rows) -> Iterator[Iterable[Example]]:
    """Yield one example a row: the conversation as the tokenizer's template writes it, or the end of a long one."""
    tokenizer = encoder.processor
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template; use an instruction-tuned model, "
            "or data.prompt and data.response"
        )
    tokenize = _marked if MARKS_ANSWERS.search(str(tokenizer.chat_template)) else _found
    first, _ = _ends(tokenizer)
    for row in rows:
        ids, learned = tokenize(tokenizer, row[encoder.schema.columns[0]])
        labels = [i if is_learned else IGNORED for i, is_learned in zip(ids, learned, strict=True)]
        kept = len(first) if ids[: len(first)] == first else 0  # the token that opens a text stays
        yield _causal(_cut(ids, kept, encoder.max_length), _cut(labels, kept, encoder.max_length))


def _cut(tokens: list[int], kept: int, size: int) -> list[int]:
    """At most `size` tokens: the first `kept`, and of all others the last."""
    surplus = max(0, len(tokens) - size)
    return tokens[:kept] + tokens[kept + surplus :]


def _marked(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and for each whether the template marks it as the assistant's."""
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    got = _templated(tokenizer, messages, **options)
    return list(got["input_ids"]), [bool(m) for m in got["assistant_masks"]]


def _found(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and for each whether it overlaps what an assistant's turn adds to the text."""
    whole: str = _templated(tokenizer, messages, tokenize=False)
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [(start, end) for start, end in (_span(tokenizer, messages, n, whole) for n in turns) if start < end]
    got = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets: list[tuple[int, int]] = got["offset_mapping"]
    return list(got["input_ids"]), [_overlaps(offset, spans) for offset in offsets]


def _span(tokenizer: Any, messages: Sequence[Mapping[str, str]], n: int, whole: str) -> tuple[int, int]:
    """Where turn n stands in the text of the whole conversation, as characters from and to."""
    before = _templated(tokenizer, messages[:n], tokenize=False, add_generation_prompt=True) if n else ""
    after = _templated(tokenizer, messages[: n + 1], tokenize=False)
    return _shared(before, whole), _shared(after, whole)


def _overlaps(offset: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
    """Does a token with this offset have a character in one of the spans?"""
    a, b = offset
    return any(a < end and b > start for start, end in spans)


def _shared(a: str, b: str) -> int:
    """The length of the common start of two strings."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _templated(tokenizer: Any, messages: Sequence[Mapping[str, str]], **options: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template([dict(m) for m in messages], **options)
    except TemplateError as e:
        roles = ", ".join(m["role"] for m in messages)
        raise DataError(f"the model's chat template refuses a conversation of {roles}: {e}") from e


def _label(encoder: Encoder, rows: Rows) -> Iterator[Iterable[Example]]:
    *texts, label = encoder.schema.columns
    columns = [[row[name] for row in rows] for name in texts]
    got = encoder.processor(*columns, truncation=True, max_length=encoder.max_length)
    classes = encoder.schema.classes()
    for i, row in enumerate(rows):
        inputs = {key: torch.tensor(values[i]) for key, values in got.items()}
        yield [inputs | {"labels": torch.tensor(classes[str(row[label])])}]


def _image(encoder: Encoder, rows: Rows) -> Iterator[Iterable[Example]]:
    image, label = encoder.schema.columns
    classes = encoder.schema.classes()
    for start in range(0, len(rows), IMAGES):
        part = [rows[i] for i in range(start, min(start + IMAGES, len(rows)))]
        pixels = encoder.processor(images=[_picture(row[image]) for row in part], return_tensors="pt")["pixel_values"]
        for x, row in zip(pixels, part, strict=True):
            yield [{"pixel_values": x.clone(), "labels": torch.tensor(classes[str(row[label])])}]


def _picture(value: Any) -> Any:
    """An image in RGB, from the name of a file, the bytes of one, or an open image."""
    from PIL import Image

    source = value
    if isinstance(value, Mapping):  # as datasets keeps an image that it has not decoded
        source = BytesIO(value["bytes"]) if value.get("bytes") else value.get("path")
    try:
        return (source if isinstance(source, Image.Image) else Image.open(source)).convert("RGB")
    except (OSError, ValueError, TypeError, AttributeError) as e:
        named = value if isinstance(value, str) else f"a {type(value).__name__}"
        raise DataError(
            f"{named} cannot be read as an image ({e}); a file is looked for from the current folder"
        ) from e


def _tokens(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    got: list[list[int]] = encoder.processor(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return got


def _ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that open and close a text, each as a list of one or none."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [] if bos is None else [bos], [] if eos is None else [eos]


def _causal(ids: list[int], labels: list[int]) -> Iterator[Example]:
    """Yield an example for a language model, unless it has nothing to learn: the first token is never predicted."""
    if any(label != IGNORED for label in labels[1:]):
        yield {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.ones(len(ids), dtype=torch.int64),
            "labels": torch.tensor(labels),
        }


KINDS: dict[str, Callable[[Encoder, Rows], Iterator[Iterable[Example]]]] = {  # of every row, its examples
    "text": _text,
    "response": _response,
    "chat": _chat,
    "label": _label,
    "image": _image,
}


Records = Sequence[Sequence[Example]]  # a record may be several examples, as a long text is several blocks, or none
