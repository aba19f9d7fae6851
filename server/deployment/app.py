"""The Flower ServerApp: it runs the rounds over a Fleet on Flower's Grid."""

import logging
import os
import time
from contextlib import closing
from pathlib import Path
from threading import Thread

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from fedlora import config as configuration
from fedlora.deployment.json_logs import log_json
from fedlora.deployment.processes import is_alive
from fedlora.errors import FedloraError
from fedlora.run.agreement import agreement_for_clients
from fedlora.run.asynchronous import refuse_simulated
from fedlora.run.console import ConsoleProgress
from fedlora.run.directory import RunDirectory
from fedlora.run.refused import REFUSALS
from fedlora.run.setup import RunSetup, for_server, prepare
from fedlora.server.deployment.handoff import FOLDER, PARENT, Handoff, RunOrder, Status
from fedlora.server.deployment.prometheus import PrometheusExporter
from fedlora.server.deployment.run_log import RunLog
from fedlora.server.fleet import FlowerFleet
from fedlora.server.fleet_rules import FleetRules, rules_of
from fedlora.server.run import run_rounds
from fedlora.storage.event_log import EventLog

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what `fedlora server` handed over; where Flower's own commands started the app, run by its run config."""
    if os.environ.get(FOLDER):
        _run_handed_over(grid, Handoff(Path(os.environ[FOLDER])))
    else:
        _run_by_flower(grid, context)


def _run_by_flower(grid: Grid, context: Context) -> None:
    setup = prepare(configuration.build(dict(context.run_config), {"engine": "flower"}))
    config = setup.config
    refuse_simulated(config)
    folder = RunDirectory(Path("runs") / f"flower-{context.run_id}")
    screen = ConsoleProgress()
    with folder.only_writer(), closing(screen):
        folder.create(config, files=setup.files)
        rules = rules_of(config.server, config.clients, threshold=config.secure.needed)
        run_rounds(setup, FlowerFleet(grid, rules, screen.answered, screen.waiting), folder, screen)


def _run_handed_over(grid: Grid, handoff: Handoff) -> None:
    """Run, and write how it ended: by that the command ends, or begins a new ServerApp."""
    Thread(target=_end_with, args=(int(os.environ[PARENT]),), daemon=True).start()
    before = handoff.status()
    attempt = before.attempt if before else 0
    handoff.put_status(Status("running", os.getpid(), attempt=attempt))
    try:
        with handoff.screen.open("a", encoding="utf-8") as out:
            screen = ConsoleProgress(Console(file=out, highlight=False, soft_wrap=True, width=200))
            _serve(grid, handoff, handoff.order(), screen)
    except FedloraError as e:
        state = "refused" if isinstance(e, REFUSALS) else "failed"
        handoff.put_status(Status(state, os.getpid(), screen.named(str(e)), attempt))
        raise
    except BaseException as e:
        handoff.put_status(Status("crashed", os.getpid(), f"{type(e).__name__}: {e}", attempt))
        raise
    handoff.put_status(Status("finished", os.getpid(), attempt=attempt))


def _end_with(command: int) -> None:
    """End this process when that of the command has ended, however: the next command begins a ServerApp of its own."""
    while is_alive(command, "fedlora"):
        time.sleep(1)
    os._exit(1)


def _serve(grid: Grid, handoff: Handoff, order: RunOrder, screen: ConsoleProgress) -> None:
    """Run the rounds of the run that was handed over, with its logs and metrics."""
    folder = RunDirectory(handoff.run)
    config = configuration.build(order.given)
    highest = max(order.names.values(), default=-1)
    setup = for_server(config, max(config.clients, highest + 1))
    folder.create(setup.config, again=True, files=setup.files)
    screen.names = {i: name for name, i in order.names.items()}
    log_json(handoff.run / "server.log", run=folder.run)
    logging.getLogger("fedlora").addHandler(screen.handler())
    exporter = _exporter(screen, order.metrics)
    fleet = FlowerFleet(grid, _rules(setup, order, folder.run), exporter.answered, exporter.waiting)
    fleet.online = exporter.online
    fleet.joined, fleet.begins_without = exporter.joined, exporter.begins_without
    fleet.event_log = EventLog(handoff.run / "audit.jsonl", names=screen.names, side="server", run=folder.run)
    run_rounds(setup, fleet, folder, exporter, screen.names)


def _exporter(screen: ConsoleProgress, address: str) -> PrometheusExporter:
    """An exporter that tells the screen too, and serves metrics at HOST:PORT, if there is an address."""
    exporter = PrometheusExporter(RunLog(screen, screen.names), screen.names)
    if address:
        host, _, port = address.rpartition(":")
        exporter.serve(host or "127.0.0.1", int(port))
    return exporter


def _rules(setup: RunSetup, order: RunOrder, run: str) -> FleetRules:
    """The rules by which the fleet takes clients and answers."""
    nodes, clients = None, setup.config.clients
    if order.nodes is not None:
        nodes = {int(node): client for node, client in order.nodes.items()}
        clients = min(clients, len(nodes))  # those that were removed since the run began are not waited for
    policy = setup.config.server
    return rules_of(
        policy,
        clients,
        threshold=setup.config.secure.needed,
        quorum=policy.quorum,
        wait=policy.wait,
        run=run,
        nodes=nodes,
        ranks=setup.ranks,
        agreement=agreement_for_clients(setup),
        base=setup.model.fingerprint,
        patient=True,
    )
