"""The model card of what a run delivers: `README.md` as the hub reads it, with metadata for search and text for people.

It says what is public of a run anyway: the base by its hub id or fingerprint, the strategy, settings without paths, the
global model's figures, and what was promised and spent of privacy. Nothing of single clients is in it. The text is
`model_card.md.jinja` beside this file.
"""

import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from shutil import rmtree
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined, Template

from fedlora.config import Config
from fedlora.data.sources import hub_name
from fedlora.log_lines import counted, escaped
from fedlora.metrics import headline
from fedlora.models.peft_files import CARD
from fedlora.models.source import BaseName
from fedlora.storage.files import write_durably
from fedlora.strategy import CatalogueEntry, Strategy, innermost

from .directory import RunDirectory, newest
from .privacy_report import facts_of
from .privacy_statement import final_delta
from .setup import RunSetup

TEMPLATE = Path(__file__).parent / "model_card.md.jinja"
PARTS = ("fedlora", "peft", "transformers", "torch")
MAX_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values of vLLM's --max-lora-rank
METRICS = {"macro_f1": "f1", "micro_f1": "f1", "token_accuracy": "accuracy", "subset_accuracy": "accuracy"}
METRICS |= {"rouge_l": "rouge", "token_f1": "f1", "pearson": "pearsonr", "spearman": "spearmanr"}  # else the own name
PIPELINES = {"label": "text-classification", "image": "image-classification"}  # by kind of data; else text generation
CLASSES = {"label": "AutoModelForSequenceClassification", "image": "AutoModelForImageClassification"}
Form = Literal["adapter", "merged", "gguf"]


@dataclass(frozen=True)
class CardFacts:
    """What the card of any model of one run is made of."""

    config: Config
    base: BaseName
    size: int  # numbers in the base
    architecture: str  # the base's class in transformers
    modules: tuple[str, ...]  # last parts of the names of those that are adapted
    kind: str  # of data, as in `Schema`
    is_encoder_decoder: bool
    classes: tuple[str, ...]  # in the order of the model's outputs
    title: str  # of the strategy
    paper: str
    deployed: bool  # across machines
    before: Mapping[str, float]
    after: Mapping[str, float]
    rounds: int  # finished
    epsilon: float | None  # the most that any client has spent
    exactness: float | None  # the largest distance of a round
    privacy: Mapping[str, Any]  # as `privacy.json`


def card_facts(setup: RunSetup, strategy: Strategy[Any], run: RunDirectory) -> CardFacts:
    """The facts of a run as it stands, without its model, so that its memory can be had back."""
    records, model = run.records(), setup.model
    entry = CatalogueEntry("", type(innermost(strategy)))
    distances = [record["exactness"] for record in records if "exactness" in record]
    return CardFacts(
        config=setup.config,
        base=model.base_name,
        size=model.size,
        architecture=type(model.net.get_base_model()).__name__,
        modules=tuple(sorted({name.rpartition(".")[2] for name in model.adapted})),
        kind=model.schema.kind,
        is_encoder_decoder=bool(model.encoder.decoder_inputs),
        classes=model.schema.class_order,
        title=entry.title,
        paper=entry.paper,
        deployed=(run.path / "flower").is_dir(),
        before=records[0].get("before", {}) if records else {},
        after=newest(records, "eval").get("eval", {}),
        rounds=len(records),
        epsilon=newest(records, "epsilon").get("epsilon"),
        exactness=max(distances, default=None),
        privacy=facts_of(run),
    )


def write_card(facts: CardFacts, folder: Path, form: Form = "adapter", *, place: str = "", note: str = "") -> None:
    """Write the card of the model in `folder`, which others find at `place`, a hub id, or else wherever they put it.

    With a `note` the model is not the run's global one, whose figures are then left out: the note says what it is.
    Raises `OSError`.
    """
    data = _metadata(facts, form, has_figures=not note)
    text = _template().render(
        f=facts,
        form=form,
        note=note,
        place=place or "PATH/TO/THIS/FOLDER",
        rank=_rank(folder) if form == "adapter" else 0,
        max_lora_rank=_max_lora_rank(_rank(folder)) if form == "adapter" else 0,
        auto_class=_auto_class(facts),
        settings=dict(_settings(facts)),
        headline=headline(facts.after)[0] if facts.after else "",
        promised=_privacy_lines(facts),
        versions={name: version(name) for name in PARTS} | {"python": platform.python_version()},
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
    if (folder / CARD).is_dir():  # damage
        rmtree(folder / CARD)
    write_durably(folder / CARD, f"{card.content.rstrip()}\n".encode())


@cache
def _template() -> Template:
    env = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True)
    env.filters |= {"cell": _cell, "figure": lambda x: f"{x:.4g}", "literal": _literal}
    return env.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _metadata(facts: CardFacts, form: Form, *, has_figures: bool) -> ModelCardData:
    """What the hub reads of the card. A base without hub id is named in the text alone: the hub takes no other name."""
    data, results = facts.config.data, [*_results(facts)] if has_figures else []
    datasets = {hub_name(data.path), hub_name(data.eval)} - {""}
    return ModelCardData(
        base_model=facts.base.hub_id or None,
        library_name={"adapter": "peft", "merged": "transformers"}.get(form),
        pipeline_tag=_pipeline(facts),
        tags=[*_tags(facts, form), "federated-learning", "fedlora"],
        datasets=sorted(datasets) or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=f"{facts.title} adapter of {facts.base}" if results else None,
        eval_results=results or None,
    )


