"""What a run is about to do, told before it starts: its data, their tokens or images, its adapter, what looks wrong.

A deployed server tells of its own data, and a client of its own, on its own machine alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fedlora.data.image_summary import ImageSummary, summarise_images
from fedlora.data.rows import Rows, take
from fedlora.data.sources import data_files
from fedlora.data.summary import DataSummary
from fedlora.encoding.client_data import ClientData
from fedlora.encoding.examples import Example
from fedlora.encoding.lazy import examples_of
from fedlora.errors import DataError, ModelError, cut
from fedlora.log_lines import counted
from fedlora.models.adapted_modules import Coverage
from fedlora.models.model import Model
from fedlora.sections import DataConfig

MOST_ROWS = 5_000  # that are looked at as tokens; of more, a sample that is spread evenly
MOST_CHARACTERS = 500_000  # in them, about: half a second of a tokenizer's time
FEWEST_ROWS = 20  # of every client, while there are no more characters in them
MOST_CLIENTS = 1_000  # that are looked at; of more, a sample that is spread evenly
MUCH = 0.1  # share of the rows above which it is a warning that they are cut, or have nothing to learn
FEW_CLASSES = 20  # that are told one by one


@dataclass(frozen=True)
class TokenSummary:
    """What became of rows as tokens: of each client's training rows, and on a deployed server of its evaluation's."""

    of: int  # rows that there are
    rows: tuple[int, ...]  # of each client, that were looked at
    unlearned: tuple[int, ...]  # of these, the rows with nothing to learn within the longest example
    median: int  # tokens of a row, before anything was cut
    longest: int
    cut: int  # rows of which not all tokens fit; none of texts, which are split
    unlearned_turns: int  # of the assistant, which a chat template leaves out or writes otherwise
    unknown: float = 0.0  # share of the tokens that stand for what the tokenizer does not know


@dataclass(frozen=True)
class Preview:
    """What one side of a run is about to do, in figures and words."""

    data: DataSummary
    tokens: TokenSummary | None  # None of images, and where there is nothing to train on
    images: ImageSummary | None  # None of texts
    adapter: Coverage
    max_length: int
    notes: tuple[str, ...]  # of the model: what it takes, and how it is taken
    warnings: tuple[str, ...]  # a sentence each
    clients: tuple[str, ...] = ()  # what each client is called, of those whose rows are looked at

    def record(self) -> dict[str, Any]:
        """All of it as `inputs.json` has it."""
        return asdict(self)

    def lines(self) -> list[str]:
        """All of it for people, a line each; what looks wrong comes last."""
        notes = (f"note: {note}" for note in self.notes)
        return [*self._facts(), *notes, *(f"warning: {warning}" for warning in self.warnings)]

    def _facts(self) -> Iterator[str]:
        yield _size_line(self.data)
        yield _column_line(self.data)
        if self.data.classes:
            yield _class_line(self.data.classes)
        if self.data.numbers:
            lowest, mean, highest = self.data.numbers
            yield f"numbers to learn: from {lowest:g} to {highest:g}, mean {mean:.4g}"
        if self.tokens:
            yield _token_line(self.tokens, self.data, self.max_length)
        if self.images:
            yield self.images.line()
        yield _adapter_line(self.adapter)


def preview(data: DataSummary, model: Model, clients: Sequence[ClientData], names: Sequence[str]) -> Preview:
    """The preview of one side of a run.

    `clients` are those whose rows are looked at, with their `names`. Raises `DataError` where no row has anything to
    learn, or the model cannot take the images.
    """
    tokens = images = None
    if model.schema.kind == "image":
        images = summarise_images(model.schema, [client.train_rows for client in clients], model.processor)
        _try_first_image(model, clients)
    elif clients:
        tokens = _tokens(model, [client.train_rows for client in clients])
    max_length = model.encoder.max_length
    sizes = [len(client.train_rows) for client in clients]
    found = [*_token_warnings(tokens, dict(zip(names, sizes, strict=True)), max_length)] if tokens else []
    warnings = (*data.warnings, *found, *(images.warnings() if images else ()))
    return Preview(data, tokens, images, model.coverage, max_length, model.notes, warnings, tuple(names))


def _try_first_image(model: Model, clients: Sequence[ClientData]) -> None:
    """Raise `ModelError` where the model cannot take what its own image processor makes of the first image."""
    rows = next((client.train_rows for client in clients if len(client.train_rows)), None)
    if rows is None:
        return
    batch = model.encoder.collate(model.encoder(take(rows, [0])))
    try:
        with torch.no_grad():
            model.logits(batch)
    except (ValueError, RuntimeError) as e:  # every model checks its images itself
        shape = " x ".join(map(str, batch["pixel_values"].shape[1:]))
        raise ModelError(
            f"the model refuses an image of {shape}, as its image processor makes it: {cut(str(e), 120)}; give images "
            "of the size that it takes, or set do_resize and size in its preprocessor_config.json"
        ) from e


def client_names(data: DataConfig, clients: int) -> list[str]:
    """What each client of a simulation is called: by its number, and its file if each has one."""
    files: Sequence[Path] = data_files(data.path) if data.partition in ("auto", "files") else ()
    own = [f" ({path.name})" for path in files] if len(files) == clients else [""] * clients
    return [f"client {i}{file}" for i, file in enumerate(own)]


def _tokens(model: Model, clients: Sequence[Rows]) -> TokenSummary:
    """What becomes of the clients' rows as tokens, found in a sample of them if they are many."""
    samples = _samples(clients, model.schema.columns)
    every = iter(model.encoder.encoded([*chain.from_iterable(samples)]))
    encoded = [[*islice(every, len(sample))] for sample in samples]
    rows = [*chain.from_iterable(encoded)]
    lengths = [row.tokens for row in rows] or [0]
    splits = model.schema.kind == "text"  # then no more than the last few tokens of a row are left out
    return TokenSummary(
        of=sum(map(len, clients)),
        rows=tuple(map(len, encoded)),
        unlearned=tuple(sum(not row.examples for row in of_client) for of_client in encoded),
        median=int(median(lengths)),
        longest=max(lengths),
        cut=0 if splits else sum(row.cut > 0 for row in rows),
        unlearned_turns=sum(row.unlearned_turns for row in rows),
        unknown=_unknown(model.encoder.processor, examples_of(rows)),
    )


