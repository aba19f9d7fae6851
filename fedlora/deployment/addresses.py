"""Addresses that people write, HOST or HOST:PORT, and that programs print."""

import re
from ipaddress import IPv6Address

from fedlora.errors import ConfigError

PORT = 8443  # of a server, unless another is given
_FORM = re.compile(r"(?:\[(?P<ipv6>[0-9a-fA-F:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::(?P<port>\d{1,5}))?")


def join_address(host: str, port: int) -> str:
    """HOST:PORT, with an IPv6 address in brackets.

    >>> join_address("::1", 8443)
    '[::1]:8443'
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_of(address: str) -> str:
    """The host of HOST:PORT, without the brackets of an IPv6 address; empty for an empty address.

    >>> host_of("[::1]:8443")
    '::1'
    """
    return address.rpartition(":")[0].strip("[]")


def server_address(text: str, port: int = PORT) -> str:
    """HOST:PORT of a server from HOST or HOST:PORT. Raises `ConfigError` for a URL and for whatever else is neither.

    >>> server_address("fed.example.org"), server_address("::1"), server_address("[::1]:9443")
    ('fed.example.org:8443', '[::1]:8443', '[::1]:9443')
    """
    text = text.strip()
    if _is_ipv6(text):
        return join_address(text, port)
    found = _FORM.fullmatch(text)
    if not found or (found["ipv6"] and not _is_ipv6(found["ipv6"])) or not 0 < int(found["port"] or port) < 2**16:
        raise ConfigError(
            f'--server "{text}" is not an address: give HOST or HOST:PORT, without https:// and without a path, '
            "and an IPv6 address with a port in brackets, as in [::1]:8443"
        )
    return join_address(found["ipv6"] or found["name"], int(found["port"] or port))


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return "%" not in text
