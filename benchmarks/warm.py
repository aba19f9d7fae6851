"""A round of three clients with a real model: a warm worker beside each SuperNode, against a model loaded per message.

    python -m benchmarks.warm --model MINILM [--rounds 4] [--json benchmarks/warm.json]

Real processes on loopback, Flower's SuperLink and SuperNodes among them, first all warm, then all cold, in one run. A
round is one job a client and one evaluation of its own model, so that each client's model is needed twice. Most of what
is left warm is Flower's own: a new process a message, and polls of seconds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from statistics import median

from fedlora.deployment.processes import free_port

WORDS = ("dull", "clever", "warm", "flat", "bright", "poor", "fine", "great", "long", "film", "well", "made")


def main() -> None:
    """Measure both, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the base model")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = {how: play(folder / how, options.model, options.rounds, how) for how in ("warm", "cold")}
    typical = {how: median(rounds[1:]) for how, rounds in seconds.items()}  # the first loads the model in both
    ratio = typical["cold"] / typical["warm"]
    print("| worker | first round, s | later rounds, median s |\n|---|---|---|")
    for how, rounds in seconds.items():
        print(f"| {how} | {rounds[0]:.1f} | {typical[how]:.1f} |")
    print(f"cold over warm: {ratio:.1f}")
    options.json.write_text(json.dumps({"seconds": seconds, "cold_over_warm": round(ratio, 2)}, indent=1) + "\n")


def play(folder: Path, model: str, rounds: int, how: str) -> list[float]:
    """Seconds of each round of a run."""
    folder.mkdir()
    port = free_port()
    own = ["--cold"] if how == "cold" else []
    agreed = ["--data.labels", "bad,good", "--data.holdout", "0.3"]  # a client's own, whatever the server names
    with started(folder) as start:
        settings = ["--clients", "3", "--cohort", "3", "--rounds", str(rounds)]
        settings += ["--model", model, "--model.task", "classify"]
        settings += [*agreed, "--train.steps", "1", "--server.wait", "600"]
        server = start("server", ["--insecure", "--out", "run", "--host", "127.0.0.1", "--port", str(port), *settings])
        for i in range(3):
            write(folder / f"client_{i}.jsonl", i)
            who = ["--insecure", "--server", f"127.0.0.1:{port}", "--id", str(i), "--state", f"state-{i}"]
            start("client", [*who, "--data", f"client_{i}.jsonl", "--model", model, "--threads", "1", *agreed, *own])
        if server.wait() != 0:
            sys.exit((folder / "out").read_text())
    return [json.loads(line)["seconds"] for line in (folder / "run" / "rounds.jsonl").read_text().splitlines()]


def write(path: Path, seed: int) -> None:
    """Forty made-up examples: what is measured is the way to the model, not what it learns."""
    draw = Random(seed)
    rows = [{"text": " ".join(draw.choices(WORDS, k=12)), "label": draw.choice(["bad", "good"])} for _ in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def started(folder: Path) -> Iterator["Start"]:
    """A way to start fedlora's commands in a folder; they are ended at the end."""
    start = Start(folder)
    try:
        yield start
    finally:
        for process in start.running:
            process.terminate()
        for process in start.running:
            process.wait()
        time.sleep(1)


class Start:
    """Starts commands, and remembers them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.running = folder, list[subprocess.Popen[bytes]]()

    def __call__(self, command: str, words: Sequence[str]) -> "subprocess.Popen[bytes]":
        with (self.folder / "out").open("ab") as out:
            line = [sys.executable, "-m", "fedlora", command, *words]
            self.running.append(subprocess.Popen(line, cwd=self.folder, stdout=out, stderr=subprocess.STDOUT))
        return self.running[-1]


if __name__ == "__main__":
    main()
