"""The log of a replay: it ends at a fixed offset, and takes no output."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
from functools import partial
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition

from millpond.agents.ports import LogBounds, OutgoingRecord, Record
from millpond.pipeline.kafka.retrying import persist
from millpond.schemas.errors import BrokenInvariant
from millpond.schemas.keys import Partition

POLL_TIMEOUT_MS: Final = 1_000
# Of one fetch: several full batches, so that few batches end early at the border of a fetch.
FETCH_BYTES_MAX: Final = 4 * 1024 * 1024


class ReplayLog:
    """See `millpond.agents.ports.Log`. It serves one partition, by a consumer without a group. The first read connects.

    Its committed offset is its end. So the driver produces no output of any record (`Outbox.out_until`).
    """

    def __init__(self, client_options: dict[str, Any], topic: str, run_records_max: int) -> None:
        """`topic` is the name in Kafka. Call `limit` first."""
        self._options, self._topic, self._run_records_max = client_options, topic, run_records_max
        self._bounds: LogBounds | None = None
        self._reader: AIOKafkaConsumer | None = None

    def limit(self, bounds: LogBounds) -> None:
        """Set the offsets to replay. The end counts as committed."""
        self._bounds = bounds._replace(committed=bounds.end)

    async def bounds(self, partition: Partition) -> LogBounds:
        assert self._bounds is not None, "call limit() first"
        return self._bounds

    async def read(
        self, partition: Partition, start: int, stop: int
    ) -> AsyncIterator[Sequence[Record]]:
        """See `millpond.agents.ports.Log`. Offsets without a record are skipped."""
        if start >= stop:
            return
        source = TopicPartition(self._topic, partition.number)
        reader = await persist(partial(self._connected, source))
        first = (await persist(partial(reader.beginning_offsets, [source])))[source]
        position = max(start, first)
        reader.seek(source, position)
        while position < stop:
            fetched = await persist(
                partial(
                    reader.getmany,
                    source,
                    timeout_ms=POLL_TIMEOUT_MS,
                    max_records=self._run_records_max,
                )
            )
            # The consumer's position passes offsets without a record, also at the end. The last record's offset does not.
            position = await persist(partial(reader.position, source))
            found = fetched.get(source, ())
            if found and found[-1].offset >= stop:
                found = [record for record in found if record.offset < stop]
            run = [Record(each.offset, each.timestamp, each.key, each.value) for each in found]
            if run:
                yield run

    async def _connected(self, source: TopicPartition) -> AIOKafkaConsumer:
        if self._reader is None:
            reader = AIOKafkaConsumer(
                enable_auto_commit=False,
                auto_offset_reset="earliest",
                max_partition_fetch_bytes=FETCH_BYTES_MAX,
                **self._options,
            )
            try:
                await reader.start()
            except BaseException:
                await reader.stop()
                raise
            reader.assign([source])
            self._reader = reader
        return self._reader

    def produce(self, records: Sequence[OutgoingRecord]) -> Awaitable[None]:
        """Refuse. A replay produces nothing."""
        raise BrokenInvariant(f"a replay was about to produce to Kafka topic {records[0].topic}")

    async def stop(self) -> None:
        """Disconnect from Kafka."""
        if self._reader is not None:
            await self._reader.stop()
