"""`millpond pub` and `millpond sub`: a small MQTT client, for machines without one."""

from __future__ import annotations

import asyncio
import os
import stat
import sys
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from millpond.pipeline.cli.common import DEFAULT_DATA, ConfigOption, DataOption, load_settings
from millpond.pipeline.process.extras import extra
from millpond.pipeline.process.signals import run
from millpond.pipeline.settings import PORT_MAX, read_secret
from millpond.schemas.errors import ConfigError, MillpondError
from millpond.schemas.topics import filter_error, topic_name_error

PAYLOAD_BYTES_MAX: Final = 268_435_455  # the largest Remaining Length (MQTT 3.1.1, 2.2.3)
ANSWER_TIMEOUT_S: Final = 5.0  # for CONNACK, SUBACK, and the acknowledgement of a publish
REFUSED: Final = 0x80  # the least reason code of a refusal (MQTT 3.1.1, 3.9.3)
IN_FLIGHT_MAX: Final = (
    20  # publishes that wait for an acknowledgement; a usual default of MQTT clients
)

HostOption = Annotated[
    str | None,
    typer.Option("--host", "-h", help="The broker's host, if not the one in the settings."),
]
PortOption = Annotated[
    int | None,
    typer.Option(
        "--port",
        "-p",
        min=1,
        max=PORT_MAX,
        help="The broker's port, if not the one in the settings.",
    ),
]
QosOption = Annotated[int, typer.Option("--qos", "-q", min=0, max=2, help="Quality of service.")]
IdOption = Annotated[str | None, typer.Option("--id", "-i", help="The client id.")]
UserOption = Annotated[str | None, typer.Option("--username", "-u", help="The user name.")]
PasswordOption = Annotated[
    str | None,
    typer.Option(
        "--password", "-P", help="The password. Other users of this machine can see it meanwhile."
    ),
]
PasswordFileOption = Annotated[
    str | None, typer.Option("--password-file", help="A file whose first line is the password.")
]


def _address(
    host: str | None, port: int | None, config: Path | None, data: Path
) -> tuple[str, int]:
    settings, _ = load_settings(config, data)
    return host or settings.bridge.host, port or settings.bridge.mqtt_port


def _login(username: str | None, password: str | None, file: str | None) -> dict[str, Any]:
    """Return the client's arguments for a user name and a password, and its time-out."""
    if password is not None and file is not None:
        raise ConfigError("--password and --password-file exclude each other")
    if username is None and (password is not None or file is not None):
        raise ConfigError("a password needs a --username")
    if file is not None:
        password = read_secret(file, "--password-file")
    return {"username": username, "password": password, "timeout": ANSWER_TIMEOUT_S}


async def _unless_closed(client: Any, work: Coroutine[Any, Any, None], closed: str) -> None:
    """Do the work; raise `closed` when the broker closes the connection. aiomqtt alone would wait until a time-out.

    Raises:
        MillpondError: the broker closed the connection.
    """
    disconnected: asyncio.Future[None] = client._disconnected  # noqa: SLF001  aiomqtt has no other sign
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait((working, disconnected), return_when=asyncio.FIRST_COMPLETED)
        failed = working.done() and working.exception() is not None
        if disconnected.done() and (failed or not working.done()):
            raise MillpondError(closed)
        await working
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        if disconnected.done():
            disconnected.exception()  # read, or asyncio would log it


def _failed(address: tuple[str, int], error: BaseException) -> MillpondError:
    reason = str(error)
    if reason == "Operation timed out":  # aiomqtt's sentence, without a subject
        reason = f"the broker has not answered for {ANSWER_TIMEOUT_S:g} s; it waits while Kafka does not answer"
    return MillpondError(f"MQTT at {address[0]}:{address[1]}: {reason}")


def _check_topic(error: str | None) -> None:
    if error is not None:
        raise ConfigError(f"--topic: {error}")


