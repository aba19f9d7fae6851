"""The agreement that the server of a run offers to its clients."""

from pathlib import Path

from fedlora import config as configuration
from fedlora.messages.agreement import RunAgreement, agreed_settings

from .compose import compose
from .setup import ELSEWHERE, RunSetup
from .sides import asked_of_clients


def agreement_for_clients(setup: RunSetup) -> RunAgreement:
    """What the server of this run says to its clients that it will ask of them."""
    flat = configuration.flatten(setup.config) | {"model.path": _model_name(setup.config.model.path)}
    plain = {key: ", ".join(value) if isinstance(value, list) else value for key, value in flat.items()}
    strategy = compose(setup.config, setup.start, setup.ranks)
    asked = asked_of_clients(strategy, setup.config.rounds, setup.config.lora.rank)
    return RunAgreement(settings=agreed_settings(plain), **asked._asdict(), base=setup.model.fingerprint)


def _model_name(path: str) -> str:
    """A hub id as it is; of a folder its last name, marked as the server's own."""
    return f"{ELSEWHERE}{Path(path).name}" if path and Path(path).is_dir() else path
