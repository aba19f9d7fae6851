"""The Flower ServerApp: it drives the rounds over a Fleet on Flower's Grid."""

from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora import config as configuration
from fedlora.console import Screen
from fedlora.folder import RunFolder
from fedlora.run import drive, prepare
from fedlora.server.fleet import FlowerFleet


def build(serve: Callable[[Grid], None]) -> ServerApp:
    """An app that hands its Grid to `serve`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        serve(grid)

    return app


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """A run of its own, from Flower's run config, into `runs/flower-<run id>`."""
    setup = prepare(configuration.build(dict(context.run_config), {"engine": "flower"}))
    folder = RunFolder(Path("runs") / f"flower-{context.run_id}")
    folder.create(setup.config)
    screen = Screen()
    try:
        fleet = FlowerFleet(grid, setup.config.clients, screen.answered, deadline=setup.config.server.deadline)
        drive(setup, fleet, folder, screen)
    finally:
        screen.close()
