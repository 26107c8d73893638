"""Which records are an agent's, and what they say: foreign bytes come this far and no further."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from millpond.agents.effects import DeadLetter
from millpond.agents.ports import Record
from millpond.schemas import codec, keys
from millpond.schemas.errors import DecodeError
from millpond.schemas.events import Event
from millpond.schemas.keys import Partition

# Record keys whose owner is remembered; past that the memory starts anew. With keys of 60 bytes about 2 MiB.
OWNED_KEYS_MAX: Final = 10_000


class RecordDecoder:
    """Reads the records of one partition; asks who owns a key once, and decodes nothing before."""

    def __init__(self, partition: Partition, owns: Callable[[str], bool]) -> None:
        """`owns` says of the key of an MQTT topic or client whether its records are this agent's."""
        self._partition, self._owns = partition, owns
        self._owned: dict[bytes | None, str | None] = {}  # raw key → the key as text if it is ours
        self.records_skipped = 0

    def forget(self) -> None:
        """Who owns what may have changed: ask again."""
        self._owned.clear()

    def event(self, record: Record) -> Event | DeadLetter | None:
        """The event of a record; a dead letter if nobody can read it; None if it is another agent's."""
        try:
            key = self._owned[record.key]
        except KeyError:
            key = self._own(record.key)
        if key is None:
            self.records_skipped += 1
            return None
        try:
            event = codec.decode(record.value)
            own_key = keys.record_key(event)
            if own_key != key:
                raise DecodeError(f"the record's key is {key!r}, but its event's is {own_key!r}")
        except DecodeError as error:
            return DeadLetter(record.offset, str(error))
        return event

    def _own(self, raw: bytes | None) -> str | None:
        """The key as text if its records are this agent's. A key nobody can read is as good as empty."""
        try:
            key = "" if raw is None else raw.decode()
        except UnicodeDecodeError:
            key = ""
        if key.startswith(keys.RESERVED_TOPIC_PREFIX):
            owned = key == keys.agent_record_key(self._partition.agent)
        else:
            owned = self._owns(key)
        if len(self._owned) >= OWNED_KEYS_MAX:
            self._owned.clear()
        self._owned[raw] = key if owned else None
        return self._owned[raw]