def _unknown(tokenizer: Any, examples: Sequence[Example]) -> float:
    """The share of the tokens that the tokenizer has in place of what it does not know; 0 if it has none for that."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        return 0.0  # of GPT-2 it is the end token too
    ids = [t for example in examples for key, t in example.items() if key.endswith("input_ids")]
    return sum(int((t == unknown).sum()) for t in ids) / max(1, sum(t.numel() for t in ids))


def _samples(clients: Sequence[Rows], columns: Sequence[str]) -> list[Rows]:
    """The rows of each client that are looked at; none of some clients, where there are very many."""
    looked_at = {i * len(clients) // MOST_CLIENTS for i in range(MOST_CLIENTS)}
    chosen = [rows if len(clients) <= MOST_CLIENTS or i in looked_at else () for i, rows in enumerate(clients)]
    some = [*chain.from_iterable(_sample(rows, 2) for rows in chosen)]
    characters = sum(len(str(row.get(name, ""))) for row in some for name in columns) / max(1, len(some))
    affordable = MOST_CHARACTERS / max(characters, 1.0)
    share = min(MOST_ROWS, affordable) / max(1, sum(map(len, chosen)))
    fewest = max(1, min(FEWEST_ROWS, int(affordable / max(1, sum(map(bool, map(len, chosen)))))))
    return [_sample(rows, max(fewest, int(share * len(rows)))) for rows in chosen]


def _sample(rows: Rows, size: int) -> Rows:
    """At most so many of the rows, evenly spread."""
    count = len(rows)
    return take(rows, [i * count // size for i in range(size)]) if count > size else rows


def _token_warnings(found: TokenSummary, sizes: Mapping[str, int], max_length: int) -> Iterator[str]:
    """Yield a sentence for whatever looks wrong in the rows as tokens; `sizes` has how many each client has.

    Raises `DataError` where none can be learned.
    """
    rows, unlearned = sum(found.rows), sum(found.unlearned)
    if rows and unlearned == rows:
        raise DataError(
            f"of {counted(rows, 'row')} none has a token to learn within model.max_length = {max_length}; raise it, or "
            "look whether the texts or answers are empty"
        )
    for (name, size), count, of in zip(sizes.items(), found.unlearned, found.rows, strict=True):
        if of and count == of >= min(size, FEWEST_ROWS):
            yield f"{name} will fail its rounds: of {counted(of, 'row')} none has a token to learn within {max_length}"
    if unlearned > MUCH * rows:
        yield f"{unlearned} of {counted(rows, 'row')} have nothing to learn within model.max_length = {max_length}"
    if found.cut > MUCH * rows:
        yield (
            f"{found.cut} of {counted(rows, 'row')} are cut at model.max_length = {max_length}, and the longest has "
            f"{found.longest:,} tokens"
        )
    if found.unknown > MUCH:
        yield f"{found.unknown:.0%} of the tokens are of what the tokenizer does not know: is the model for such texts?"
    if found.unlearned_turns:
        yield f"{counted(found.unlearned_turns, 'turn')} of the assistant are not learned, as the chat template has it"


def _size_line(data: DataSummary) -> str:
    """How many rows there are, and how they are spread over the clients."""
    parts = []
    if data.sizes:
        rows = f"{counted(sum(data.sizes), 'training row')} of {counted(len(data.sizes), 'client')}"
        spread = f" (smallest {min(data.sizes):,}, median {median(data.sizes):,.0f}, largest {max(data.sizes):,})"
        parts.append(rows + (spread if len(data.sizes) > 1 else ""))
    if any(data.heldout):
        parts.append(f"{sum(data.heldout):,} that clients hold out")
    parts.append(f"{data.evaluation:,} for the evaluation" if data.evaluation else "none for the evaluation")
    return f"data: {', '.join(parts)}"


def _column_line(data: DataSummary) -> str:
    """The columns that are used, and those with text that are not."""
    left = f"; not used: {', '.join(data.left)}" if data.left else ""
    return f"columns used: {', '.join(data.used)} ({data.kind}){left}"


def _shown(name: str) -> str:
    """A name, in quotation marks where blanks stand at an end of it."""
    return name if name == name.strip() else f'"{name}"'


def _class_line(classes: Mapping[str, Sequence[int]]) -> str:
    """The classes with their counts; of many, how few and how many rows they have."""
    counts = {name: sum(of_clients) for name, of_clients in classes.items()}
    if not any(counts.values()):
        return f"classes: {', '.join(map(_shown, counts))}"
    if len(counts) <= FEW_CLASSES:
        return "classes: " + ", ".join(f"{_shown(name)} {count:,}" for name, count in counts.items())
    return f"classes: {len(counts)}, of {min(counts.values()):,} to {max(counts.values()):,} rows"


def _token_line(tokens: TokenSummary, data: DataSummary, max_length: int) -> str:
    """How long the rows are, and how many are cut or have nothing to learn."""
    rows, unlearned = sum(tokens.rows), sum(tokens.unlearned)
    sample = "" if rows == tokens.of else f" (of a sample of {counted(rows, 'row')})"
    cut = "longer texts are split" if data.kind == "text" else f"{counted(tokens.cut, 'row')} cut"
    nothing = f"{counted(unlearned, 'row')} with nothing to learn"
    return (
        f"tokens per example{sample}: median {tokens.median:,}, longest {tokens.longest:,}; at most {max_length:,}, "
        f"{cut}; {nothing}"
    )


def _adapter_line(found: Coverage) -> str:
    """The modules that are adapted, in how many layers, and those that were asked for and are left out."""
    adapted = ", ".join(f"{name} ({count})" for name, count in found.adapted.items())
    layers = f" in {found.layers} of {found.of_layers} layers" if found.of_layers else ""
    heads = f"; trained whole: {', '.join(found.heads)}" if found.heads else ""
    left = "".join(f"; left out: {name} ({count}: {reason})" for name, (reason, count) in found.left_out.items())
    return f"adapter on {adapted}{layers}{heads}{left}"
