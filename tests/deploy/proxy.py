"""A TCP proxy that can be cut, mended, and made to hang up."""

import socket
import struct
import time
from contextlib import suppress
from threading import Event, Thread

RESET = struct.pack("ii", 1, 0)  # SO_LINGER, with which a socket that is closed resets its connection


class Proxy:
    """Forwards a port to another, but while it is cut; where nothing listens there, connections are reset."""

    def __init__(self, port: int, to: int) -> None:
        self.port, self._to, self._open, self._ends = port, to, Event(), False
        self._carried: list[socket.socket] = []
        self._open.set()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=64)
        Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Forward nothing."""
        self._open.clear()

    def mend(self) -> None:
        """Forward again, what was held first."""
        self._open.set()

    def hang_up(self, seconds: float) -> None:
        """End every connection at once and in order, new ones too: so does a balancer that has no server behind it."""
        self._ends = True
        for s in self._carried:
            with suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
        self._carried.clear()
        time.sleep(seconds)
        self._ends = False

    def close(self) -> None:
        self._listener.close()
        self._open.set()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                self._open.wait()
                if self._ends:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self._to))
            except ConnectionRefusedError:
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                near.close()
                continue
            except OSError:
                return
            self._carried += near, far
            for a, b in ((near, far), (far, near)):
                Thread(target=self._carry, args=(a, b), daemon=True).start()

    def _carry(self, a: socket.socket, b: socket.socket) -> None:
        with suppress(OSError):
            while data := a.recv(1 << 16):
                self._open.wait()
                b.sendall(data)
        for s in (a, b):
            with suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
