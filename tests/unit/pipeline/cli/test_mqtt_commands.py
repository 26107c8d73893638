"""`millpond pub` and `millpond sub` against a broker that answers as a test says."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner, Result

from millpond.pipeline.cli.main import app
from millpond.schemas.errors import MillpondError

CONNECT, SUBSCRIBE = 1, 8  # types of packets (MQTT 3.1.1, 2.2.1)
ACCEPTED = b"\x20\x02\x00\x00"

Answer = Callable[[int, bytes], bytes | None]


def read_exactly(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        more = connection.recv(count - len(found))
        if not more:
            raise ConnectionError
        found += more
    return found


@contextmanager
def broker(answer: Answer) -> Iterator[int]:
    """A broker at the port, for one connection. `answer` gets each packet; None closes the connection."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            try:
                while True:
                    kind, length = read_exactly(connection, 2)
                    said = answer(kind >> 4, read_exactly(connection, length))
                    if said is None:
                        return
                    connection.sendall(said)
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(30)


def millpond(port: int, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "-h", "127.0.0.1", "-p", str(port)])


def accepting(then: Answer) -> Answer:
    return lambda kind, body: ACCEPTED if kind == CONNECT else then(kind, body)


@pytest.mark.timeout(9)  # aiomqtt gives up after 10 s
@pytest.mark.parametrize(
    ("command", "answer", "said"),
    [
        (("pub", "-t", "a", "-q", "1"), lambda *_: b"\x20\x02\x00\x05", "Not authorized"),
        (("sub", "-t", "a"), lambda *_: b"\x20\x02\x00\x04", "Bad user name or password"),
        (("pub", "-t", "a", "-q", "1"), accepting(lambda *_: None), "closed the connection"),
        (("sub", "-t", "a"), accepting(lambda *_: None), "closed the connection"),
        (
            ("sub", "-t", "a", "-t", "b"),
            accepting(lambda _, body: b"\x90\x04" + body[:2] + b"\x00\x80"),
            "refuses the subscription to b",
        ),
    ],
)
def test_what_a_broker_refuses_is_said(command: tuple[str, ...], answer: Answer, said: str) -> None:
    with broker(answer) as port:
        done = millpond(port, *command)
    assert isinstance(done.exception, MillpondError)
    assert said in str(done.exception)
    assert "timed out" not in str(done.exception)


@pytest.mark.parametrize("file", [False, True])
def test_a_user_name_and_a_password_are_sent(
    file: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    secret = tmp_path_factory.mktemp("secret") / "password"
    secret.write_text("oats\n")
    seen: list[bytes] = []

    def answer(kind: int, body: bytes) -> bytes | None:
        seen.append(body)
        return ACCEPTED if kind == CONNECT else b""

    with broker(answer) as port:
        option = ("--password-file", str(secret)) if file else ("-P", "oats")
        assert millpond(port, "pub", "-t", "a", "-u", "miller", *option).exit_code == 0
    assert seen[0].endswith(b"\x00\x06miller\x00\x04oats")


def test_several_filters_are_subscribed_and_no_message_is_waited_for() -> None:
    filters: list[bytes] = []

    def answer(kind: int, body: bytes) -> bytes | None:
        if kind != SUBSCRIBE:
            return b""
        filters.append(body[2:])
        return b"\x90\x04" + body[:2] + b"\x00\x00"

    with broker(accepting(answer)) as port:
        assert millpond(port, "sub", "-t", "a", "-t", "b/#", "-C", "0").exit_code == 0
    assert filters == [b"\x00\x01a\x00\x00\x03b/#\x00"]
