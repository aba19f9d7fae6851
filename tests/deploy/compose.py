"""Bring docker-compose.yml up for real: train to the end, look at the walls, kill what can be killed, train to the end.

    python tests/deploy/compose.py --transcript transcript.txt    # builds the images first, without the cache
    python tests/deploy/compose.py build                          # the first half alone
    python tests/deploy/compose.py run                            # the second, with the images that are there

`docker compose` has to work, and fedlora has to be installed here, which loads the adapter; root is not needed. About 8
minutes on two busy cores, and up to 20 for the build.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = "fedlora-trial"
ROUND = re.compile(r"^\s*(\d+)/(\d+)\s+(\d+)/(\d+)\s")
KILL = "import os; os.kill(-1, 9)"  # all but the container's first process, which then ends, as after a crash
SECRETS = ("ca.key", "server.key", "superexec.secret", "client.key")
LONG = 900.0  # seconds that a run may take

WALLS = """
import os, socket, ssl, sys, urllib.error, urllib.request as u
def reached(host):
    try: socket.create_connection((host, 8000), 3).close()
    except OSError as e: return type(e).__name__
    return "reached"
def answer(path, body=None):
    safe = ssl.create_default_context(cafile="/credentials/ca.crt")
    try: return u.urlopen(u.Request("https://proxy:8443" + path, body), context=safe, timeout=10).status
    except urllib.error.HTTPError as e: return e.code
def writes(path):
    try: open(path, "w").close()
    except OSError as e: return e.strerror
    return "written"
print("user", os.getuid(), "| /credentials:", *sorted(os.listdir("/credentials")))
print("writing to /opt:", writes("/opt/x"), "| to /credentials:", writes("/credentials/x"))
print("superlink by name:", reached("superlink"), "| by address:", reached(sys.argv[1]))
print("through the proxy: /health", answer("/health"), *(f"| {p} {answer(p, b'')}" for p in (
    "/v1/control/list-runs", "/v1/control/start-run", "/v1/runtime/acquire-task", "/docs")))
"""


class Failed(Exception):
    """Something that must happen did not."""


@dataclass
class Transcript:
    """What happened, with the seconds since the start."""

    began: float = field(default_factory=time.monotonic)
    lines: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        for line in text.splitlines():
            self.lines.append(f"{time.monotonic() - self.began:6.0f} s  {line}".rstrip())
            print(self.lines[-1], flush=True)


@dataclass
class Federation:
    """The services of the compose file, under a project name of its own."""

    files: Sequence[Path]
    transcript: Transcript
    env: dict[str, str] = field(default_factory=lambda: {"FEDLORA_PORT": "18443"})

    def compose(self, *words: str, check: bool = True) -> str:
        files = [part for file in self.files for part in ("-f", str(file))]
        command = ["docker", "compose", "-p", PROJECT, "--project-directory", str(ROOT), *files, *words]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | self.env, check=False)
        if check and done.returncode:
            raise Failed(f"docker compose {' '.join(words)}: {(done.stderr or done.stdout)[-2000:]}")
        return done.stdout

    def inspect(self, service: str, form: str) -> str:
        container = self.compose("ps", "-aq", service).split()[0]
        return subprocess.check_output(["docker", "inspect", "-f", form, container], text=True).strip()

    def python(self, service: str, code: str, *words: str, check: bool = True) -> str:
        return self.compose("exec", "-T", service, "python", "-c", code, *words, check=check)

    def works(self, service: str) -> bool:
        """Is a message being worked on in this client's container?"""
        return "flwr-clientapp" in self.compose("top", service, check=False)

    def said(self, service: str) -> list[str]:
        """The lines of its container: `docker compose logs` puts control characters before each."""
        container = self.compose("ps", "-aq", service).split()[0]
        done = subprocess.run(["docker", "logs", container], capture_output=True, text=True, check=True)
        return (done.stdout + done.stderr).splitlines()

    def round(self) -> int:
        """The last round that the server says is finished; a new run has a new container."""
        return max((int(found[1]) for found in map(ROUND.match, self.said("server")) if found), default=0)

    def kill(self, service: str) -> None:
        """As the kernel does when memory runs out; `docker kill` would count as a wish to have it stopped."""
        before = int(self.inspect(service, "{{.RestartCount}}"))
        self.python(service, KILL, check=False)
        until(lambda: int(self.inspect(service, "{{.RestartCount}}")) > before, 60, f"{service} is started again")
        self.transcript.say(f"SIGKILL to every process of {service}; its restart policy has started it again")


def until(true: Callable[[], bool], seconds: float, what: str) -> float:
    """Wait; returns the seconds it took. Raises `Failed`."""
    began = time.monotonic()
    while not true():
        if time.monotonic() - began > seconds:
            raise Failed(f"not in {seconds:.0f} s: {what}")
        time.sleep(0.5)
    return time.monotonic() - began


