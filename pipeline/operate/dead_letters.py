"""Messages given up on, read from outside out of the stores of the agents that deliver."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import Struct

from millpond.agents.delivery.dead_messages import DEAD_LETTER_RETENTION_MS, DeadMessage, unpack
from millpond.agents.reads import ReadAllStates, ReadBody, ReadStates
from millpond.pipeline.operate.dead_letter_snapshot import DeadLetterSnapshot
from millpond.pipeline.settings import Settings
from millpond.pipeline.stores.redis.reader import StoreReader
from millpond.schemas.codec import payload_text
from millpond.schemas.errors import MillpondError
from millpond.schemas.events import AgentName, PayloadEncoding, QoS, Text, TimeMs
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules
from millpond.schemas.rules.rule import DELIVERY_AGENTS
from millpond.schemas.topics import matches

# Who keeps dead letters: the agents that deliver.
AGENTS: Final[tuple[AgentName, ...]] = tuple(dict.fromkeys(DELIVERY_AGENTS.values()))
LOOKED_UP: Final = 500  # ids in one question
NAMED: Final = 5  # of what is wrong, in an error
RETENTION_DAYS: Final = DEAD_LETTER_RETENTION_MS // 86_400_000


class StoredMessage(Struct, frozen=True, kw_only=True):
    """The message itself, as the store has it: `payload` is text or base64, `published_at` whole seconds in ms."""

    client_id: Text
    qos: QoS
    retain: bool
    published_at: TimeMs
    expires_at: TimeMs | None
    payload: str
    payload_encoding: PayloadEncoding


class FoundDeadLetter(NamedTuple):
    """A dead letter, and which agent keeps it."""

    agent: AgentName
    dead: DeadMessage

    def describe(self) -> dict[str, Any]:
        """All that is known of it; times are ms since the epoch."""
        kept_until = self.dead.at + DEAD_LETTER_RETENTION_MS
        return {**msgspec.structs.asdict(self.dead), "agent": self.agent, "kept_until": kept_until}


async def scan(
    settings: Settings, rules: Rules, topic_filter: str | None
) -> AsyncIterator[FoundDeadLetter]:
    """All dead letters of topics that match, in no order; one that comes or goes meanwhile may be missed, or told
    twice.
    """
    for agent in AGENTS:
        async with StoreReader(rules.pool(agent)) as reader:
            for number in range(settings.kafka.partitions):
                partition, cursor = Partition(settings.app, agent, number), -1
                while cursor:
                    read = ReadAllStates(max(cursor, 0), "dead")
                    ((cursor, states),) = await reader.read(partition, [read])
                    for dead in map(unpack, states.values()):
                        if dead is None or dead.requeued:
                            continue
                        if topic_filter is None or matches(topic_filter, dead.topic):
                            yield FoundDeadLetter(agent, dead)


async def find(
    settings: Settings, rules: Rules, message_ids: Iterable[str]
) -> list[FoundDeadLetter]:
    """The dead letters among these ids, in their order.

    Raises:
        MillpondError: some of them are none; it names them.
    """
    asked = list(dict.fromkeys(message_ids))
    # What is no UTF-8 on the command line is nobody's id.
    possible = [each for each in asked if _is_text(each)]
    found: dict[str, list[FoundDeadLetter]] = {}
    for agent in AGENTS:
        async with StoreReader(rules.pool(agent)) as reader:
            for number in range(settings.kafka.partitions):
                partition = Partition(settings.app, agent, number)
                for first in range(0, len(possible), LOOKED_UP):
                    read = ReadStates(tuple(possible[first : first + LOOKED_UP]), "dead")
                    (states,) = await reader.read(partition, [read])
                    for message_id, dead in zip(states, map(unpack, states.values()), strict=True):
                        if dead is not None and not dead.requeued:
                            found.setdefault(message_id, []).append(FoundDeadLetter(agent, dead))
    missing = [each for each in asked if each not in found]
    if missing:
        raise no_such(missing)
    return [each for message_id in asked for each in found[message_id]]


def no_such(missing: Sequence[str]) -> MillpondError:
    """The error that names ids which are no dead letters."""
    return MillpondError(
        f"not among the dead letters: {_named(missing)} (never there, or requeued, dropped, or given up on more than"
        f" {RETENTION_DAYS} days ago); `millpond dead-letters list` shows those that there are"
    )


async def show(
    settings: Settings, rules: Rules, message_id: str
) -> tuple[FoundDeadLetter, StoredMessage | None]:
    """One dead letter with its message; without, if the store has lost that.

    Raises:
        MillpondError: it is no dead letter.
    """
    found = (await find(settings, rules, [message_id]))[0]
    async with StoreReader(rules.pool(found.agent)) as reader:
        partition = Partition(settings.app, found.agent, 0)  # any: bodies are the store's own
        (body,) = await reader.read(partition, [ReadBody(message_id)])
    return found, stored_message(message_id, body)


def stored_message(message_id: str, body: dict[str, bytes]) -> StoredMessage | None:
    """The message in the body of that id; None if it is gone, or somebody else's key is in its place."""
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


def carried_out(rules: Rules, found: FoundDeadLetter) -> bool:
    """Whether an order about it reaches who keeps it: each agent reads only of topics that its rules are for."""
    return rules.owner(found.dead.topic) == found.agent


async def pick(
    settings: Settings, rules: Rules, message_ids: Sequence[str]
) -> list[FoundDeadLetter]:
    """The dead letters of these ids, of which all can be ordered about.

    Raises:
        MillpondError: one is no dead letter, or of a topic that has no delivery rule any more.
    """
    found = await find(settings, rules, message_ids)
    stranded = [each for each in found if not carried_out(rules, each)]
    if stranded:
        topics = list(dict.fromkeys(each.dead.topic for each in stranded))
        raise MillpondError(
            f"no agent would carry it out for {_named([each.dead.message_id for each in stranded])}: give"
            f" {_named(topics)} the delivery rule again that it had, in the workers' configuration and in this one"
        )
    return found


async def take(
    settings: Settings, rules: Rules, topic_filter: str | None, snapshot: DeadLetterSnapshot
) -> int:
    """Put what there is now, of topics that match, into a snapshot; how many were left out, of topics that have no
    delivery rule any more.
    """
    left_out = 0
    async for found in scan(settings, rules, topic_filter):
        if carried_out(rules, found):
            snapshot.add(*found)
        else:
            left_out += 1
    return left_out


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _named(texts: Sequence[str]) -> str:
    named = ", ".join(map(repr, texts[:NAMED]))
    return named if len(texts) <= NAMED else f"{named} and {len(texts) - NAMED} more"
