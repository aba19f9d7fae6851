"""An HTTP proxy of a site, which lets connections through by CONNECT, and remembers where to."""

import socket
from contextlib import suppress
from threading import Thread


class ConnectProxy:
    """A proxy on loopback, in threads of this process."""

    def __init__(self) -> None:
        self.asked: list[str] = []  # HOST:PORT of every connection
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with suppress(OSError, ValueError), near:
            head = b""
            while b"\r\n\r\n" not in head:
                head += near.recv(4096)
            method, address, _ = head.split(b"\r\n")[0].decode().split(" ")
            assert method == "CONNECT"
            self.asked.append(address)
            host, _, port = address.rpartition(":")
            with socket.create_connection((host, int(port)), timeout=60) as far:
                near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                back = Thread(target=_copy, args=(far, near), daemon=True)
                back.start()
                _copy(near, far)
                back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
