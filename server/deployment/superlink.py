"""A client of the SuperLink's Control API: register clients' keys, submit a run, look at it, stop it.

Flower 1.41's Control API has no authentication in its open version, so only the server may be able to reach it.
Flower's own command line shows neither a node's name nor its key, so this file, and no other, uses the Python client
behind that command line.
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
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedlora import __version__
from fedlora.deployment.provision import public_key
from fedlora.errors import FedloraError

ENDED = "finished"
T = TypeVar("T")


class ControlError(FedloraError):
    """The SuperLink does not answer, or refused what it was asked to do."""


@dataclass(frozen=True)
class Control:
    """The Control API of one SuperLink. Every method raises `ControlError`."""

    address: str  # HOST:PORT
    certificate: Path | None  # the authority's; none: no TLS

    def wait(self, seconds: float, alive: Callable[[], bool] = lambda: True) -> None:
        """Wait until the SuperLink answers, for so many seconds at most, and while `alive` says that it runs."""
        end = time.monotonic() + seconds
        while alive() and time.monotonic() < end:
            if self._is_healthy():
                return
            time.sleep(0.2)
        raise ControlError(f"the SuperLink at {self.address} does not answer; see its log, and that the port is free")

    def _is_healthy(self) -> bool:
        scheme, verify = ("https", str(self.certificate)) if self.certificate else ("http", True)
        try:
            answer = httpx.get(f"{scheme}://{self.address}/health", verify=verify, timeout=3, trust_env=False)
        except httpx.HTTPError:
            return False
        return answer.is_success

    def register(self, keys: Mapping[str, Path]) -> dict[str, int]:
        """Let in the clients with these public keys (name -> file), and no others; return the node of each name.

        A SuperLink never forgets a key: it goes on listing the nodes of those that it lets in no more, and takes none
        of their keys again.
        """
        listed = self._ask(lambda client: client.ListNodes(ListNodesRequest())).nodes_info
        known = {bytes(node.public_key): int(node.node_id) for node in listed if node.status != NodeStatus.UNREGISTERED}
        dropped = {bytes(node.public_key) for node in listed} - known.keys()
        wanted = {name: public_key_to_bytes(public_key(path)) for name, path in keys.items()}
        for name, key in wanted.items():
            if key in dropped:
                raise ControlError(
                    f"the key {keys[name]} was removed from this run earlier, and a removed key is not taken again: "
                    f"provision {name} under another name, or begin a new run with another --out"
                )
        for key in known.keys() - set(wanted.values()):
            self._unregister(known[key])
        return {name: known[key] if key in known else self._register(name, key) for name, key in wanted.items()}

    def _register(self, name: str, key: bytes) -> int:
        request = RegisterNodeRequest(public_key=key, name=name)
        return int(self._ask(lambda client: client.RegisterNode(request)).node_id)

    def _unregister(self, node: int) -> None:
        """Let in a node no more; one that the SuperLink no longer knows is as good."""
        try:
            self._ask(lambda client: client.UnregisterNode(UnregisterNodeRequest(node_id=node)))
        except ControlError as e:
            if not _is_not_found(e.__cause__):
                raise

    def submit(self, settings: Mapping[str, Any]) -> int:
        """Start a run of the installed fedlora and return its id. The bundle that is sent holds no code, only names."""
        project = {"name": "fedlora-run", "version": __version__, "dependencies": ["flwr"]}
        components = {
            "serverapp": "fedlora.server.deployment.app:app",
            "clientapp": "fedlora.client.deployment.app:app",
        }
        flower = {"app": {"publisher": "fedlora", "components": components, "config": dict(settings)}}
        text = tomli_w.dumps({"project": project, "tool": {"flwr": flower}})
        content, _ = build_fab_from_files({"pyproject.toml": text.encode()})
        request = StartRunRequest(fab=Fab(hash_str=sha256(content).hexdigest(), content=content))
        return int(self._ask(lambda client: client.StartRun(request)).run_id)

    def ended(self, run: int) -> str | None:
        """How the run ended, in Flower's words; none while the run goes on."""
        found = self._ask(lambda client: client.ListRuns(ListRunsRequest(run_id=run))).run_dict.get(run)
        if found is None:
            return "the SuperLink does not know it"
        status = found.status
        return f"{status.sub_status}: {status.details}" if status.status == ENDED else None

    def stop_all(self) -> None:
        """Stop all runs that an earlier command left: the SuperLink would hand them out again."""
        runs = self._ask(lambda client: client.ListRuns(ListRunsRequest())).run_dict
        for id, run in runs.items():
            if run.status.status != ENDED:
                self.stop(id)

    def stop(self, run: int) -> None:
        """Stop a run."""
        self._ask(lambda client: client.StopRun(StopRunRequest(run_id=run)))

    def _ask(self, call: Callable[[ControlHttpClient], T]) -> T:
        """The answer to a call by a client of its own."""
        client = ControlHttpClient.from_server_address(
            server_address=self.address,
            insecure=self.certificate is None,
            root_certificates=self.certificate.read_bytes() if self.certificate else None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )
        try:
            return call(client)
        except Exception as e:  # httpx's, protobuf's and Flower's own
            raise ControlError(f"the SuperLink at {self.address} refused: {type(e).__name__}: {e}") from e
        finally:
            client.close()


def _is_not_found(error: BaseException | None) -> bool:
    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.NOT_FOUND
