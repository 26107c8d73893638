"""The dead letters in the stores of the delivery agents, read from outside the agents.

Each agent keeps the dead letters of its topics, partition by partition, in the table `dead`. A requeued message stays
in that table, marked `requeued`, so that its body is kept: it is no dead letter any more. If the rules changed since,
another agent may own the topic now. Then no worker would apply an order about the dead letter.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import Struct

from millpond.agents.delivery.dead_messages import DEAD_LETTER_RETENTION_MS, DeadMessage, unpack
from millpond.agents.reads import ReadBody, ReadStates
from millpond.pipeline.operate.dead_letter_snapshot import DeadLetterSnapshot
from millpond.pipeline.operate.state_pages import pages
from millpond.pipeline.settings import Settings
from millpond.pipeline.stores.redis.reader import StoreReader
from millpond.schemas.codec import payload_text
from millpond.schemas.errors import MillpondError
from millpond.schemas.events import AgentName, PayloadEncoding, QoS, Text, TimeMs
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules
from millpond.schemas.rules.rule import DELIVERY_AGENTS
from millpond.schemas.topics import matches

# Only the agents that deliver keep dead letters.
AGENTS: Final[tuple[AgentName, ...]] = tuple(dict.fromkeys(DELIVERY_AGENTS.values()))
LOOKED_UP_AT_ONCE: Final = 500  # ids in one read
NAMED_MAX: Final = 5  # ids or topics in one error
RETENTION_DAYS: Final = DEAD_LETTER_RETENTION_MS // 86_400_000


class StoredMessage(Struct, frozen=True, kw_only=True):
    """A message as the store has it. `payload` is text or base64. `published_at` is in ms, but whole seconds."""

    client_id: Text
    qos: QoS
    retain: bool
    published_at: TimeMs
    expires_at: TimeMs | None
    payload: str
    payload_encoding: PayloadEncoding


class FoundDeadLetter(NamedTuple):
    """A dead letter, and the agent that keeps it."""

    agent: AgentName
    dead: DeadMessage

    def describe(self) -> dict[str, Any]:
        """The dead letter as a JSON object. Times are ms since the epoch."""
        kept_until = self.dead.at + DEAD_LETTER_RETENTION_MS
        return {**msgspec.structs.asdict(self.dead), "agent": self.agent, "kept_until": kept_until}


async def dead_letters_of(
    reader: StoreReader, partition: Partition, topic_filter: str | None = None
) -> AsyncIterator[DeadMessage]:
    """Read the dead letters of one partition, in no order. One that changes meanwhile may be missing or double."""
    async for page in pages(reader, partition, "dead"):
        for dead in map(unpack, page.values()):
            if dead is None or dead.requeued:
                continue
            if topic_filter is None or matches(topic_filter, dead.topic):
                yield dead


async def scan(
    settings: Settings, rules: Rules, topic_filter: str | None
) -> AsyncIterator[FoundDeadLetter]:
    """Read the dead letters of all partitions, in no order. One that changes meanwhile may be missing or double."""
    for agent in AGENTS:
        async with StoreReader(rules.pool(agent)) as reader:
            for number in range(settings.kafka.partitions):
                partition = Partition(settings.app, agent, number)
                async for dead in dead_letters_of(reader, partition, topic_filter):
                    yield FoundDeadLetter(agent, dead)


async def find(
    settings: Settings, rules: Rules, message_ids: Iterable[str]
) -> list[FoundDeadLetter]:
    """Find the dead letters with these ids, in the order of the ids.

    Raises:
        MillpondError: some ids are of no dead letter. The message names them.
    """
    asked = list(dict.fromkeys(message_ids))
    # An argument that is no UTF-8 cannot be the id of a message, and cannot be sent to Redis.
    possible = [each for each in asked if is_utf8(each)]
    found: dict[str, list[FoundDeadLetter]] = {}
    for agent in AGENTS:
        async with StoreReader(rules.pool(agent)) as reader:
            for number in range(settings.kafka.partitions):
                partition = Partition(settings.app, agent, number)
                for first in range(0, len(possible), LOOKED_UP_AT_ONCE):
                    read = ReadStates(tuple(possible[first : first + LOOKED_UP_AT_ONCE]), "dead")
                    (states,) = await reader.read(partition, [read])
                    for message_id, dead in zip(states, map(unpack, states.values()), strict=True):
                        if dead is not None and not dead.requeued:
                            found.setdefault(message_id, []).append(FoundDeadLetter(agent, dead))
    missing = [each for each in asked if each not in found]
    if missing:
        raise no_such(missing)
    return [each for message_id in asked for each in found[message_id]]


def no_such(missing: Sequence[str]) -> MillpondError:
    """The error about ids of which no agent keeps a dead letter."""
    return MillpondError(
        f"these ids are no dead letters: {_named(missing)} (unknown, requeued, dropped, or dead for more than"
        f" {RETENTION_DAYS} days); `millpond dead-letters list` lists all dead letters"
    )


async def show(
    settings: Settings, rules: Rules, message_id: str
) -> tuple[FoundDeadLetter, StoredMessage | None]:
    """Find one dead letter and its message. The message is None if the store no longer has its body.

    Raises:
        MillpondError: no dead letter has this id.
    """
    found = (await find(settings, rules, [message_id]))[0]
    async with StoreReader(rules.pool(found.agent)) as reader:
        # Bodies belong to no partition, so any number will do.
        partition = Partition(settings.app, found.agent, 0)
        (body,) = await reader.read(partition, [ReadBody(message_id)])
    return found, stored_message(message_id, body)


def stored_message(message_id: str, body: dict[str, bytes]) -> StoredMessage | None:
    """Decode the body of a message; None if there is none, or if another program has written something else there."""
    payload, encoding = payload_text(body.get("payload", b""))
    try:
        if body["id"].decode() != message_id:
            return None
        fields = {
            "client_id": body["from"].decode(),
            "qos": int(body["qos"]),
            "retain": body["retain"] == b"true",
            "published_at": int(body["ts"]) * 1000,
            "expires_at": int(body["expires_at"]) if "expires_at" in body else None,
            "payload": payload,
            "payload_encoding": encoding,
        }
        return msgspec.convert(fields, StoredMessage)
    except (KeyError, ValueError):
        return None


def has_owner(rules: Rules, found: FoundDeadLetter) -> bool:
    """True if the agent that keeps the dead letter owns its topic. Only then does a worker apply an order about it."""
    return rules.owner(found.dead.topic) == found.agent


async def find_owned(
    settings: Settings, rules: Rules, message_ids: Sequence[str]
) -> list[FoundDeadLetter]:
    """Find the dead letters with these ids, to write orders about them.

    Raises:
        MillpondError: an id is of no dead letter, or its topic has no delivery rule any more.
    """
    found = await find(settings, rules, message_ids)
    ownerless = [each for each in found if not has_owner(rules, each)]
    if ownerless:
        topics = list(dict.fromkeys(each.dead.topic for each in ownerless))
        raise MillpondError(
            f"no agent would apply the order for {_named([each.dead.message_id for each in ownerless])}: restore the"
            f" delivery rule of {_named(topics)}, in the workers' configuration and in this one"
        )
    return found


async def fill_snapshot(
    settings: Settings, rules: Rules, topic_filter: str | None, snapshot: DeadLetterSnapshot
) -> int:
    """Add the dead letters of matching topics to a snapshot, and return how many were left out.

    Those of topics without a delivery rule are left out: no agent would apply an order about them.
    """
    left_out = 0
    async for found in scan(settings, rules, topic_filter):
        if has_owner(rules, found):
            snapshot.add(*found)
        else:
            left_out += 1
    return left_out


def is_utf8(text: str) -> bool:
    """True if the text can be sent as UTF-8. Arguments of a command line may hold other bytes, as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _named(texts: Sequence[str]) -> str:
    named = ", ".join(map(repr, texts[:NAMED_MAX]))
    return named if len(texts) <= NAMED_MAX else f"{named} and {len(texts) - NAMED_MAX} more"
