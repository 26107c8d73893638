"""What aiokafka makes of a connection that has just broken, on the event loop that our processes run on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import uvloop
from aiokafka.conn import AIOKafkaConnection, create_conn
from aiokafka.errors import KafkaConnectionError
from aiokafka.protocol.metadata import MetadataRequest

from millpond.pipeline.process.event_loop import use_uvloop

SEND = AIOKafkaConnection.send


@pytest.fixture
def as_before() -> Iterator[None]:
    """The other tests' event loops are asyncio's."""
    policy = asyncio.get_event_loop_policy()
    yield
    asyncio.set_event_loop_policy(policy)
    AIOKafkaConnection.send = SEND


async def send_on_a_broken_connection(bootstrap: str) -> None:
    host, _, port = bootstrap.rpartition(":")
    connection = await create_conn(host, int(port))
    assert (await connection.send(MetadataRequest([]))).brokers
    connection._writer.transport.abort()
    await asyncio.sleep(0)  # the loop closes it, and has not woken aiokafka's reader yet
    try:
        with pytest.raises(KafkaConnectionError, match="broken"):
            await connection.send(MetadataRequest([]))
        assert not connection.connected()
    finally:
        connection.close()


def test_a_write_to_a_connection_that_has_just_broken_is_an_error_of_kafkas(
    kafka: str, as_before: None
) -> None:
    use_uvloop()
    with asyncio.Runner() as runner:
        assert isinstance(runner.get_loop(), uvloop.Loop)
        runner.run(send_on_a_broken_connection(kafka))


def test_it_is_uvloop_that_says_it_otherwise(kafka: str) -> None:
    with (
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        pytest.raises(RuntimeError, match="the handler is closed"),
    ):
        runner.run(send_on_a_broken_connection(kafka))
