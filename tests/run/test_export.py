"""`fedlora export`: what a stranger loads gives the logits of the run."""

import json
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from fedlora import config as configuration
from fedlora.api import simulate
from fedlora.cli.app import app
from fedlora.client import training
from fedlora.errors import CheckpointError, ConfigError, ExportError
from fedlora.lora import LoRA, delta
from fedlora.models import base_model
from fedlora.models.peft_files import load_peft
from fedlora.run.compose import compose
from fedlora.run.delivery import EXAMPLES, LogitsProbe, Unverified, verify
from fedlora.run.directory import RunDirectory
from fedlora.run.export import export
from fedlora.run.setup import RunSetup, prepare
from fedlora.storage import checkpoint
from fedlora.storage.own_model import own_model
from tests.support.models import make

Run = Callable[[str], Path]
Said = pytest.CaptureFixture[str]
SMALL = {"train.batch_size": 4, "train.lr": 0.02, "lora.rank": 3, "lora.alpha": 5.0, "model.max_length": 16}
SMALL |= {"threads": 1, "clients": 4, "cohort": 2, "rounds": 2}
RUNS = [
    "llama fedavg data.eval= data.eval_share=0",  # nothing to evaluate on: a client's examples serve
    "gpt2 fedex_lora",
    "bert fedex_lora",
    "bert fedavg lora.kind=dora",
    "llama fedavg lora.kind=vera train.lr=0.1",
    "bert fedex_lora lora.init=pissa",
    "llama fedex_lora lora.alpha_pattern=q_proj=2 lora.rank_pattern=v_proj=2",
    "bert fed_sb train.lr=0.1",
    "llama-tied fedex_lora lora.targets=lm_head,q_proj",
]
PERSONAL = [
    "llama fedsa_lora",
    "bert fedsa_lora rounds=1",
    "bert fedsa_lora lora.kind=vera train.lr=0.1",
    "bert fedex_lora model.head=local",
    "bert fedex_lora model.head=local option.assignment=keep lora.init=pissa",
    "bert flora model.head=local lora.ranks=1,2,3,3",
    "bert dual option.local=2",
    "llama fedex_lora option.assignment=keep personal.steps=2",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of a tiny model, a strategy and settings, made once; not to be written to."""
    site = tmp_path_factory.mktemp("site")
    for name, n in (("train.jsonl", 40), ("test.jsonl", 12)):
        rows = [{"text": f"w{i % 7} w{i % 5} w{i % 3}", "label": ("no", "maybe", "yes")[i % 3]} for i in range(n)]
        (site / name).write_text("".join(json.dumps(r) + "\n" for r in rows))

    @cache
    def one(words: str) -> Path:
        kind, strategy, *more = words.split()
        out, model = tmp_path_factory.mktemp("run") / "run", site / kind
        files = {"model.path": str(model if model.exists() else make(kind, model)), "strategy": strategy}
        files |= {"model.task": "classify" if kind == "bert" else "lm", "data.path": str(site / "train.jsonl")}
        files |= {"data.eval": str(site / "test.jsonl")}
        simulate(files | SMALL | dict(word.split("=", 1) for word in more), out=out, progress=False)
        return out

    return one


def opened(path: Path) -> tuple[RunSetup, Any, Any]:
    """The run as it stands: its pieces, its strategy, and the state after its last round."""
    setup = prepare(configuration.build(RunDirectory(path).config()))
    strategy = compose(setup.config, setup.start, setup.ranks)
    last: Any = checkpoint.latest(path / "checkpoint")
    return setup, strategy, last.state


def delivered(path: Path) -> tuple[RunSetup, LoRA]:
    """The run's pieces, with the strategy's adapter on the model, and that adapter."""
    setup, strategy, state = opened(path)
    lora = strategy.adapter(state)
    setup.model.set_adapter(lora)
    return setup, lora


@torch.no_grad()
def logits(net: Any) -> torch.Tensor:
    """On tokens that no run has seen."""
    ids = torch.randint(4, 64, (5, 12), generator=torch.Generator().manual_seed(5))
    scores: torch.Tensor = net.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return scores


def stranger(setup: RunSetup, adapter: Path) -> torch.Tensor:
    """The logits of a clean base with this adapter, as PEFT loads it."""
    bare, *_ = base_model.load_base_model(setup.config.model, setup.model.schema, seed=99)
    loaded: Any = PeftModel
    return logits(loaded.from_pretrained(bare, str(adapter)))


def whole(folder: Path) -> Any:
    """The model in a folder, as transformers alone loads it."""
    named = json.loads((folder / "config.json").read_text())["architectures"][0]
    auto: Any = AutoModelForSequenceClassification if "Classification" in named else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype="auto")


def alike(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("form", ["adapter", "merged"])
@pytest.mark.parametrize("words", RUNS)
def test_a_stranger_gets_the_runs_logits(run: Run, words: str, form: str, tmp_path: Path) -> None:
    """From the adapter on a clean base, and from the merged model without PEFT."""
    path, out = run(words), tmp_path / "out"
    export(path, form, out=out)
    setup, _ = delivered(path)
    wanted = logits(setup.model.net)
    alike(stranger(setup, out) if form == "adapter" else logits(whole(out)), wanted)
    bare, *_ = base_model.load_base_model(setup.config.model, setup.model.schema, seed=99)
    assert not torch.allclose(logits(bare), wanted, atol=1e-3)


def test_the_command_leaves_a_model_that_is_of_transformers_alone(run: Run, tmp_path: Path) -> None:
    """With the base's weights by name, its tokenizer and its labels, nothing of PEFT's, and how to load it."""
    path, out = run("bert fedavg"), tmp_path / "out"
    done = CliRunner().invoke(app, ["export", str(path), "--as", "merged", "--out", str(out)])
    assert f'load it: transformers.BertForSequenceClassification.from_pretrained("{out}")' in done.stdout
    setup, net = opened(path)[0], whole(out)
    bare, processor, _ = base_model.load_base_model(setup.config.model, setup.model.schema, seed=99)
    assert net.state_dict().keys() == bare.state_dict().keys() and not list(out.glob("adapter*"))
    assert net.config.id2label == {0: "maybe", 1: "no", 2: "yes"}
    assert AutoTokenizer.from_pretrained(out)("w3 w4") == processor("w3 w4")


def test_a_merged_model_keeps_the_type_of_its_base(run: Run, tmp_path: Path) -> None:
    """Its weights are rounded to that type, and the logits are the run's to no more digits."""
    export(path := run("llama fedex_lora model.dtype=bfloat16"), "merged", out=tmp_path / "out")
    net = whole(tmp_path / "out")
    assert {t.dtype for t in net.state_dict().values()} == {torch.bfloat16}
    wanted = logits(delivered(path)[0].model.net)
    assert 0 < float((logits(net) - wanted).abs().max() / wanted.abs().max()) < 0.05


@pytest.mark.parametrize("words", PERSONAL)
def test_every_client_gets_its_own_model(run: Run, words: str, tmp_path: Path, capsys: Said) -> None:
    """What it keeps, over its job's start and offset; who has not trained has the start, and is named."""
    path = run(words)
    capsys.readouterr()
    export(path, "per-client", out=tmp_path / "out")
    named = re.findall(r"client (\d) has not trained yet", capsys.readouterr().out)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {f"client-{i}" for i in range(4)}
    setup, strategy, state = opened(path)
    found = []
    for i, site in enumerate(setup.clients_data):
        stage: Any = "personal" if setup.config.personal.on else "round"
        job = strategy.client_init(state, site.client(i, setup.ranks[i]))
        at = replace(job, round=setup.config.rounds - 1, stage=stage)
        own, kept = own_model(at, path / "checkpoint" / "clients" / str(i))
        training.evaluate(setup.model, own, setup.evaluation, kept)
        alike(got := stranger(setup, tmp_path / "out" / f"client-{i}"), logits(setup.model.net))
        found += [got] if kept else []
        assert bool(kept) == (str(i) not in named)
    assert len(found) > 1
    assert all(not torch.allclose(x, y, atol=1e-4) for i, x in enumerate(found) for y in found[:i])


def test_an_adapter_that_is_no_clients_model_says_so(run: Run, tmp_path: Path, capsys: Said) -> None:
    for strategy, notes in (("fedsa_lora", ["BH stays with the clients"]), ("fedavg", [])):
        export(run(f"bert {strategy}"), "adapter", 3, tmp_path / strategy)
        assert re.findall(r"\w+ stays with the clients|cut", capsys.readouterr().out) == notes


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_cut_adapter_is_off_by_what_eckart_and_young_say(run: Run, rank: int, tmp_path: Path, capsys: Said) -> None:
    path = run("bert fedex_lora")
    export(path, "adapter", rank, tmp_path / "out")
    told, moved = (float(x) for x in re.findall(r"(?:error is|of a logit) (\S+)", capsys.readouterr().out))
    setup, lora = delivered(path)
    spectra = [torch.linalg.svdvals(d.double()) for d in delta(lora).values()]
    lost, size = (sum(float((s[k:] ** 2).sum()) for s in spectra) for k in (rank, 0))
    assert told == pytest.approx((lost / size) ** 0.5, rel=2e-3) and told > 1e-3
    cut, probe = load_peft(setup.model, tmp_path / "out"), probe_of(setup)
    assert {a.shape[0] for a in cut.A.values()} == {rank}
    before = probe.logits(setup.model.net)
    setup.model.set_adapter(cut)
    assert moved == pytest.approx(float((probe.logits(setup.model.net) - before).abs().max()), rel=0.01, abs=1e-6)


def test_no_modules_rank_is_above_its_smaller_dimension(run: Run, tmp_path: Path, capsys: Said) -> None:
    """Llama's v has 12 rows, q 24; four rounds of three clients' residuals would have rank 45."""
    export(run("llama fedex_lora lora.rank=5 cohort=3 rounds=4"), "adapter", 24, tmp_path / "out")
    assert "cut" not in capsys.readouterr().out
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for part, most in (("v_proj.lora_A", 12), ("q_proj.lora_A", 24)):
        assert {int(t.any(1).sum()) for name, t in tensors.items() if part in name} == {most}  # the rest is padding


def probe_of(setup: RunSetup) -> LogitsProbe:
    batch = setup.model.encoder.collate(setup.evaluation[:EXAMPLES])
    return LogitsProbe(setup.config.model, setup.model.schema, setup.model.device, batch)


@pytest.mark.parametrize(("kind", "part"), [("llama", "lora_A"), ("llama", "lora_B"), ("bert", "classifier.weight")])
def test_an_export_that_is_not_the_model_is_refused(run: Run, kind: str, part: str, tmp_path: Path) -> None:
    """One of its matrices is off by a tenth."""
    path, out = run(f"{kind} fedavg"), tmp_path / "out"
    export(path, "adapter", out=out)
    setup, _ = delivered(path)
    probe = probe_of(setup)
    draft = Unverified(out, probe.logits(setup.model.net), ())
    assert verify(probe, draft, "adapter") < 1e-5
    tensors = load_file(out / "adapter_model.safetensors")
    name = next(name for name in tensors if part in name)
    save_file(tensors | {name: 1.1 * tensors[name]}, out / "adapter_model.safetensors")
    with pytest.raises(ExportError, match="differ from the run's by"):
        verify(probe, draft, "adapter")


def test_of_a_damaged_run_nothing_is_left(run: Run, tmp_path: Path) -> None:
    path = shutil.copytree(run("bert fedavg"), tmp_path / "run")
    last: Any = checkpoint.latest(path / "checkpoint")
    broken = replace(last.state, H={name: h * float("nan") for name, h in last.state.H.items()})
    checkpoint.save(path / "checkpoint", replace(last, round=3, state=broken))
    with pytest.raises(ExportError, match="nan of their size"):
        export(path, "merged")
    assert not list(path.glob("*export*"))


def test_interrupted_it_leaves_nothing(run: Run, tmp_path: Path) -> None:
    path = run("bert fedsa_lora")

    def interrupt() -> None:
        while not list(tmp_path.glob(".out.*/client-1/*.safetensors")):
            time.sleep(0.001)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        export(path, "per-client", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_run_is_left_as_it_was(run: Run, tmp_path: Path) -> None:
    path = shutil.copytree(run("bert fedsa_lora"), tmp_path / "run")
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    export(path, "per-client")
    shutil.rmtree(path / "export-per-client")
    assert before == {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("form", "rank", "kind", "says"),
    [
        ("whole", 0, "lora", "--as whole is no form"),
        ("merged", 2, "lora", "a merged model has no rank"),
        ("adapter", 2, "vera", "lora.kind = vera has no product"),
        ("per-client", 0, "lora", "with fedavg all clients have the same model; use --as adapter"),
    ],
)
def test_what_has_no_meaning_is_refused(run: Run, form: str, rank: int, kind: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        export(run(f"bert fedavg lora.kind={kind}"), form, rank, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_not_written_to(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="--out"):
        export(run("bert fedavg"), "adapter", out=tmp_path)
    with pytest.raises(ExportError, match="could not be written"):
        export(run("bert fedavg"), "adapter", out=tmp_path / "mine" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_run_that_cannot_give_it_is_one_sentence(run: Run, tmp_path: Path) -> None:
    """No run, no round, clients elsewhere, a quantised base."""
    with pytest.raises(ConfigError, match="no run directory"):
        export(tmp_path, "adapter")
    path = shutil.copytree(run("bert fedsa_lora"), tmp_path / "run")
    shutil.rmtree(path / "checkpoint" / "clients")
    with pytest.raises(ConfigError, match="clients' own machines"):
        export(path, "per-client")
    last: Any = checkpoint.latest(path / "checkpoint")
    checkpoint.save(path / "checkpoint", replace(last, begun_with={}))  # else the run began with another base
    settings = (path / "config.toml").read_text()
    (path / "config.toml").write_text(settings.replace('quantize = "none"', 'quantize = "4bit"'))
    with pytest.raises(ConfigError, match="= 4bit cannot take an adapter into its weights; use --as adapter"):
        export(path, "merged")
    shutil.rmtree(path / "checkpoint")
    with pytest.raises(CheckpointError, match="no finished round yet"):
        export(path, "adapter")