def _tags(facts: CardFacts, form: Form) -> Iterator[str]:
    """Yield the hub's tags of the form that the model is in."""
    if form == "merged":
        return
    if facts.base.hub_id:
        yield f"base_model:adapter:{facts.base.hub_id}"
    yield facts.config.lora.kind
    if form == "gguf":
        yield form


def _results(facts: CardFacts) -> Iterator[EvalResult]:
    """Yield each figure of the global model on the held-out examples, as the hub's model-index has it."""
    dataset = hub_name(facts.config.data.eval or facts.config.data.path)
    for name, value in facts.after.items():
        yield EvalResult(
            task_type=_pipeline(facts),
            dataset_type=dataset or "private",
            dataset_name=dataset or "held-out examples of the run",
            metric_type=METRICS.get(name, name),
            metric_name=name,
            metric_value=float(f"{value:.6g}"),
        )


def _pipeline(facts: CardFacts) -> str:
    return PIPELINES.get(facts.kind, "text2text-generation" if facts.is_encoder_decoder else "text-generation")


def _auto_class(facts: CardFacts) -> str:
    """The class of transformers that opens the base."""
    return CLASSES.get(facts.kind, f"AutoModelFor{'Seq2SeqLM' if facts.is_encoder_decoder else 'CausalLM'}")


def _rank(folder: Path) -> int:
    """The rank of the adapter in a folder."""
    return int(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"])


def _max_lora_rank(rank: int) -> int:
    """The least value of vLLM's --max-lora-rank with which it takes this adapter; 0 where it takes none so large."""
    return next((most for most in MAX_LORA_RANKS if rank <= most), 0)


def _settings(facts: CardFacts) -> Iterator[tuple[str, str]]:
    """Yield what a reader asks about the training, in words; no setting that names a path is among it."""
    c = facts.config
    options = ", ".join(f"{key} = {value}" for key, value in c.option.items())
    name = f"{facts.title} ({Path(c.strategy).name}{f': {options}' if options else ''})"
    yield "strategy", name + (f", {facts.paper}" if facts.paper else "")
    where = "on machines of their own" if facts.deployed else "simulated"
    yield "clients", f"{c.clients:,}, {c.cohort:,} a round, {where}"
    yield "rounds", f"{facts.rounds:,} of {c.rounds:,}"
    rank = c.lora.ranks or c.lora.rank
    yield "adapter in training", f"{c.lora.kind}, rank {rank}, alpha {c.lora.alpha:g}, init {c.lora.init}"
    length = counted(c.train.steps, "step") if c.train.steps else f"{c.train.epochs:g} times through its data"
    batches = f"{length} in batches of {c.train.batch_size}"
    yield "local training", f"{batches}, {c.train.optimizer}, rate {c.train.lr:g} ({c.train.schedule})"
    yield "base in training", f"{c.model.dtype}, quantize {c.model.quantize}"
    yield "seed", str(c.seed)
    if facts.exactness is not None:
        yield "distance from the weighted mean of the clients' models, at most", f"{facts.exactness:.2g}"


def _privacy_lines(facts: CardFacts) -> list[str]:
    """What was promised and spent of privacy, a sentence each."""
    found = facts.privacy
    if not found.get("level"):
        masked = "Secure aggregation hid each client's update from the server. " if found else ""
        return [f"{masked}No differential privacy: what single examples said may be recoverable from the weights."]
    of = "all data of one client" if found["level"] == "client" else "one record of one client"
    spent = "nothing was charged" if facts.epsilon is None else f"epsilon {facts.epsilon:.3g}"
    said = [f"Differential privacy of {of}: {spent} at delta {final_delta(found):.2g}, the most that any client spent."]
    if found["seeded"]:
        said.append("**NOT PRIVATE**: noise and samples came from the run's seed, and whoever knows it can undo them.")
    if found["metrics"]:
        said.append("Losses and scores that clients told are not covered by it.")
    return said


def _cell(text: str) -> str:
    """A text as it may stand in a cell of a table: on one line, with nothing that Markdown or HTML would read."""
    return "".join(f"&#{ord(c)};" if c in "|<>&`*[]\\" else c for c in escaped(text))


def _literal(text: str) -> str:
    r"""A text as a literal of Python that ends no block of code: `"a\u0060"`."""
    return json.dumps(text).replace("`", "\\u0060")
