"""Addresses as people write them: what is none is refused with the right form."""

import pytest

from fedlora.deployment.addresses import host_of, join_address, server_address
from fedlora.errors import ConfigError

TAKEN = {
    "fed.example.org": "fed.example.org:8443",
    "fed.example.org:9443": "fed.example.org:9443",
    " localhost ": "localhost:8443",
    "10.0.0.7:80": "10.0.0.7:80",
    "::1": "[::1]:8443",
    "2001:db8::7": "[2001:db8::7]:8443",
    "[::1]": "[::1]:8443",
    "[::1]:9443": "[::1]:9443",
}
REFUSED = [
    *("https://localhost:18443/fed", "https://localhost", "localhost/fed", "localhost:", "localhost:0"),
    *("localhost:99999", "localhost:port", "[localhost]:1", "::1:99999:z", "fe80::1%eth0", "", "a b", "user@host:1"),
]


@pytest.mark.parametrize(("written", "address"), TAKEN.items())
def test_an_address_gets_the_usual_port_and_brackets(written: str, address: str) -> None:
    assert server_address(written) == address


@pytest.mark.parametrize("written", REFUSED)
def test_whatever_else_is_refused_with_the_right_form(written: str) -> None:
    with pytest.raises(ConfigError, match="is not an address: give HOST or HOST:PORT, without https://"):
        server_address(written)


def test_an_address_has_its_host_again() -> None:
    assert [host_of(join_address(host, 1)) for host in ("::1", "localhost")] == ["::1", "localhost"]
