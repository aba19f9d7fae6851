"""What the server's command has the SuperLink do: register clients' keys, submit a run, look at it, stop it.

Flower 1.41's Control API has no authentication in its open version, so it must be reachable from the server alone. Its
own command line neither tells a node's name nor its key, so this file, and no other, uses the client behind it.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import httpx
import tomli_w
from flwr.cli.build import build_fab_from_files
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedlora import __version__
from fedlora.deployment.provision import public_key
from fedlora.errors import FedloraError

ENDED = "finished"
T = TypeVar("T")


class ControlError(FedloraError):
    """The SuperLink did not do what it was asked for."""


@dataclass(frozen=True)
class Control:
    """A SuperLink's Control API."""

    address: str  # host:port
    certificate: Path | None  # of the authority; none: no TLS

    def wait(self, seconds: float, alive: Callable[[], bool] = lambda: True) -> None:
        """Until it answers. Raises `ControlError` when it does not in so many seconds, or is no longer alive."""
        end, scheme = time.monotonic() + seconds, "https" if self.certificate else "http"
        verify = str(self.certificate) if self.certificate else True
        while alive() and time.monotonic() < end:
            try:
                if httpx.get(f"{scheme}://{self.address}/health", verify=verify, timeout=3, trust_env=False).is_success:
                    return
            except httpx.HTTPError:
                time.sleep(0.2)
        raise ControlError(f"the SuperLink at {self.address} does not answer; see its log, and that the port is free")

    def register(self, keys: Mapping[str, Path]) -> dict[str, int]:
        """Let the clients with these public keys in, by name, and no others; each one's node."""
        known = {bytes(n.public_key): int(n.node_id) for n in self._nodes() if n.status != "deleted"}
        wanted = {name: public_key_to_bytes(public_key(path)) for name, path in keys.items()}
        for key, node in known.items():
            if key not in wanted.values():
                self._ask(lambda c, node=node: c.UnregisterNode(UnregisterNodeRequest(node_id=node)))  # type: ignore[misc]
        nodes = {}
        for name, key in wanted.items():
            if key not in known:
                request = RegisterNodeRequest(public_key=key, name=name)
                known[key] = int(self._ask(lambda c, r=request: c.RegisterNode(r)).node_id)  # type: ignore[misc]
            nodes[name] = known[key]
        return nodes

    def submit(self, settings: Mapping[str, Any]) -> int:
        """Start a run of the installed fedlora; its id. The bundle that is sent has no code, only its name."""
        project = {"name": "fedlora-run", "version": __version__, "dependencies": ["flwr"]}
        components = {
            "serverapp": "fedlora.server.deployment.app:app",
            "clientapp": "fedlora.client.deployment.app:app",
        }
        flower = {"app": {"publisher": "fedlora", "components": components, "config": dict(settings)}}
        text = tomli_w.dumps({"project": project, "tool": {"flwr": flower}})
        content, _ = build_fab_from_files({"pyproject.toml": text.encode()})
        request = StartRunRequest(fab=Fab(hash_str=sha256(content).hexdigest(), content=content))
        return int(self._ask(lambda c: c.StartRun(request)).run_id)

    def ended(self, run: int) -> str | None:
        """How the run ended, in Flower's words; none while it goes on."""
        found = self._ask(lambda c: c.ListRuns(ListRunsRequest(run_id=run))).run_dict.get(run)
        if found is None:
            return "the SuperLink does not know it"
        status = found.status
        return f"{status.sub_status}: {status.details}" if status.status == ENDED else None

    def stop_all(self) -> None:
        """Stop what a command before this one has left running: it would be handed out again."""
        runs = self._ask(lambda c: c.ListRuns(ListRunsRequest())).run_dict
        for id, run in runs.items():
            if run.status.status != ENDED:
                self.stop(id)

    def stop(self, run: int) -> None:
        """Stop a run."""
        self._ask(lambda c: c.StopRun(StopRunRequest(run_id=run)))

    def _nodes(self) -> list[Any]:
        return list(self._ask(lambda c: c.ListNodes(ListNodesRequest())).nodes_info)

    def _ask(self, what: Callable[[ControlHttpClient], T]) -> T:
        client = ControlHttpClient.from_server_address(
            server_address=self.address,
            insecure=self.certificate is None,
            root_certificates=self.certificate.read_bytes() if self.certificate else None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )
        try:
            return what(client)
        except Exception as e:  # httpx's, protobuf's and Flower's own
            raise ControlError(f"the SuperLink at {self.address} refused: {type(e).__name__}: {e}") from e
        finally:
            client.close()
