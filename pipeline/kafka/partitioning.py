"""Which partition a record with a key belongs to, by the rule of Kafka's own clients."""

from __future__ import annotations

from aiokafka.partitioner import murmur2


def partition_of(key: str | bytes, partition_count: int) -> int:
    """Return the partition of a key: its murmur2 hash without the sign, modulo the number of partitions."""
    raw = key.encode() if isinstance(key, str) else key
    return int((murmur2(raw) & 0x7FFF_FFFF) % partition_count)
