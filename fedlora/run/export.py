"""`fedlora export`: the model of a run in the form that others load: a PEFT adapter, a whole model, one adapter for
each client, or llama.cpp's GGUF.

An export counts only once it was loaded afresh, as a stranger would load it, and gave the logits of the run's model.
Until then it lies in a hidden folder beside its place, which an error or Ctrl-C removes.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fedlora import config as configuration
from fedlora.config import Config
from fedlora.errors import CheckpointError, ConfigError, ExportError, nearest
from fedlora.jobs import Client, Job, is_personal, own_sides, start_with
from fedlora.lora import LoRA, compact, join, norm, scale, truncate
from fedlora.message_types import Stage
from fedlora.models.model import Model
from fedlora.models.peft_files import save_peft
from fedlora.storage import checkpoint
from fedlora.storage.client_state import ClientState
from fedlora.storage.own_model import own_model
from fedlora.strategy import Strategy

from .compose import compose
from .delivery import LogitsProbe, Unverified, probe_of, verify
from .directory import RunDirectory
from .gguf import ADAPTER, check_convertible, convert, converter
from .hub import check_repository
from .model_card import CardFacts, Form, card_facts, write_card
from .setup import RunSetup, mute_transformers, reopen

log = logging.getLogger("fedlora")
FORMS = ("adapter", "merged", "per-client", "gguf")


@dataclass(frozen=True)
class ExportOptions:
    """What an export may be told beside its form and its place."""

    max_rank: int = 0  # the highest rank an adapter may have; 0: what it takes
    uniform_rank: bool = False  # give the adapters of all clients the rank of the largest
    base_model: str = ""  # hub id by which others know a base that the run had in a folder
    repository: str = ""  # hub id under which others find the export
    llama_cpp: Path | None = None  # the folder of llama.cpp


@dataclass(frozen=True, eq=False)
class ExportedModel:
    """One of the run's models: an adapter over an offset."""

    name: str  # of the folder it goes to, in that of the export
    lora: LoRA
    offset: tuple[LoRA, ...] = ()
    note: str = ""


def export(
    path: Path, form: str, max_rank: int = 0, out: Path | None = None, options: ExportOptions | None = None
) -> Path:
    """Write the model of the run in `path`, verify what was written, print how to load it, and return where it is.

    `form` is one of `FORMS`; `max_rank` the highest rank an adapter may have, 0 for what it takes; `out` a folder that
    is not there yet, by default `path`/export-`form`. Raises `ConfigError` for what cannot be asked of this run, or
    where another process writes into its directory, `CheckpointError` where it has no round yet, `ExportError` where
    what was written is not the run's model.
    """
    out, options = out or path / f"export-{form}", replace(options or ExportOptions(), max_rank=max_rank)
    config = _checked(path, form, options, out)
    mute_transformers()
    setup = reopen(RunDirectory(path), config)
    if options.base_model:
        setup.model.base_name = replace(setup.model.base_name, hub_id=options.base_model, revision="")
    is_inside = out.absolute().is_relative_to(path.absolute())
    with RunDirectory(path).only_writer() if is_inside else nullcontext(), _whole(out) as place:
        facts, probe, unverified = _write_all(setup, RunDirectory(path), form, options, place)
        del setup  # the base is loaded afresh now: memory may not have room for two
        gaps = [verify(probe, written, form) for written in unverified]
        _finish(facts, unverified, form, options, place)
    for written in unverified:
        for note in written.notes:
            print(note)
    print(f"{form}: {out}")
    of = "of the adapter that was converted, " if form == "gguf" else ""
    print(f"{of}loaded afresh, the logits are the run's to {max(gaps):.0e} of their size")
    print(f"load it: {_how(form, out)}")
    return out


def _finish(facts: CardFacts, unverified: Sequence[Unverified], form: str, options: ExportOptions, place: Path) -> None:
    """Convert what is to be converted, and put a card to each model."""
    if form == "gguf":
        convert(place, facts.config.model.path, options.llama_cpp)
    of_the_card: Form = "merged" if form == "merged" else "gguf" if form == "gguf" else "adapter"
    for written in unverified:
        own = f"it is of client {written.folder.name.removeprefix('client-')} alone" if form == "per-client" else ""
        write_card(facts, written.folder, of_the_card, place=options.repository, note=own)


