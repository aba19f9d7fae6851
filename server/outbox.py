"""Messages that bring clients their work: those that are not answered yet, and what a job's message has to bring."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import RecordDict

from fedlora.jobs import Job
from fedlora.messages import codec
from fedlora.messages.parts import Parts, PartTracker
from fedlora.storage.event_log import EventLog


@dataclass
class Outbox:
    """Messages of one kind that clients were sent, and have not answered."""

    kind: str
    content: Callable[[int], RecordDict]  # of a client's message
    longest: float  # seconds after which nobody waits for an answer, so that no message is begun later
    waiting: dict[str, int] = field(default_factory=dict)  # message -> the client that has not answered it
    activated: dict[int, str] = field(default_factory=dict)  # client -> when its node was started, as of its message

    def forget(self, client: int) -> list[str]:
        """Take a client's messages out, as it has answered one of them; return them."""
        ids = [id for id, i in self.waiting.items() if i == client]
        for id in ids:
            del self.waiting[id]
        return ids


class JobMessages:
    """The messages that bring clients their jobs, each with the parts that its client does not hold."""

    def __init__(
        self, kind: str, jobs: Mapping[int, Job], traffic: PartTracker, event_log: EventLog, agreement: str
    ) -> None:
        self._kind, self._jobs, self._traffic, self._event_log = kind, jobs, traffic, event_log
        self._parts, self._encoder = Parts(), codec.JobEncoder(agreement)
        self._repeated = set[int]()

    def write(self, client: int) -> RecordDict:
        """The message for this client; its parts count as sent from then on."""
        job = self._jobs[client]
        parts = self._parts.of(job)
        missing = self._traffic.send(client, parts)
        nbytes = sum(part.nbytes for part in missing.values())
        entry: dict[str, Any] = {"what": self._kind, "client": client, "round": job.round + 1}
        self._event_log.write("sent", **entry, bytes=nbytes, parts=list(missing))
        return self._encoder.job(job, parts, missing)

    def may_repeat(self, client: int) -> bool:
        """May the client be sent its job in full? Once it may: from then on it counts as holding nothing."""
        if client in self._repeated:
            return False
        self._repeated.add(client)
        self._traffic.held.pop(client, None)
        return True
