"""The generic Flower ServerApp: it hands its Grid to whoever runs the rounds."""

from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp


def server_app(serve: Callable[[Grid], None]) -> ServerApp:
    """An app that hands its Grid to `serve`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        serve(grid)

    return app
