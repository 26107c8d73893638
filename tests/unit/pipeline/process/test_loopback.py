"""Which requests a listener on loopback answers."""

from __future__ import annotations

import pytest

from millpond.pipeline.process.loopback import host_allowed, is_loopback, origin_allowed

PAGE_PORT = 8080


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.53", "::1", "[::1]", "localhost", "LOCALHOST"]
)
def test_loopback_has_these_names(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["", "0.0.0.0", "192.0.2.1", "localhost.evil.example", "evil.example"]
)
def test_other_names_are_not_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1:9000", True), ("localhost", True), ("[::1]:9000", True),
        ("evil.example", False), ("evil.example:9000", False), ("", False), ("[", False),
        ("localhost@evil.example", False),
    ],
)  # fmt: skip
def test_a_listener_on_loopback_answers_for_loopback(host: str, allowed: bool) -> None:
    assert host_allowed("127.0.0.1", host) == allowed
    assert host_allowed("0.0.0.0", host)


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (None, True), ("http://127.0.0.1:8080", True), ("http://localhost:8080", True),
        ("http://[::1]:8080", True), ("http://127.0.0.1:8081", False), ("http://127.0.0.1", False),
        ("http://evil.example:8080", False), ("http://evil.example", False), ("null", False),
        ("", False), ("file://", False), ("http://127.0.0.1:8080@evil.example:8080", False),
        ("http://127.0.0.1:x", False), ("http://[", False), ("http://127.0.0.1:8083", True),
    ],
)  # fmt: skip
def test_only_the_page_of_this_machine_opens_a_websocket(origin: str | None, allowed: bool) -> None:
    assert origin_allowed(origin, "127.0.0.1:8083", None, PAGE_PORT) == allowed


def test_configured_origins_replace_the_page_of_this_machine() -> None:
    allowed = ["https://console.example"]
    assert origin_allowed("https://console.example", "127.0.0.1:8083", allowed, PAGE_PORT)
    assert origin_allowed(None, "127.0.0.1:8083", allowed, PAGE_PORT)
    assert not origin_allowed("http://127.0.0.1:8080", "127.0.0.1:8083", allowed, PAGE_PORT)
    assert not origin_allowed(
        "https://console.example.evil.example", "127.0.0.1:8083", allowed, PAGE_PORT
    )


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("192.0.2.7:8083", True), ("[2001:db8::7]:8083", True), ("localhost:8083", True),
        ("broker.example:8083", False),  # a name could be any site's
    ],
)  # fmt: skip
def test_a_client_that_names_the_listeners_own_address_is_no_page(host: str, allowed: bool) -> None:
    """paho-mqtt sends the address that it connects to as its Origin."""
    assert origin_allowed(f"http://{host}", host, None, PAGE_PORT) == allowed
    assert not origin_allowed("http://192.0.2.8:8083", host, None, PAGE_PORT)
