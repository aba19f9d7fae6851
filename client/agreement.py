"""A client's agreement with a run: held against its policy when it joins, kept on its disk, bound to every job."""

import logging
from pathlib import Path

from fedlora.client.policy import ClientPolicy
from fedlora.errors import PolicyRefusal, WireError
from fedlora.jobs import Job
from fedlora.messages import envelope
from fedlora.messages.agreement import RunAgreement
from fedlora.storage.files import write_durably

FILE = "agreement.json"
log = logging.getLogger("fedlora")


def join(folder: Path, offered: RunAgreement, policy: ClientPolicy, run: str) -> None:
    """Take part in a run as it is offered: show its agreement to the operator where it is new, and keep it in `folder`.

    Raises `PolicyRefusal` for an agreement that the policy does not allow, or that is not the one this client has with
    the run already; more or fewer rounds are a new agreement that may follow.
    """
    policy.refuse_agreement(offered)
    before = kept(folder) if (folder / FILE).is_file() else None
    if before == offered:
        return
    if before and (changed := before.differences(offered)):
        raise PolicyRefusal(
            f"run {run} was agreed with other {', '.join(changed)}; have the server go on as it began, or begin anew"
        )
    write_durably(folder / FILE, envelope.to_json(offered))
    log.info("run %s %s:", run, "goes on with another agreement" if before else "asks of this client")
    for line in offered.words():
        log.info("  %s", line)


def kept(folder: Path) -> RunAgreement:
    """The agreement that this client has with the run whose state lies in `folder`. Raises `WireError` without one."""
    try:
        return envelope.from_json((folder / FILE).read_bytes(), RunAgreement)
    except (OSError, WireError) as e:
        raise WireError(f"{folder / FILE} cannot be read, so this run's settings are not known here: {e}") from e


def refuse_unagreed(agreement: RunAgreement, named: str, job: Job | None = None) -> None:
    """Raise `PolicyRefusal` for a message that names another agreement, or a job that differs from the agreement."""
    if named != agreement.hash:
        raise PolicyRefusal(f"a message names agreement {named[:12] or 'none'}; this run's is {agreement.hash[:12]}")
    broken = agreement.broken_by(job) if job else []
    if broken:
        raise PolicyRefusal(f"a job breaks the agreement {agreement.hash[:12]}: it {'; it '.join(broken)}")


def refuse_scores(agreement: RunAgreement) -> None:
    """Raise `PolicyRefusal` where the run was agreed without scores on held-out examples."""
    if not agreement.asks_scores:
        raise PolicyRefusal(f"the server asks for scores, and the agreement {agreement.hash[:12]} has none")
