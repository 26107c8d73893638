"""Which records are an agent's, and which events they hold. Bytes from outside reach no code behind the decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from millpond.agents.effects import DeadLetter
from millpond.agents.ports import Record
from millpond.schemas import codec, keys
from millpond.schemas.errors import DecodeError
from millpond.schemas.events import Event
from millpond.schemas.keys import Partition

# Record keys whose owner is remembered. A full memory is cleared. With keys of 60 bytes it takes about 2 MiB.
OWNED_KEYS_MAX: Final = 10_000


class RecordDecoder:
    """Decodes the records of one partition that the agent owns. The key decides that, before anything is decoded."""

    def __init__(self, partition: Partition, owns: Callable[[str], bool]) -> None:
        """`owns` is true for the MQTT topics or client ids whose records are this agent's."""
        self._partition, self._owns = partition, owns
        # Raw key → the key as text if the agent owns it, else None.
        self._owned: dict[bytes | None, str | None] = {}
        self.records_skipped = 0

    def forget_owners(self) -> None:
        """Forget the owner of every key: new rules may change it."""
        self._owned.clear()

    def decode(self, record: Record) -> Event | DeadLetter | None:
        """Return the event of a record.

        A record that does not decode, or whose key is not its event's, gives a dead letter. A record of another agent
        gives None.
        """
        try:
            key = self._owned[record.key]
        except KeyError:
            key = self._owned_key(record.key)
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

    def _owned_key(self, raw: bytes | None) -> str | None:
        """Return the key as text if the agent owns it, else None; remember the answer.

        A key that is not UTF-8 counts as the empty key, so exactly one agent owns its records and reports them.
        """
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
