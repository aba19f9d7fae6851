"""What one client's reply does is that client's failure: the one place where its errors are caught.

A reply is content of a stranger: it may be damaged, empty, or made so that a library falls over it. Whatever is done
with one reply alone goes through `failure_of`; so no client's nonsense ends the run, and none is looked for by name.
"""

import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import httpx

from fedlora.errors import Failure, FailureKind, WireError

NO_CLIENTS = httpx.HTTPError, OSError  # errors of the network and of the server's own disk: no client's doing
P = ParamSpec("P")
X = TypeVar("X")
log = logging.getLogger("fedlora")


def failure_of(work: Callable[P, X], *args: P.args, **kwargs: P.kwargs) -> X | Failure:
    """What `work` makes of one client's reply; where it raises, the failure of that client, which is refused.

    Raises errors of the network and of the server's own disk as they are.
    """
    try:
        return work(*args, **kwargs)
    except NO_CLIENTS:
        raise
    except WireError as e:
        return Failure(str(e), FailureKind.REFUSED)
    except Exception as e:
        log.debug("an answer was refused", exc_info=True)
        return Failure(f"an answer could not be unpacked: {type(e).__name__}", FailureKind.REFUSED)
