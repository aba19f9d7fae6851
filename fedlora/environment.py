"""Environment variables that libraries read when they are imported, and a warning that one gives then.

By some they send nothing to their makers and show nothing of their own. By another, threads of one operation that wait
for the next sleep, and do not spin: on a machine that has other work too, spinning ones take the processor from the
very thread that they wait for (`python -m benchmarks.spinning`; the figures are in benchmarks/README.md).
"""

import os
import warnings
from pathlib import Path

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}


def configure_libraries() -> None:
    """Set these variables for this process and those that it starts, where nobody has; call it before torch loads.

    In a notebook without ipywidgets tqdm warns that its bars will be plain; nothing here shows one.
    """
    for name, value in (QUIET | WAITING).items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", message="IProgress not found")


def no_proxy(*more: str) -> dict[str, str]:
    """The variables that keep connections within this machine, and to hosts in `more`, away from the site's proxy."""
    known = os.environ.get("NO_PROXY", os.environ.get("no_proxy", ""))
    hosts = dict.fromkeys(filter(None, (*known.split(","), "127.0.0.1", "localhost", "::1", *more)))
    return {"NO_PROXY": ",".join(hosts), "no_proxy": ",".join(hosts)}


def user_cache() -> Path:
    """The folder of what can be computed again: FEDLORA_CACHE, or `fedlora` where the desktop's caches are."""
    given, desktop = os.environ.get("FEDLORA_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(given).expanduser() if given else Path(desktop or "~/.cache").expanduser() / "fedlora"
