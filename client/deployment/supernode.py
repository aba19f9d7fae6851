"""Flower's SuperNode with a client certificate, which its own command line cannot present.

    python -m fedlora.client.deployment.supernode FOLDER --superlink HOST:PORT --root-certificates ca.crt ...

FOLDER holds tls.crt and tls.key; what follows are the options of `flower-supernode`. This file, and no other of the
client's side, uses private modules of Flower's: it puts a maker of clients with a certificate in place of Flower's own.
"""

import ssl
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supernode import fleet_http_connection
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient


@dataclass(frozen=True)
class CertifiedClients:
    """Makes Flower's clients of the Fleet API, each of which presents the certificate in this folder."""

    folder: Path

    def from_server_address(
        self,
        server_address: str,
        insecure: bool,
        root_certificates: bytes | str | None,
        interceptors: Sequence[ProtobufClientInterceptor],
    ) -> FleetHttpClient:
        """A client of this server, as Flower's own method makes one; a connection without TLS has no certificate."""
        if insecure or not isinstance(root_certificates, bytes):
            return FleetHttpClient.from_server_address(server_address, insecure, root_certificates, interceptors)
        context = ssl.create_default_context(cadata=root_certificates.decode("ascii"))
        context.load_cert_chain(self.folder / "tls.crt", self.folder / "tls.key")
        return FleetHttpClient(f"https://{server_address}", interceptors=interceptors, verify=context)


def main() -> None:
    """Run Flower's SuperNode; the first argument is the folder with the certificate."""
    vars(fleet_http_connection)["FleetHttpClient"] = CertifiedClients(Path(sys.argv.pop(1)))
    flower_supernode()


if __name__ == "__main__":
    main()