def pub(
    topic: Annotated[str, typer.Option("--topic", "-t", help="The topic.")],
    message: Annotated[str | None, typer.Option("--message", "-m", help="The payload.")] = None,
    lines: Annotated[
        bool, typer.Option("--lines", "-l", help="Publish each line of stdin as a message.")
    ] = False,
    qos: QosOption = 0,
    retain: Annotated[
        bool, typer.Option("--retain", "-r", help="Publish a retained message.")
    ] = False,
    client_id: IdOption = None,
    username: UserOption = None,
    password: PasswordOption = None,
    password_file: PasswordFileOption = None,
    host: HostOption = None,
    port: PortOption = None,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Publish one message, or one for each line of stdin, and wait until the broker has acknowledged all."""
    with extra("local", "`millpond pub`"):
        import aiomqtt  # noqa: PLC0415

    _check_topic(topic_name_error(topic))
    address = _address(host, port, config, data)
    login = _login(username, password, password_file)

    async def publish() -> None:
        async with aiomqtt.Client(*address, identifier=client_id, **login) as client:
            closed = f"the broker closed the connection; it may refuse a publish to {topic}: its log says more"
            await _unless_closed(client, publish_all(client), closed)

    async def publish_all(client: aiomqtt.Client) -> None:
        async with asyncio.TaskGroup() as publishes:
            room = asyncio.Semaphore(IN_FLIGHT_MAX)
            client.pending_calls_threshold = IN_FLIGHT_MAX  # aiomqtt logs a warning above this
            async for payload in _lines_of_stdin() if lines else _one(message or ""):
                await room.acquire()
                acknowledged = publishes.create_task(
                    client.publish(topic, payload, qos=qos, retain=retain)
                )
                acknowledged.add_done_callback(lambda _: room.release())

    try:
        run(publish())
    except* (aiomqtt.MqttError, MillpondError) as errors:
        raise _failed(address, _first(errors)) from errors


def _first(error: BaseException) -> BaseException:
    """Return the first error of groups in groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _one(payload: str) -> AsyncIterator[bytes]:
    yield payload.encode()


async def _lines_of_stdin() -> AsyncIterator[bytes]:
    """Read stdin while the client sends its keep-alives.

    A thread would do that, too, but an interrupt could not end its read.
    """
    stdin = sys.stdin.buffer
    if stat.S_ISREG(
        os.fstat(stdin.fileno()).st_mode
    ):  # no event loop can wait for a file: it never blocks
        for line in stdin:
            yield line.removesuffix(b"\n")
        return
    reader = asyncio.StreamReader(limit=PAYLOAD_BYTES_MAX)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), stdin
    )
    async for line in reader:
        yield line.removesuffix(b"\n")


def sub(
    topics: Annotated[
        list[str], typer.Option("--topic", "-t", help="A topic filter; may be repeated.")
    ],
    count: Annotated[
        int | None, typer.Option("--count", "-C", min=0, help="Stop after this many messages.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print the topic before each payload.")
    ] = False,
    keep_session: Annotated[
        bool, typer.Option("--keep-session", "-c", help="Keep the session (clean session = 0).")
    ] = False,
    exit_subscribed: Annotated[
        bool, typer.Option("--exit", "-E", help="Subscribe and exit.")
    ] = False,
    no_ack: Annotated[
        bool, typer.Option("--no-ack", help="Do not acknowledge the messages.")
    ] = False,
    qos: QosOption = 0,
    client_id: IdOption = None,
    username: UserOption = None,
    password: PasswordOption = None,
    password_file: PasswordFileOption = None,
    host: HostOption = None,
    port: PortOption = None,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Subscribe, and print the payload of each message on a line, until Ctrl-C."""
    with extra("local", "`millpond sub`"):
        import aiomqtt  # noqa: PLC0415

    for topic in topics:
        _check_topic(filter_error(topic))
    address = _address(host, port, config, data)
    login = _login(username, password, password_file)

    async def subscribe() -> None:
        async with aiomqtt.Client(
            *address, identifier=client_id, clean_session=not keep_session, **login
        ) as client:
            await _unless_closed(client, show(client), "the broker closed the connection")

    async def show(client: aiomqtt.Client) -> None:
        client._client.manual_ack_set(no_ack)  # noqa: SLF001  aiomqtt has no option for it
        granted = await client.subscribe([(topic, qos) for topic in topics])
        for topic, code in zip(topics, granted, strict=True):
            value: Any = getattr(code, "value", code)  # a ReasonCode, or its number
            if value >= REFUSED:
                raise MillpondError(f"the broker refuses the subscription to {topic}: {code}")
        if exit_subscribed or count == 0:
            return
        received = 0
        async for message in client.messages:
            prefix = f"{message.topic} ".encode() if verbose else b""
            payload = message.payload
            body = payload if isinstance(payload, bytes) else str(payload).encode()
            sys.stdout.buffer.write(prefix + body + b"\n")
            sys.stdout.buffer.flush()
            received += 1
            if received == count:
                return

    try:
        run(subscribe())
    except (aiomqtt.MqttError, MillpondError) as error:
        raise _failed(address, error) from error
    except KeyboardInterrupt:
        return