def save_own(model: Model, lora: LoRA, offset: Sequence[LoRA], folder: Path) -> None:
    """Write a client's own model as a PEFT adapter of `model`'s base, offset and all, and say where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    save_peft(model, _joined(ExportedModel("", lora, tuple(offset))), folder)
    log.info(
        'an adapter of this client\'s own: %s; load it: peft.PeftModel.from_pretrained(base_model, "%s")',
        folder,
        folder,
    )


def _checked(path: Path, form: str, options: ExportOptions, out: Path) -> Config:
    """The run's settings, after everything is refused that can be refused without a model."""
    if form not in FORMS:
        raise ConfigError(f"--as {form} is no form of export; {nearest(form, FORMS)}")
    config = configuration.build(RunDirectory(path).config())
    _check_names(form, options)
    if out.exists():
        raise ConfigError(f"{out} is there already; remove it, or choose another folder with --out")
    if not any((path / "checkpoint").glob("round-*")):
        raise CheckpointError(f"{path} has no finished round yet; go on with fedlora simulate --resume {path}")
    if form == "merged":
        _check_mergeable(config, options)
    if form == "gguf":
        check_convertible(config)
        converter(path, config.model.path, options.llama_cpp)
    if (options.max_rank or options.uniform_rank) and config.lora.kind == "vera":
        named = f"--max-rank {options.max_rank}" if options.max_rank else "--uniform-rank"
        raise ConfigError(f"{named}: lora.kind = vera has no product to cut or to fill up; leave it out")
    return config


def _check_names(form: str, options: ExportOptions) -> None:
    """Raise `ConfigError` for what is no hub id, and where several clients' models would go under one."""
    if options.base_model:
        check_repository("--base-model", options.base_model)
    if options.repository:
        check_repository("--push", options.repository)
        if form == "per-client":
            raise ConfigError(
                f"--push {options.repository}: --as per-client writes models that are each client's own; leave it out, "
                "or have each client push its own"
            )
    if options.uniform_rank and form != "per-client":
        raise ConfigError(
            f"--uniform-rank: --as {form} writes one model, whose modules have one rank already; leave it out, or use "
            "--as per-client"
        )


def _check_mergeable(config: Config, options: ExportOptions) -> None:
    """Raise `ConfigError` where the adapter cannot go into the weights of the base model."""
    max_rank = options.max_rank
    if config.model.quantize != "none":
        raise ConfigError(
            f"a base with model.quantize = {config.model.quantize} cannot take an adapter into its weights; "
            "use --as adapter"
        )
    if max_rank:
        raise ConfigError(f"--max-rank {max_rank}: a merged model has no rank; leave it out, or use --as adapter")


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A hidden folder to write to, which becomes `out` when all went well and is removed otherwise."""
    place = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        place.mkdir(parents=True)
        yield place
        place.rename(out)
    except (OSError, SafetensorError) as e:
        raise ExportError(f"{out} could not be written: {e}; make room, or choose another folder with --out") from e
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _write_all(
    setup: RunSetup, folder: RunDirectory, form: str, options: ExportOptions, place: Path
) -> tuple[CardFacts, LogitsProbe, list[Unverified]]:
    """Write every adapter of this form; each comes back with the logits of the model that it stands for."""
    strategy = compose(setup.config, setup.start, setup.ranks)  # first: it defines the types of what is read next
    models, probe = _models(setup, strategy, folder, form), probe_of(setup)
    most, least = options.max_rank, _largest_rank(models) if options.uniform_rank else 0
    rank = min(least, most) if most else least
    written = [_write_adapter(setup.model, probe, exported, most, rank, place) for exported in models]
    return card_facts(setup, strategy, folder), probe, written


def _largest_rank(models: Sequence[ExportedModel]) -> int:
    """The largest rank that an adapter among these takes."""
    return max(a.shape[0] for exported in models for a in _joined(exported).A.values())


def _models(setup: RunSetup, strategy: Strategy[Any], folder: RunDirectory, form: str) -> list[ExportedModel]:
    """The models to export, from the newest checkpoint: the run's, or with per-client each client's own."""
    last = checkpoint.latest(folder.checkpoints)
    if last is None:
        raise CheckpointError(f"{folder.checkpoints} has no round that can be read; the run has to be made again")
    clients = [Client(id=i, examples=1, rank=rank) for i, rank in enumerate(setup.ranks)]
    jobs = {client.id: strategy.client_init(last.state, client) for client in clients}
    if form == "per-client":
        return _of_each_client(setup.config.strategy, jobs, folder, last.round)
    sides = own_sides(jobs[0]) or "a piece of the rank"
    note = f"{sides} stays with the clients: this is where a new one starts; --as per-client has each one's model"
    return [ExportedModel("", strategy.adapter(last.state), note=note if is_personal(jobs[0]) else "")]


def _of_each_client(strategy: str, jobs: Mapping[int, Job], folder: RunDirectory, rounds: int) -> list[ExportedModel]:
    """Every client's own model after so many rounds."""
    went_on = any(ClientState(folder.clients / str(i), "personal").of(rounds - 1) for i in jobs)
    if not (went_on or is_personal(jobs[0])):
        raise ConfigError(
            f"with {strategy} all clients have the same model; use --as adapter, or have each go on by itself after "
            "the rounds, with personal.steps"
        )
    stage: Stage = "personal" if went_on else "round"
    jobs = {i: replace(job, round=rounds - 1, stage=stage) for i, job in jobs.items()}
    models = {i: own_model(job, folder.clients / str(i)) for i, job in jobs.items()}
    if not any(kept for _, kept in models.values()):
        raise ConfigError(f"{folder.clients} has nothing that a client kept; it is on the clients' own machines")
    return [_personal(i, *model) for i, model in models.items()]


