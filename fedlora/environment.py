"""Environment variables by which libraries send nothing to their makers and show nothing of their own."""

import os

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def quiet_libraries() -> None:
    """Set these variables for this process, where nobody has; libraries read them when they are imported."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def no_proxy(*more: str) -> dict[str, str]:
    """The variables that keep connections within this machine, and to hosts in `more`, away from the site's proxy."""
    known = os.environ.get("NO_PROXY", os.environ.get("no_proxy", ""))
    hosts = dict.fromkeys(filter(None, (*known.split(","), "127.0.0.1", "localhost", "::1", *more)))
    return {"NO_PROXY": ",".join(hosts), "no_proxy": ",".join(hosts)}
