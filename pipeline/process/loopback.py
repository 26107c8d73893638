"""Listeners on loopback answer loopback only: a page that a browser shows must not reach them under a name of its own.

A web site may give its own host name the address 127.0.0.1 (DNS rebinding). The browser of a visitor then sends the
requests of that site to this machine. The header Host still holds the site's name, and Origin its address.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

LOCALHOST = "localhost"


def is_loopback(host: str) -> bool:
    """True if `host`, a name or an address without a port, is of this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == LOCALHOST


def host_allowed(listens_at: str, host_header: str) -> bool:
    """True if a listener at `listens_at` may answer a request for this Host (RFC 9110, 7.2).

    A listener that other machines reach answers to every name.
    """
    return not is_loopback(listens_at) or is_loopback(_name(f"//{host_header}"))


def origin_allowed(
    origin: str | None, host_header: str, allowed: Collection[str] | None, page_port: int
) -> bool:
    """True if a client that names this Origin may open a WebSocket (RFC 6455, 10.2).

    - A client that is no browser sends no Origin, or the listener's own address, as paho-mqtt does. No page has that
      origin, since the listener serves none. A host name could be another site's that resolves to this machine, so the
      address counts only if it is an IP address or localhost.
    - `allowed` are the origins that the user configured. With None, the pages are those that this machine serves at
      `page_port`.
    """
    if origin is None:
        return True
    name = _name(origin)
    if origin.partition("://")[2] == host_header and (is_loopback(name) or _is_address(name)):
        return True
    if allowed is not None:
        return origin in allowed
    try:
        port = urlsplit(origin).port
    except ValueError:
        return False
    return is_loopback(name) and port == page_port


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _name(address: str) -> str:
    """The host of an address; empty if there is none."""
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""