def _personal(client: int, job: Job, kept: LoRA) -> ExportedModel:
    """The model that this client would use: the factors it kept over those that the job brings."""
    note = "" if kept else f"client {client} has not trained yet: its adapter is the start that it would have"
    lora = start_with(job, kept)
    if job.resumes:  # the offset is the model; the factors are no more than where training goes on from
        lora = replace(lora, B={m: torch.zeros_like(b) for m, b in lora.B.items()})
    return ExportedModel(f"client-{client}", lora, job.offset, note)


def _write_adapter(
    model: Model, probe: LogitsProbe, exported: ExportedModel, max_rank: int, least: int, place: Path
) -> Unverified:
    """Write the model as one adapter, cut to a largest rank or filled up to a least, where there is one."""
    model.set_adapter(exported.lora, exported.offset)
    logits, lora = probe.logits(model.net), _joined(exported)
    notes = [exported.note] if exported.note else []
    rank = max(a.shape[0] for a in lora.A.values())
    if 0 < max_rank < rank:
        best = truncate(lora, max_rank)
        cut = LoRA(best.A, best.B, lora.H)
        model.set_adapter(cut)
        whole, logits = logits, probe.logits(model.net)
        lost = _lost(lora, cut, (logits - whole).abs().max())
        notes.append(f"{exported.name or 'adapter'}: of rank {rank}, cut to {max_rank}; {lost}")
        lora = cut
    save_peft(model, lora, place / exported.name, least)
    return Unverified(place / exported.name, logits, tuple(notes))


def _lost(lora: LoRA, cut: LoRA, logit: Tensor) -> str:
    """What an adapter has lost by being cut to a lower rank, in words; `logit`: the largest difference of a logit."""
    error = norm(join(lora, scale(cut, -1))) / (norm(lora) or 1.0)
    return (
        f"the product's relative error is {error:.4g} ({error**2:.2g} of its energy), "
        f"the largest difference of a logit {logit:.4g}"
    )


def _joined(exported: ExportedModel) -> LoRA:
    """Offset and adapter as one adapter, with no module's rank above its smaller dimension."""
    if any(a.dim() == 1 for a in exported.lora.A.values()):
        return exported.lora  # VeRA's vectors, which no offset goes with
    joined = join(*exported.offset, exported.lora)
    return compact(LoRA(joined.A, joined.B, exported.lora.H))


def _how(form: str, out: Path) -> str:
    """The line of Python that loads the export."""
    if form == "gguf":
        return f"llama-cli -m base.gguf --lora {out / ADAPTER}"
    if form == "merged":
        kind = json.loads((out / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        return f'transformers.{kind}.from_pretrained("{out}")'
    return f'peft.PeftModel.from_pretrained(base_model, "{out}{"/client-<id>" if form == "per-client" else ""}")'
