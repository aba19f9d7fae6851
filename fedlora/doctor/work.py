"""A client's work: its data, the base model by its fingerprint, and one training step, of which nothing stays."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import psutil

from fedlora.client import training
from fedlora.client.training import TrainingTask
from fedlora.config import Config
from fedlora.data import federated
from fedlora.data.summary import summarise
from fedlora.estimates.room import words
from fedlora.jobs import Job
from fedlora.log_lines import counted
from fedlora.lora import LoRA
from fedlora.privacy.record_level import record_level_dp
from fedlora.run.setup import ClientSetup, for_client

from .findings import Finding, ok, warning, wrong

FEW_CLASSES = 8  # that are named


@dataclass(frozen=True)
class Site:
    """A client's own settings, and those of the run as far as they are known here."""

    id: int
    mine: Mapping[str, Any]
    run: Mapping[str, Any]
    config: Config  # of both
    fingerprint: str = ""  # of the base model as it was agreed; none: it is not known here


def data(site: Site) -> Iterator[Finding]:
    """Yield what the client's data are taken for: rows, columns and classes."""
    config = site.config
    rows = federated.client_data(
        config.data, config.model.task, id=site.id, clients=config.clients, seed=config.seed, key=None
    )
    summary = summarise(rows)
    classes = [f"{name} {sum(count)}" for name, count in summary.classes.items()]
    more = [f"{len(classes) - FEW_CLASSES} more"] if len(classes) > FEW_CLASSES else []
    shown = ", ".join([*classes[:FEW_CLASSES], *more])
    used = f"columns {', '.join(summary.used)}" + (f"; not used: {', '.join(summary.left)}" if summary.left else "")
    yield ok("data", f"{counted(sum(summary.sizes), 'training row')}, {used}" + (f"; classes {shown}" if shown else ""))
    yield from (warning("data", text) for text in summary.warnings)


def setup_of(site: Site) -> ClientSetup:
    """The client's pieces of the run, as its worker makes them; nothing is written."""
    return for_client(site.run, site.mine, site.id)


def model(site: Site, setup: ClientSetup) -> Iterator[Finding]:
    """Yield whether the base model is the agreed one, and what its tokenizer makes of the rows."""
    own, name = setup.model.fingerprint, site.config.model.path or "the model that comes with fedlora"
    if site.fingerprint and own != site.fingerprint:
        yield wrong(
            "model",
            f"{name} has the fingerprint {own[:12]}, and {site.fingerprint[:12]} was agreed; get the same files, at "
            "the same revision and model.dtype, as the server has",
        )
    else:
        agreed = "as agreed" if site.fingerprint else "compare it with the other parties'"
        yield ok("model", f"{name}: {setup.model.size:,} numbers, fingerprint {own[:12]} ({agreed})")
    preview = setup.preview
    if tokens := preview.tokens:
        cut = f", {counted(tokens.cut, 'row')} cut" if tokens.cut else ""
        lengths = f"a row has {tokens.median} (median) to {tokens.longest} tokens"
        yield ok("tokens", f"{lengths}; at most {preview.max_length}{cut}")
    said = preview.data.warnings  # with the data
    yield from (warning("tokens", text) for text in preview.warnings if text not in said)


def step(site: Site, setup: ClientSetup) -> Iterator[Finding]:
    """Yield how one training step went, by DP-SGD where that is set; its result is dropped, and nothing is charged."""
    began, before = time.perf_counter(), psutil.Process().memory_info().rss
    training.perform(setup.model, _task(site, setup))
    seconds, more = time.perf_counter() - began, psutil.Process().memory_info().rss - before
    private = " by DP-SGD" if site.config.dp.by_record else ""
    took = f"one training step{private} in {seconds:.2g} s, with {words(max(more, 0))} more memory"
    yield ok("step", f"{took}; nothing is kept or charged")


def _task(site: Site, setup: ClientSetup) -> TrainingTask:
    config, data = site.config, setup.client_data
    one = replace(config.train, steps=1)
    job = Job(start=setup.model.get_adapter(), training=one, seed=config.seed)
    if config.dp.by_record:
        client = data.client(site.id, setup.rank)
        terms = record_level_dp(config.dp, config.train, config.rounds, [client]).terms_for(client)
        job = replace(job, privacy=replace(terms, steps=1), metrics=False)
        return TrainingTask(client=site.id, job=job, kept=LoRA(), records=data.records)
    return TrainingTask(client=site.id, job=job, kept=LoRA(), examples=data.train)
