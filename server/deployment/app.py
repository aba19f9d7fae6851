"""The Flower ServerApp: it drives the rounds over a Fleet on Flower's Grid."""

import logging
import os
import time
from pathlib import Path
from threading import Thread

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from fedlora import config as configuration
from fedlora.deployment.processes import is_alive
from fedlora.errors import FedloraError
from fedlora.run.console import ConsoleProgress
from fedlora.run.directory import RunDirectory
from fedlora.run.setup import prepare
from fedlora.server.deployment.handoff import FOLDER, PARENT, Handoff, RunOrder, Status
from fedlora.server.fleet import FleetRules, FlowerFleet
from fedlora.server.run import RunObserver, run_rounds
from fedlora.storage.event_log import EventLog

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """The run that `fedlora server` has ordered, or one of its own from Flower's run config."""
    if os.environ.get(FOLDER):
        _ordered(grid, Handoff(Path(os.environ[FOLDER])))
        return
    setup = prepare(configuration.build(dict(context.run_config), {"engine": "flower"}))
    folder = RunDirectory(Path("runs") / f"flower-{context.run_id}")
    folder.create(setup.config)
    screen = ConsoleProgress()
    try:
        config = setup.config
        rules = FleetRules(config.clients, deadline=config.server.deadline, largest_step=config.server.largest_step)
        run_rounds(setup, FlowerFleet(grid, rules, screen.answered, screen.waiting), folder, screen)
    finally:
        screen.close()


def _ordered(grid: Grid, handoff: Handoff) -> None:
    """Do it, and leave word of how it ended: the command ends, or begins anew, by that."""
    Thread(target=_follow, args=(int(os.environ[PARENT]),), daemon=True).start()
    before = handoff.status()
    attempt = before.attempt if before else 0
    handoff.put_status(Status("running", os.getpid(), attempt=attempt))
    try:
        with handoff.screen.open("a", encoding="utf-8") as out:
            screen = ConsoleProgress(Console(file=out, highlight=False, soft_wrap=True, width=200))
            _serve(grid, handoff, handoff.order(), screen)
    except FedloraError as e:
        handoff.put_status(Status("failed", os.getpid(), screen.named(str(e)), attempt))
        raise
    except BaseException as e:
        handoff.put_status(Status("crashed", os.getpid(), f"{type(e).__name__}: {e}", attempt))
        raise
    handoff.put_status(Status("finished", os.getpid(), attempt=attempt))


def _follow(parent: int) -> None:
    """End with the command that ordered this run, however it ends: the next one begins a ServerApp of its own."""
    while is_alive(parent, "fedlora"):
        time.sleep(1)
    os._exit(1)


def _serve(grid: Grid, handoff: Handoff, order: RunOrder, screen: ConsoleProgress) -> None:
    from fedlora.deployment.json_logs import log_json
    from fedlora.run.setup import (
        for_server,
        settings_for_clients,  # they load torch
    )
    from fedlora.server.deployment.prometheus import Monitor

    folder, names = RunDirectory(handoff.run), {i: name for name, i in order.names.items()}
    screen.names = names
    config = configuration.build(order.given)
    ids = max([config.clients, *(i + 1 for i in names)])
    setup = for_server(config, ids)
    folder.create(setup.config, again=True)
    log_json(handoff.run / "server.log", run=folder.run)
    logging.getLogger("fedlora").addHandler(screen.handler())
    monitor = Monitor(screen)
    if order.metrics:
        host, _, port = order.metrics.rpartition(":")
        monitor.serve(host or "127.0.0.1", int(port))
    nodes = {int(node): i for node, i in order.nodes.items()} if order.nodes is not None else None
    policy, settings = setup.config.server, setup.config
    rules = FleetRules(
        clients=settings.clients,
        quorum=policy.quorum,
        wait=policy.wait,
        deadline=policy.deadline,
        needed=policy.quorum if policy.below_quorum == "stop" else 0.0,
        largest_step=policy.largest_step,
        run=folder.run,
        nodes=nodes,
        ranks=setup.ranks,
        told=settings_for_clients(settings),
        base=setup.model.fingerprint,
        patient=True,
    )
    show: RunObserver = monitor
    fleet = FlowerFleet(grid, rules, show.answered, show.waiting)
    fleet.online = monitor.online
    fleet.journal = EventLog(handoff.run / "audit.jsonl", side="server", run=folder.run)
    run_rounds(setup, fleet, folder, show)
