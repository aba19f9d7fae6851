"""Which models' records can be told apart, in the variants that take too long for every test run, as a table.

    python -m tests.support.matrix [NAME ...]      writes docs/privacy_matrix.md, or shows the named rows (minutes)

tests/privacy/test_matrix.py holds the first four columns at every test run.
"""

import sys
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from fedlora.encoding.encoder import Example
from fedlora.errors import PrivacyError
from fedlora.privacy.per_sample_gradients import (
    Gradients,
    LoopedGradients,
    OnePassGradients,
    OpacusGradients,
    PerExample,
)
from tests.support.zoo import ROWS, Learner, Row, apart, build, examples, quiet

Cell = Callable[[Row, type[PerExample]], float]


def taken(
    engine: type[PerExample], learner: Learner, parameters: Sequence[nn.Parameter], some: list[Example]
) -> Gradients:
    """Every example's gradients, by this engine."""
    with engine(learner, parameters) as gradients:
        return gradients(some)


def sides(letters: str) -> Cell:
    """These sides, trained in float32 as they are."""

    def one(row: Row, engine: type[PerExample]) -> float:
        if "H" in letters and not row.head:
            raise NotImplementedError
        learner = build(row)
        return compared(learner, learner.set_trainable(letters), row, engine)

    return one


def compared(learner: Learner, parameters: Sequence[nn.Parameter], row: Row, engine: type[PerExample]) -> float:
    wanted = taken(LoopedGradients, learner, parameters, examples(row))
    return apart(taken(engine, learner, parameters, examples(row)), wanted)


def dropout(rates: dict[str, float]) -> Cell:
    """One pass over the batch for every example, all with the same dropout, and the gradient of its loss alone."""

    def one(row: Row, engine: type[PerExample]) -> float:
        learner = build(row, **rates)
        parameters, some = learner.set_trainable("ABH"), examples(row)
        rows = []
        for i in range(len(some)):
            torch.manual_seed(7)
            loss = learner.losses(learner.encoder.collate(some))[i]
            rows.append(torch.autograd.grad(loss, parameters, materialize_grads=True))
        torch.manual_seed(7)
        return apart(taken(engine, learner, parameters, some), [torch.stack(g) for g in zip(*rows, strict=True)])

    return one


def checkpoints(reentrant: bool) -> Cell:
    """Activations thrown away and computed again; the reference keeps them."""

    def one(row: Row, engine: type[PerExample]) -> float:
        learner = build(row)
        parameters = learner.set_trainable("ABH")
        wanted = taken(LoopedGradients, learner, parameters, examples(row))
        learner.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant and row.task:
            learner.net.enable_input_require_grads()
        learner.asks = reentrant
        return apart(taken(engine, learner, parameters, examples(row)), wanted)

    return one


def bf16(row: Row, engine: type[PerExample]) -> float:
    """The base in 16 bits, and the adapter in 32, as PEFT keeps it: rounding differs with a batch's padding."""
    learner = build(row, dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for side in "AB" for p in learner.sides[side])
    return compared(learner, learner.set_trainable("ABH"), row, engine)


def compiled(row: Row, engine: type[PerExample]) -> float:
    """Traced by torch.compile, within the engine's block."""
    learner = build(row)
    parameters = learner.set_trainable("ABH")
    wanted = taken(LoopedGradients, learner, parameters, examples(row))
    torch.compiler.reset()
    learner.call = torch.compile(learner.net, backend="aot_eager")
    return apart(taken(engine, learner, parameters, examples(row)), wanted)


COLUMNS: dict[str, Cell] = {
    "A and B": sides("AB"),
    "B": sides("B"),
    "A": sides("A"),
    "A, B, head": sides("ABH"),
    "dropout": dropout({"dropout": 0.1}),
    "LoRA's dropout": dropout({"lora_dropout": 0.1}),
    "checkpoints, re-entrant": checkpoints(True),
    "checkpoints, not": checkpoints(False),
    "bf16": bf16,
    "compiled": compiled,
}
ENGINES: dict[str, type[PerExample]] = {
    "One pass (`dp.engine = lora`)": OnePassGradients,
    "Opacus's hooks": OpacusGradients,
}
HEAD = """# Which models' records can be told apart

```bash
python -m tests.support.matrix
```

Largest error of single examples' gradients against autograd on one example at a time, over the largest number of the
tensor. {date}, on a CPU;
{versions}.

Tiny random models with PEFT's LoRA, five examples of different lengths padded to one, B not zero. In float32 rounding
is up to about 3e-06; in the column *bf16* (base in bfloat16, adapter in float32) it is up to some hundredths, as a
batch is rounded otherwise than one example. The columns from *dropout* on train the head too, where there is one.
With dropout, the reference runs the whole batch once for every example, under the same masks.

**refuses**: a `PrivacyError` that names the module, which the preflight of a run raises before a record is looked at.
**fails**: an error of the library's own. -: there is no head, or transformers or PEFT does not offer it. One example
at a time (`dp.engine = one`), the reference, is right for every row, and slow.
"""


def cell(row: Row, engine: type[PerExample], column: Cell) -> str:
    try:
        return f"{column(row, engine):.0e}"
    except PrivacyError:
        return "refuses"
    except Exception as e:  # whatever a library does not offer
        return "-" if _lacks(e) else f"fails: {type(e).__name__}"


def _lacks(e: Exception) -> bool:
    said = ("does not support activation checkpointing", "does not work with lora_dropout")
    return isinstance(e, NotImplementedError) or any(words in str(e) for words in said)


def table(engine: type[PerExample], rows: dict[str, Row]) -> str:
    lines = ["| model | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, row in rows.items():
        found = [cell(row, engine, column) for column in COLUMNS.values()]
        print(name, *found, sep=" | ", flush=True)
        lines.append("| " + " | ".join([name, *found]) + " |")
    return "\n".join(lines)


def main(names: Sequence[str]) -> None:
    rows = {name: row for name, row in ROWS.items() if not names or name in names}
    with quiet():
        parts = [f"## {title}\n\n{table(engine, rows)}\n" for title, engine in ENGINES.items()]
    if names:
        return
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "opacus"))
    said = HEAD.format(date=f"{date.today():%-d %B %Y}", versions=versions)
    Path("docs", "privacy_matrix.md").write_text("\n".join([said, *parts]))


if __name__ == "__main__":
    main(sys.argv[1:])