def trained(at: Federation, run: str, rounds: int, attack: Callable[[], None] = lambda: None) -> Path:
    """Have a run trained to its end, with an attack in between; the folder that was taken out of the volume."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml", delete=False) as config:
        config.write(f"rounds = {rounds}\ncohort = 3\n")
    Path(config.name).chmod(0o644)
    at.env |= {"FEDLORA_RUN": run, "FEDLORA_CONFIG": config.name}
    at.transcript.say(f"docker compose up -d   (run {run}, {rounds} rounds)")
    at.compose("up", "-d", "--no-build")
    attack()
    took = until(lambda: at.inspect("server", "{{.State.Status}}") == "exited", LONG, "the server ends")
    code, restarts = at.inspect("server", "{{.State.ExitCode}} {{.RestartCount}}").split()
    for line in at.said("server"):
        if not line.startswith(("waiting", "load it", "curves")):
            at.transcript.say(f"   server | {line}")
    at.transcript.say(f"the server ended with {code}, after {took:.0f} s more; it was restarted {restarts} times")
    if code != "0":
        raise Failed(f"the server ended with {code}")
    folder = Path(tempfile.mkdtemp(prefix="fedlora-"))
    at.compose("cp", f"server:/runs/{run}", str(folder))
    Path(config.name).unlink()
    return folder / run


def judge(run: Path, rounds: int, transcript: Transcript) -> None:
    """Every round once, and an adapter that PEFT loads and that changes what the model says. Raises `Failed`."""
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    records = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    if [record["round"] for record in records] != list(range(1, rounds + 1)):
        raise Failed(f"rounds {[record['round'] for record in records]}, and not 1 to {rounds}")
    for record in records:
        for client, why in record["failed"].items():
            transcript.say(f"   round {record['round']}: client {client}: {why}")
    base = AutoModelForCausalLM.from_pretrained(ROOT / "fedlora" / "tiny", dtype=torch.float32)
    words = torch.arange(64)[None]
    with torch.no_grad():
        before = base(words).logits
        after = PeftModel.from_pretrained(base, str(run / "adapter"))(words).logits
    moved = (after - before).abs().max().item()
    numbers = sum(part.numel() for part in load_file(run / "adapter" / "adapter_model.safetensors").values())
    if not 0 < moved < float("inf"):
        raise Failed(f"the adapter moves logits by {moved}")
    transcript.say(f"the adapter from the volume: {numbers:,} numbers; PEFT loads it; logits move by up to {moved:.3g}")


def walls(at: Federation) -> None:
    """Who can see, reach and write what. Raises `Failed` where it is more than it should be."""
    for service in ("superlink", "server", "proxy", "client-1", "client-2", "client-3"):
        form = "{{.Config.User}} {{.HostConfig.ReadonlyRootfs}} {{.HostConfig.CapDrop}} {{.HostConfig.SecurityOpt}}"
        found = at.inspect(service, form)
        look = "import os; print(*sorted(f for _, _, fs in os.walk('/credentials') for f in fs))"
        sees = at.python(service, look).split() if at.inspect(service, "{{.State.Running}}") == "true" else []
        at.transcript.say(f"{service}: {found}; secrets: {' '.join(s for s in sees if s in SECRETS) or '-'}")
        if found != "10001:10001 true [ALL] [no-new-privileges:true]" or "ca.key" in sees:
            raise Failed(f"{service} is not closed: {found}, {sees}")
    address = at.inspect("superlink", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}")
    seen = at.python("client-1", WALLS, address)
    at.transcript.say("\n".join(f"   client-1 | {line}" for line in seen.splitlines()))
    closed = all(f"{path} 404" in seen for path in ("list-runs", "start-run", "acquire-task", "/docs"))
    if "/health 200" not in seen or not closed or "reached" in seen or "written" in seen:
        raise Failed(f"a wall has a hole: {seen}")


def attacked(at: Federation) -> None:
    """A client dies in the middle of a round, and the SuperLink in the middle of a later one."""
    until(lambda: at.round() >= 1, LONG, "round 1 is finished")
    until(lambda: at.works("client-2"), 120, "client-2 works")
    at.transcript.say(f"after round {at.round()}, with client-2 at work on the next:")
    at.kill("client-2")
    done = at.round()
    until(lambda: at.round() > done, LONG, "the round ends")
    until(lambda: at.works("client-1"), 120, "client-1 works")
    at.transcript.say(f"after round {at.round()}, with client-1 at work on the next:")
    at.kill("superlink")
    took = until(lambda: at.inspect("superlink", "{{.State.Health.Status}}") == "healthy", 120, "superlink is healthy")
    at.transcript.say(f"the SuperLink was healthy again {took:.0f} s later")


def build(at: Federation) -> None:
    began = time.monotonic()
    at.transcript.say("docker compose build --no-cache")
    at.compose("build", "--no-cache")
    at.transcript.say(f"built in {time.monotonic() - began:.0f} s")


def images(at: Federation) -> None:
    """What was built, and how big it is."""
    for image in sorted(set(at.compose("config", "--images").split())):
        size = subprocess.check_output(["docker", "image", "inspect", "-f", "{{.Size}}", image], text=True)
        at.transcript.say(f"{image}: {int(size) / 1e9:.2f} GB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", nargs="?", choices=("all", "build", "run"), default="all")
    parser.add_argument("--file", type=Path, action="append", default=[], help="one more compose file; repeatable")
    parser.add_argument("--transcript", type=Path, help="file for what was printed")
    parser.add_argument("--keep", action="store_true", help="leave containers and volumes where they are")
    options = parser.parse_args()
    transcript = Transcript()
    at = Federation([ROOT / "docker-compose.yml", *options.file], transcript)
    at.compose("down", "--volumes")
    try:
        if options.what != "run":
            build(at)
        images(at)
        if options.what != "build":
            judge(trained(at, "first", 3, lambda: walls(at)), 3, transcript)
            judge(trained(at, "second", 6, lambda: attacked(at)), 6, transcript)
        transcript.say("passed")
        return 0
    except Failed as e:
        transcript.say(f"FAILED: {e}")
        transcript.say(at.compose("logs", "--no-color", "--tail", "15", check=False))
        return 1
    finally:
        if options.transcript:
            options.transcript.write_text("\n".join(transcript.lines) + "\n")
        if not options.keep:
            at.compose("down", "--volumes", check=False)


if __name__ == "__main__":
    sys.exit(main())
