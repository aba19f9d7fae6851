"""What a run promises of its clients' privacy, as facts: told before it starts, and kept with it for the report."""

import platform
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from math import inf, sqrt
from typing import Any

from fedlora import config as configuration
from fedlora.config import Config
from fedlora.jobs import Charge, Client, Job
from fedlora.privacy.accounting import prv, rdp
from fedlora.privacy.client_level import ClientLevelDP
from fedlora.privacy.preflight import Findings
from fedlora.privacy.record_level import RecordLevelDP

from .plan import Plan

PARTS = "fedlora", "opacus", "torch", "transformers", "peft", "flwr", "cryptography"
FEW = 1000  # clients, below which hiding one takes more noise than a mean can bear


def privacy_facts(
    config: Config, plan: Plan, clients: Sequence[Client], job: Job, findings: Findings | None
) -> dict[str, Any]:
    """All that the report states and the rounds do not; `job` is any client's first."""
    return {
        "level": config.dp.level if config.dp.on else None,
        "seeded": config.dp.seeded,
        "metrics": plan.metrics,
        "secure_aggregation": config.secure.aggregation,
        "weights": plan.policy.weights,
        "strategy": config.strategy,
        "trained": [s for s in job.trains if job.start.side(s)],
        "shared": [s for s in job.shares if job.start.side(s)],
        "kept": [s for s in job.trains if job.start.side(s) and s not in job.shares],
        "base_dtype": config.model.dtype,
        "public_start": config.lora.init_data or None,
        "config_sha256": sha256(configuration.dumps(config).encode()).hexdigest(),
        "versions": {name: _version(name) for name in PARTS} | {"python": platform.python_version()},
        "record": _by_record(plan.terms, clients, _numbers(job, job.trains)) if plan.terms else None,
        "client": _by_client(plan.client_level, plan.rounds, _numbers(job, job.shares)) if plan.client_level else None,
        "preflight": vars(findings) if findings else None,
    }


def summary_lines(found: Mapping[str, Any]) -> list[str]:
    """The facts that whoever starts a run should see first."""
    said = []
    if found.get("record"):
        said += _record_lines(found["record"])
    if found.get("client"):
        said += _client_lines(found["client"])
    if found["seeded"]:
        said.append("NOT PRIVATE: noise and samples come from the seed (dp.seeded), so whoever knows it can undo them")
    if found["level"] and found["metrics"]:
        said.append("NOT COVERED: clients tell losses and scores as they are (dp.metrics)")
    if found["secure_aggregation"]:
        said.append("secure aggregation: the server sees sums of updates, and no client's own")
    return said


def _by_record(terms: RecordLevelDP, clients: Sequence[Client], numbers: int) -> dict[str, Any]:
    """What the smallest client gets, whose noise is the most, and the largest; the others lie between."""
    ends = {end: of(clients, key=lambda c: c.records) for end, of in (("smallest", min), ("largest", max))}
    c = terms.config
    found: dict[str, Any] = {
        "unit": c.unit,
        "delta": c.delta,
        "target_epsilon": None if c.epsilon == inf else c.epsilon,
        "budget": None if c.limit == inf else c.limit,
        "joins": terms.max_participations,
        "rounds": terms.rounds,
        "clip": c.clip,
        "head_share": c.head_share,
        "optimizer": terms.training.optimizer,
        "numbers": numbers,
    }
    for end, client in ends.items():
        p = terms.of(client)
        charge = [Charge(p.noise, p.rate, p.steps * terms.max_participations)]
        found[end] = {
            "records": client.records,
            "rate": p.rate,
            "noise": p.noise,
            "steps": p.steps,
            "total_steps": p.steps * terms.max_participations,
            "expected_batch": p.rate * client.records,
            "empty_batches": (1 - p.rate) ** client.records,
            "epsilon": terms.final_epsilon(client),
            "epsilon_prv": _told(prv(charge, c.delta)),
            "epsilon_rdp": _told(rdp(charge, c.delta)),
            "noise_to_signal": sqrt(numbers) * p.noise / (p.rate * client.records),
        }
    return found


def _by_client(client_level: ClientLevelDP, rounds: int, numbers: int) -> dict[str, Any]:
    charge = [Charge(client_level.noise, client_level.rate, rounds)]
    return {
        "clients": client_level.population,
        "rate": client_level.rate,
        "noise": client_level.noise,
        "sum_noise": client_level.sum_noise,
        "clip": client_level.clip,
        "quantile": client_level.quantile or None,
        "rounds": rounds,
        "delta": client_level.delta,
        "epsilon_prv": _told(prv(charge, client_level.delta)),
        "epsilon_rdp": _told(rdp(charge, client_level.delta)),
        "numbers": numbers,
        "noise_to_signal": client_level.noise_to_signal(numbers),
    }


def _record_lines(r: Mapping[str, Any]) -> list[str]:
    small, large = r["smallest"], r["largest"]
    unit = "a row" if r["unit"] == "row" else "a block of tokens"
    epsilon = max(small["epsilon"], large["epsilon"])
    return [
        f"privacy: epsilon {epsilon:.3g} at delta {r['delta']:.2g} for {unit} of a client's data, if it joins "
        f"{r['joins']} of {r['rounds']} rounds",
        f"privacy: sigma {_range(small, large, 'noise')}, rate {_range(small, large, 'rate')}, "
        f"{_range(small, large, 'steps')} steps a round, clip {r['clip']:g}; noise over signal "
        f"{_range(small, large, 'noise_to_signal')}",
    ]


def _client_lines(c: Mapping[str, Any]) -> list[str]:
    said = [
        f"privacy: epsilon {c['epsilon_prv'] or c['epsilon_rdp']:.3g} at delta {c['delta']:.2g} for all of any one "
        f"client's data, after {c['rounds']} rounds",
        f"privacy: {c['clients']} clients, rate {c['rate']:.3g}, noise {c['noise']:.3g}, clip {c['clip']:g}; noise on "
        f"the mean is {c['noise_to_signal']:.3g} times the clip",
    ]
    if c["noise_to_signal"] > 1 or c["clients"] < FEW:
        said.append(
            f"WARNING: {c['clients']} clients are too few to hide one among: with noise {c['noise_to_signal']:.3g} "
            "times the clip little or nothing is learned; it takes some ten thousand clients, or dp.level = record"
        )
    return said


def _range(small: Mapping[str, Any], large: Mapping[str, Any], key: str) -> str:
    low, high = sorted((small[key], large[key]))
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"


def _numbers(job: Job, sides: str) -> int:
    return job.start.only(sides).numel()


def _told(epsilon: float) -> float | None:
    """JSON has no infinity."""
    return None if epsilon == inf else epsilon


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
