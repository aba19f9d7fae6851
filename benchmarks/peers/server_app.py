"""The server of the plain Flower app: FedAvg over all clients, and one evaluation at the end."""

from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from benchmarks.peers.task import Settings, encode, get_model, load_rows, scores


def server_app(settings: Settings, rounds: int, found: dict[str, float]) -> ServerApp:
    """A server that runs so many rounds, and leaves the final scores in `found`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        model: Any = get_model(settings)

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            if server_round < rounds:
                return None
            set_peft_model_state_dict(model, arrays.to_torch_state_dict())
            rows = load_rows(settings["eval-data"])
            step = max(1, len(rows) // settings["eval-limit"])
            chosen = rows.select(range(0, len(rows), step)[: settings["eval-limit"]])
            found.update(scores(model, settings, encode(chosen, settings)))
            return MetricRecord(dict(found))

        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0)
        arrays = ArrayRecord(get_peft_model_state_dict(model))
        strategy.start(grid, arrays, num_rounds=rounds, train_config=ConfigRecord(dict(settings)), evaluate_fn=evaluate)

    return app
