"""Run the plain Flower app in Flower's simulation, and print the final scores as JSON.

    python -m benchmarks.peers --model MODEL --data train.csv --eval-data test.csv [--keep-model]

One actor a core, of one thread each.
"""

import argparse
import json
import os
from typing import Any

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--targets", default="query,value")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--eval-limit", type=int, default=100)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--keep-model", action="store_true", help="keep the model of a process from call to call")
    return parser.parse_args()


def main() -> None:
    """Parse, simulate, print."""
    os.environ.update(QUIET)
    given = vars(arguments())
    clients, rounds = given.pop("clients"), given.pop("rounds")
    settings: dict[str, Any] = {name.replace("_", "-"): value for name, value in given.items()}
    from flwr.simulation import run_simulation

    from benchmarks.peers.client_app import app
    from benchmarks.peers.server_app import server_app

    found: dict[str, float] = {}
    backend: Any = {
        "init_args": {"num_cpus": os.cpu_count(), "include_dashboard": False, "log_to_driver": False},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    }
    run_simulation(server_app(settings, rounds, found), app, num_supernodes=clients, backend_config=backend)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
