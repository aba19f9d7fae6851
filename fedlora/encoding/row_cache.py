"""Rows that were encoded before, found again by their content: in this process, by another one, or in an earlier run.

A row's examples follow from its content, the tokenizer, the settings and the code that encodes. The last three name a
folder, of which the content of a row names a vector, so that it is encoded once, whoever has it and however rows are
dealt. What a run cannot keep it encodes into memory.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora import data
from fedlora.data.rows import Rows, row_hashes, take
from fedlora.data.schema import Schema
from fedlora.environment import user_cache
from fedlora.storage.vector_cache import FAILURES, Place, VectorCache, trim

from .examples import EncodedRow
from .input_limits import InputLimits
from .packed import in_memory, pack, unpacked_rows
from .seq2seq import DecoderInputs

AT_ONCE = 1024  # rows that are encoded at a time, and lie in memory as tensors until they are packed
KEY = 16  # bytes of a row's hash
MOST = 10 * 2**30  # bytes of all caches in one folder
LIBRARIES = ("transformers", "tokenizers", "jinja2")  # by which texts become tokens
Encode = Callable[[Rows], Iterable[EncodedRow]]  # rows, in their order
log = logging.getLogger("fedlora")


@dataclass(frozen=True, eq=False)
class EncodingRules:
    """All that a row's examples follow from, beside the row."""

    processor: Any
    schema: Schema
    max_length: int
    limits: InputLimits
    decoder_inputs: DecoderInputs | None

    @cached_property
    def digest(self) -> str:
        """The hash of these; empty for a tokenizer that cannot be known again."""
        tokenizer = _tokenizer(self.processor)
        shift = self.decoder_inputs(torch.tensor([5, 6])).tolist() if self.decoder_inputs else []
        parts = (tokenizer, repr(self.schema), self.max_length, repr(self.limits), shift, _code())
        return sha256(repr(parts).encode(errors="surrogatepass")).hexdigest() if tokenizer else ""


def _tokenizer(processor: Any) -> str:
    """All by which a tokenizer makes tokens of texts, as text; empty for one that is not written in Rust."""
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is None:
        return ""
    backend.no_truncation()  # which the last call has set, as the next one will
    backend.no_padding()
    names = ("chat_template", "special_tokens_map", "truncation_side", "model_input_names", "split_special_tokens")
    settings = [str(getattr(processor, name, None)) for name in names]
    return json.dumps([type(processor).__qualname__, *settings, backend.to_str()])


@cache
def _code() -> str:
    """The hash of the code that makes examples of rows, and the versions of the libraries that it uses."""
    folders = (Path(__file__).parent, *map(Path, data.__path__))
    sources = (path.read_bytes() for folder in folders for path in sorted(folder.glob("*.py")))
    return sha256(b"".join([*sources, *(version(name).encode() for name in LIBRARIES)])).hexdigest()


class RowCache:
    """The rows that are kept in a folder, by the rules that they were encoded by; without a folder none are."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._open: dict[str, VectorCache | None] = {}  # by the digest of rules; none: what failed is left alone

    def encoded(self, rules: EncodingRules, rows: Rows, encode: Encode) -> Sequence[EncodedRow]:
        """The rows, encoded where they are not kept. What `encode` raises comes out as it is."""
        if (kept := self._kept(rules.digest) if self._folder else None) is not None:
            try:
                return _kept_rows(kept, rows, encode, rules.schema.columns)
            except FAILURES as e:
                self._leave_alone(rules.digest, e)
        return in_memory([pack(row) for part in _parts(rows) for row in encode(part)])

    def _kept(self, digest: str) -> VectorCache | None:
        """The vectors that were made by these rules; none where they cannot be kept."""
        if digest and digest not in self._open:
            try:
                self._open[digest] = VectorCache(Path(self._folder or "") / digest)
                trim(Path(self._folder or ""), MOST)
            except FAILURES as e:
                self._leave_alone(digest, e)
        return self._open.get(digest)

    def _leave_alone(self, digest: str, why: Exception) -> None:
        """Keep nothing by these rules from here on."""
        self._open[digest] = None
        remedy = "remove that folder, or set data.cache = off"
        log.warning("encoded rows are not kept in %s (%s); %s", self._folder, why, remedy)


def _parts(rows: Rows) -> Iterator[Rows]:
    """Yield the rows, some at a time."""
    return (take(rows, range(i, min(i + AT_ONCE, len(rows)))) for i in range(0, len(rows), AT_ONCE))


def _kept_rows(kept: VectorCache, rows: Rows, encode: Encode, columns: Sequence[str]) -> Sequence[EncodedRow]:
    """The rows in a cache, to which those are added that are not there yet. Raises `FAILURES`."""
    parts = [np.array(_places(kept, part, encode, columns), np.int64) for part in _parts(rows)]  # (rows, 2) each
    starts, sizes = np.concatenate(parts).T
    return unpacked_rows(kept.numbers, starts, sizes)


def _places(kept: VectorCache, rows: Rows, encode: Encode, columns: Sequence[str]) -> list[Place]:
    """Where the vector of each row lies, once it is there."""
    keys = [key[:KEY] for key in row_hashes(rows, columns)]
    places = kept.find(keys)
    new = {key: i for i, key in enumerate(keys) if key not in places}
    if new:
        vectors = map(pack, encode(take(rows, list(new.values()))))
        places |= kept.add(dict(zip(new, vectors, strict=True)))
    return [places[key] for key in keys]


def user_folder() -> Path:
    """Where a user's encoded rows are kept: FEDLORA_CACHE/tokens, or what the desktop has for caches."""
    return user_cache() / "tokens"
