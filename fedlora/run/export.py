"""`fedlora export`: the model of a run in the form that others load: a PEFT adapter, a whole model, or one adapter for
each client.

An export counts only once it was loaded afresh, as a stranger would load it, and gave the logits of the run's model.
Until then it lies in a hidden folder beside its place, which an error or Ctrl-C removes.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from fedlora import config as configuration
from fedlora.config import Config
from fedlora.errors import CheckpointError, ConfigError, ExportError, nearest
from fedlora.jobs import Client, Job
from fedlora.lora import LoRA, compact, join, norm, scale, truncate
from fedlora.models.model import Model
from fedlora.models.peft_files import save_peft
from fedlora.storage import checkpoint
from fedlora.storage.client_state import ClientState

from .compose import compose
from .delivery import LogitsProbe, Unverified, probe_of, verify
from .directory import RunDirectory
from .setup import RunSetup, mute_transformers, reopen

FORMS = ("adapter", "merged", "per-client")


@dataclass(frozen=True, eq=False)
class ExportedModel:
    """One of the run's models: an adapter over an offset."""

    name: str  # of the folder it goes to, in that of the export
    lora: LoRA
    offset: tuple[LoRA, ...] = ()
    note: str = ""


def export(path: Path, form: str, max_rank: int = 0, out: Path | None = None) -> None:
    """Write the model of the run in `path`, verify what was written, and print where it is and how to load it.

    `form` is adapter, merged or per-client; `max_rank` the highest rank an adapter may have, 0 for what it takes;
    `out` a folder that is not there yet, by default `path`/export-`form`. Raises `ConfigError` for what cannot be
    asked of this run, or where another process writes into its directory, `CheckpointError` where it has no round yet,
    `ExportError` where what was written is not the run's model.
    """
    out = out or path / f"export-{form}"
    config = _checked(path, form, max_rank, out)
    mute_transformers()
    setup = reopen(RunDirectory(path), config)
    is_inside = out.absolute().is_relative_to(path.absolute())
    with RunDirectory(path).only_writer() if is_inside else nullcontext(), _whole(out) as place:
        probe, unverified = _write_all(setup, RunDirectory(path), form, max_rank, place)
        del setup  # the base is loaded afresh now: memory may not have room for two
        gaps = [verify(probe, written, form) for written in unverified]
    for written in unverified:
        for note in written.notes:
            print(note)
    print(f"{form}: {out}")
    print(f"loaded afresh, the logits are the run's to {max(gaps):.0e} of their size")
    print(f"load it: {_how(form, out)}")


def _checked(path: Path, form: str, max_rank: int, out: Path) -> Config:
    """The run's settings, after everything is refused that can be refused without a model."""
    if form not in FORMS:
        raise ConfigError(f"--as {form} is no form of export; {nearest(form, FORMS)}")
    config = configuration.build(RunDirectory(path).config())
    if out.exists():
        raise ConfigError(f"{out} is there already; remove it, or choose another folder with --out")
    if not any((path / "checkpoint").glob("round-*")):
        raise CheckpointError(f"{path} has no finished round yet; go on with fedlora simulate --resume {path}")
    if form == "merged":
        _check_mergeable(config, max_rank)
    if max_rank and config.lora.kind == "vera":
        raise ConfigError(f"--max-rank {max_rank}: lora.kind = vera has no product to cut; leave it out")
    return config


def _check_mergeable(config: Config, max_rank: int) -> None:
    """Raise `ConfigError` where the adapter cannot go into the weights of the base model."""
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
    setup: RunSetup, folder: RunDirectory, form: str, max_rank: int, place: Path
) -> tuple[LogitsProbe, list[Unverified]]:
    """Write every adapter of this form; each comes back with the logits of the model that it stands for."""
    model = setup.model
    probe = probe_of(setup)
    return probe, [_write_adapter(model, probe, exported, max_rank, place) for exported in _models(setup, folder, form)]


def _models(setup: RunSetup, folder: RunDirectory, form: str) -> list[ExportedModel]:
    """The models to export, from the newest checkpoint: the run's, or with per-client each client's own."""
    strategy = compose(setup.config, setup.start, setup.ranks)  # first: it defines the types of what is read next
    last = checkpoint.latest(folder.checkpoints)
    if last is None:
        raise CheckpointError(f"{folder.checkpoints} has no round that can be read; the run has to be made again")
    clients = [Client(id=i, examples=1, rank=rank) for i, rank in enumerate(setup.ranks)]
    jobs = {client.id: strategy.client_init(last.state, client) for client in clients}
    sides = _keeps(jobs[0])
    if form == "per-client":
        return _of_each_client(setup.config.strategy, jobs, sides, folder, last.round)
    note = f"{sides} stays with the clients: this is where a new one starts; --as per-client has each one's model"
    return [ExportedModel("", strategy.adapter(last.state), note=note if sides else "")]


def _of_each_client(
    strategy: str, jobs: Mapping[int, Job], sides: str, folder: RunDirectory, rounds: int
) -> list[ExportedModel]:
    """Every client's own model after so many rounds; `sides` are those that clients keep for themselves."""
    if not sides:
        raise ConfigError(f"with {strategy} all clients have the same model; use --as adapter")
    kept = {i: ClientState(folder.clients / str(i)).before(rounds) for i in jobs}
    if not any(kept.values()):
        raise ConfigError(f"{folder.clients} has nothing that a client kept; it is on the clients' own machines")
    return [_personal(i, job, kept[i]) for i, job in jobs.items()]


def _keeps(job: Job) -> str:
    """The sides that a client trains and keeps for itself, by which clients come to differ."""
    return "".join(side for side in job.trains if side not in job.shares)


def _personal(client: int, job: Job, kept: LoRA) -> ExportedModel:
    """The model that this client would use: the factors it kept over those that the job brings."""
    note = "" if kept else f"client {client} has not trained yet: its adapter is the start that it would have"
    lora = kept.only(_keeps(job)).over(job.start)
    if job.resumes:  # the offset is the model; the factors are no more than where training goes on from
        lora = replace(lora, B={m: torch.zeros_like(b) for m, b in lora.B.items()})
    return ExportedModel(f"client-{client}", lora, job.offset, note)


def _write_adapter(model: Model, probe: LogitsProbe, exported: ExportedModel, max_rank: int, place: Path) -> Unverified:
    """Write the model as one adapter, cut to the rank that was asked for."""
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
    save_peft(model, lora, place / exported.name)
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
    if form == "merged":
        kind = json.loads((out / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        return f'transformers.{kind}.from_pretrained("{out}")'
    return f'peft.PeftModel.from_pretrained(base_model, "{out}{"/client-<id>" if form == "per-client" else ""}")'
