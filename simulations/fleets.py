"""The fleet of a simulated run in this process, by what its settings say: which engine, and on a clock or not."""

from collections.abc import Callable
from pathlib import Path

from fedlora.client.policy import policy_of
from fedlora.config import Config
from fedlora.run.setup import RunSetup
from fedlora.server.rounds import Fleet
from fedlora.simulations.client_traces import client_traces
from fedlora.simulations.clock import ClockedFleet
from fedlora.simulations.serial import Serial
from fedlora.simulations.stacked import Stacked


def fleet_here(setup: RunSetup, folder: Path, answered: Callable[[int], None] = lambda _: None) -> Fleet:
    """The run's clients in this process, by one model; `folder` has one of each client's own."""
    engine = Serial if setup.config.engine == "serial" else Stacked
    return engine(setup.model, setup.clients_data, setup.ranks, folder, answered, policy_of(setup.config))


def on_clock(config: Config, fleet: Fleet) -> Fleet:
    """The fleet on a simulated clock, where its clients differ or arrive at any time; else as it is."""
    if not (config.simulation.on or config.server.mode == "async"):
        return fleet
    traces, threshold = client_traces(config.simulation, clients=config.clients, seed=config.seed), config.secure.needed
    return ClockedFleet(fleet, traces, config.seed, config.server, threshold=threshold)
