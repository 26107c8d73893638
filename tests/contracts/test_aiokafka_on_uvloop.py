"""A write to a connection that has just broken, on uvloop: the event loop of our processes."""

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
def restored_event_loop() -> Iterator[None]:
    """Restore the event loop policy and aiokafka's `send` for the other tests."""
    policy = asyncio.get_event_loop_policy()
    yield
    asyncio.set_event_loop_policy(policy)
    AIOKafkaConnection.send = SEND


async def send_on_a_broken_connection(bootstrap: str) -> None:
    host, _, port = bootstrap.rpartition(":")
    connection = await create_conn(host, int(port))
    assert (await connection.send(MetadataRequest([]))).brokers
    connection._writer.transport.abort()
    # The loop closes the connection now. aiokafka's reader does not know it yet.
    await asyncio.sleep(0)
    try:
        with pytest.raises(KafkaConnectionError, match="broken"):
            await connection.send(MetadataRequest([]))
        assert not connection.connected()
    finally:
        connection.close()


def test_a_write_to_a_connection_that_has_just_broken_raises_a_kafka_error(
    kafka: str, restored_event_loop: None
) -> None:
    use_uvloop()
    with asyncio.Runner() as runner:
        assert isinstance(runner.get_loop(), uvloop.Loop)
        runner.run(send_on_a_broken_connection(kafka))


def test_without_our_correction_uvloop_raises_a_runtime_error(kafka: str) -> None:
    # Guards against: a correction that is no longer needed.
    with (
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        pytest.raises(RuntimeError, match="the handler is closed"),
    ):
        runner.run(send_on_a_broken_connection(kafka))
