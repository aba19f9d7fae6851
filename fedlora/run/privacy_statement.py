"""The privacy statement of a run: what it promises its clients, as facts, shown before the start and kept with the run.

`privacy.json` in the run directory holds the facts; the privacy report is made of them.
"""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from math import inf, sqrt
from typing import Any

from fedlora import config as configuration
from fedlora.config import Config
from fedlora.errors import PrivacyError
from fedlora.jobs import Charge, Client, Job, shared_start
from fedlora.privacy.accounting import prv, rdp
from fedlora.privacy.client_level import ClientLevelDP
from fedlora.privacy.preflight import Findings
from fedlora.privacy.record_level import RecordLevelDP

from .plan import Plan
from .versions import versions

FEW = 1000  # clients, below which hiding one takes more noise than a mean can bear


def privacy_facts(
    config: Config,
    plan: Plan,
    clients: Sequence[Client],
    job: Job,
    findings: Findings | None,
    ledgers: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return all facts of the report that the rounds do not tell; `job` is the first job of any client.

    `ledgers` is what clients' ledgers add, as `ledger_facts` has it.
    """
    trained, shared = _present(job, job.trains), _present(job, job.shares)
    return {
        "level": config.dp.level if config.dp.on else None,
        "seeded": config.dp.seeded,
        "metrics": plan.metrics,
        "secure_aggregation": config.secure.aggregation,
        "weights": plan.policy.weights,
        "strategy": config.strategy,
        "trained": trained,
        "shared": shared,
        "kept": [s for s in trained if s not in shared] + _kept_rows(job),
        "personal": vars(config.personal) if config.personal.on else None,
        "base_dtype": config.model.dtype,
        "public_start": config.lora.init_data or None,
        "config_sha256": sha256(configuration.dumps(config).encode()).hexdigest(),
        "versions": versions(),
        "record": plan.record_level and _record_level(plan.record_level, clients, job) | dict(ledgers or {}),
        "client": plan.client_level and _client_level(plan.client_level, plan.rounds, job),
        "preflight": findings and vars(findings),
    }


def ledger_facts(
    dp: RecordLevelDP, clients: Sequence[Client], charged: Mapping[int, Sequence[Charge]], joined: Mapping[int, int]
) -> dict[str, float]:
    """Return what clients' ledgers hold besides this run: the largest epsilon of theirs, now and at the run's end.

    `charged` are the charges in the ledgers, `joined` the rounds of this run that are among them. Nothing is returned
    where no ledger holds more than these.
    """
    earlier = [c for c in clients if len(charged.get(c.id, ())) > joined.get(c.id, 0)]
    ends = [_at_end(dp, c, charged[c.id], joined.get(c.id, 0)) for c in earlier]
    before = [dp.epsilon_with(c, charged[c.id], rounds=0) for c in earlier]
    return {"ledgers": max(before), "ledgers_end": max(ends)} if earlier else {}


def _at_end(dp: RecordLevelDP, client: Client, charges: Sequence[Charge], joined: int) -> float:
    return dp.epsilon_with(client, charges, rounds=max(0, dp.max_participations - joined))


def refuse_spent_budgets(
    dp: RecordLevelDP, clients: Sequence[Client], charged: Mapping[int, Sequence[Charge]], needed: int
) -> None:
    """Raise `PrivacyError` where fewer clients than are needed have budget left for one round."""
    limit = dp.config.limit * (1 + 1e-9)
    after = {c.id: dp.epsilon_with(c, charged[c.id], rounds=1) for c in clients if charged.get(c.id)}
    spent = [i for i, there in after.items() if there > limit]
    if spent and len(clients) - len(spent) < needed:
        raise PrivacyError(
            f"no round can be done: the privacy budget is spent of {len(spent)} of {len(clients)} clients (client "
            f"{spent[0]}: one round more would bring epsilon to {after[spent[0]]:.3g} by its ledger, and dp.budget = "
            f"{dp.config.limit:.3g}); raise dp.budget, if those who answer for the data agree"
        )


def summary_lines(found: Mapping[str, Any]) -> list[str]:
    """Return the facts that a person who starts a run should see first, a sentence each."""
    said: list[str] = []
    if found.get("record"):
        said += _record_lines(found["record"])
    if found.get("client"):
        said += _client_lines(found["client"])
    return said + _remarks(found)


def _remarks(found: Mapping[str, Any]) -> list[str]:
    said: list[str] = []
    if found["seeded"]:
        said.append("NOT PRIVATE: noise and samples come from the seed (dp.seeded), so whoever knows it can undo them")
    if found["level"] and found["metrics"]:
        said.append("NOT COVERED: clients tell losses and scores as they are (dp.metrics)")
    if found.get("personal"):
        said.append(
            "NOT PRIVATE: what each client trains after the rounds for its own use; nothing of it is sent or charged"
        )
    if found["secure_aggregation"]:
        said.append("secure aggregation: the server sees sums of updates, and no client's own")
    return said


def final_epsilon(found: Mapping[str, Any]) -> float:
    """Return the epsilon that the run comes to at its end: of the client that spends most, or of hiding clients."""
    if record := found.get("record"):
        ends = (record["smallest"]["epsilon"], record["largest"]["epsilon"], record.get("ledgers_end", 0.0))
        return max(map(float, ends))
    client = found.get("client") or {}
    return float(client.get("epsilon_prv") or client.get("epsilon_rdp") or inf)


def final_delta(found: Mapping[str, Any]) -> float:
    """Return the delta of that epsilon."""
    return float((found.get("record") or found.get("client") or {"delta": 1.0})["delta"])


def _record_level(dp: RecordLevelDP, clients: Sequence[Client], job: Job) -> dict[str, Any]:
    """Return the facts of record-level privacy.

    The smallest client has the most noise, the largest the least; all others lie between them.
    """
    c = dp.config
    numbers = max(_numbers(job, sides) for sides in job.each_turn)  # that one step noises
    smallest = min(clients, key=lambda client: client.records)
    largest = max(clients, key=lambda client: client.records)
    return {
        "unit": c.unit,
        "delta": dp.delta,
        "target_epsilon": _finite(c.epsilon),
        "budget": _finite(c.limit),
        "joins": dp.max_participations,
        "rounds": dp.rounds,
        "clip": c.clip,
        "head_share": c.head_share,
        "optimizer": dp.training.optimizer,
        "numbers": numbers,
        "smallest": _client_facts(dp, smallest, numbers=numbers),
        "largest": _client_facts(dp, largest, numbers=numbers),
    }


def _client_facts(dp: RecordLevelDP, client: Client, *, numbers: int) -> dict[str, Any]:
    p, charge = dp.terms_for(client), dp.total(client)
    expected_batch = p.rate * client.records
    return {
        "records": client.records,
        "delta": p.delta,
        "rate": p.rate,
        "noise": p.noise,
        "steps": p.steps,
        "total_steps": charge.steps,
        "expected_batch": expected_batch,
        "empty_batches": (1 - p.rate) ** client.records,
        "epsilon": dp.final_epsilon(client),
        "epsilon_prv": _finite(prv([charge], delta=p.delta)),
        "epsilon_rdp": _finite(rdp([charge], delta=p.delta)),
        "noise_to_signal": sqrt(numbers) * p.noise / expected_batch,
    }


def _client_level(dp: ClientLevelDP, rounds: int, job: Job) -> dict[str, Any]:
    """Return the facts of client-level privacy."""
    numbers = shared_start(job).numel()
    charge = dp.charge_of(rounds=rounds)
    return {
        "clients": dp.population,
        "rate": dp.rate,
        "amplified": dp.amplified,
        "noise": dp.noise,
        "sum_noise": dp.sum_noise,
        "clip": dp.clip,
        "quantile": dp.quantile or None,
        "rounds": rounds,
        "delta": dp.delta,
        "epsilon_prv": _finite(prv([charge], delta=dp.delta)),
        "epsilon_rdp": _finite(rdp([charge], delta=dp.delta)),
        "numbers": numbers,
        "noise_to_signal": dp.noise_to_signal(numbers),
    }


def _record_lines(r: Mapping[str, Any]) -> list[str]:
    small, large = r["smallest"], r["largest"]
    unit = "a row" if r["unit"] == "row" else "a block of tokens"
    held = f"; the ledgers hold up to epsilon {r['ledgers']:.3g} already, which is in it" if r.get("ledgers") else ""
    return [
        f"privacy: epsilon {final_epsilon({'record': r}):.3g} at delta {r['delta']:.2g} for {unit} of a client's data, "
        f"if it joins {r['joins']} of {r['rounds']} rounds{held}",
        f"privacy: sigma {_range(small, large, 'noise')}, rate {_range(small, large, 'rate')}, "
        f"{_range(small, large, 'steps')} steps a round, clip {r['clip']:g}; noise over signal "
        f"{_range(small, large, 'noise_to_signal')}",
    ]


def _client_lines(c: Mapping[str, Any]) -> list[str]:
    said = [
        f"privacy: epsilon {final_epsilon({'client': c}):.3g} at delta {c['delta']:.2g} for all of any one client's "
        f"data, after {c['rounds']} rounds; other runs on the same clients add to it, and are not counted",
        f"privacy: {c['clients']} clients, rate {c['rate']:.3g}, noise {c['noise']:.3g}, clip {c['clip']:g}; noise on "
        f"the mean is {c['noise_to_signal']:.3g} times the clip",
    ]
    if not c.get("amplified", True):
        said.append(
            "privacy: the members of a round of secure aggregation know one another, so noise and epsilon are for a "
            "client that is in every round, and that it took part is not hidden"
        )
    if c["noise_to_signal"] > 1 or c["clients"] < FEW:
        said.append(
            f"WARNING: {c['clients']} clients are too few to hide one among: with noise {c['noise_to_signal']:.3g} "
            "times the clip little or nothing is learned; it takes some ten thousand clients, or dp.level = record"
        )
    return said


def _range(small: Mapping[str, Any], large: Mapping[str, Any], key: str) -> str:
    low, high = sorted((small[key], large[key]))
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"


def _present(job: Job, sides: str) -> list[str]:
    """Return those of these sides that the adapter has."""
    return [s for s in sides if job.start.side(s)]


def _kept_rows(job: Job) -> list[str]:
    return [f"the last {job.keeps_rank} rows of A and columns of B"] if job.keeps_rank else []


def _numbers(job: Job, sides: str) -> int:
    return job.start.only(sides).numel()


def _finite(epsilon: float) -> float | None:
    """Return None for infinity, which JSON does not have."""
    return None if epsilon == inf else epsilon
