"""Removal of everything that one agent has put into a store, and of nothing else.

The agent's private state names its public keys:

| removed | named by |
|---|---|
| index entries and their bodies | the owner of the index's topic, and the body (see below) |
| retained entries and their bodies | table `states` of messages, queue and pubsub: topic → message id |
| bodies of dead letters | table `dead` of queue and pubsub: message id |
| presence | table `states` of sessions: client ids, and the nodes on which they are online |
| views of read offsets | table `windows` of pubsub: subscriber and topic |
| private keys | their prefix |

**Which index entries are the agent's?** Another program may have added entries. An entry is the agent's if its body names
the same message id and topic. An entry without a body is the agent's if its score can be a time of the partition's log.

**Receipts stay.** A receipt without its message does not name its topic. The fold writes the same fields again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final

from millpond.agents.delivery import dead_messages
from millpond.agents.pubsub.state import shown, split_reader
from millpond.agents.sessions import state as sessions
from millpond.agents.topics import storage
from millpond.pipeline.kafka.partitioning import partition_of
from millpond.pipeline.stores.redis.connection import RedisCommand
from millpond.pipeline.stores.redis.keyspace import Keyspace
from millpond.pipeline.stores.redis.packing import BODY_FIELDS, PRESENCE_FIELDS
from millpond.schemas import keys
from millpond.schemas.events import AgentName
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules

PAGE_SIZE: Final = 500  # entries or states of one page, about
SCORE_MIN: Final = 10**15  # µs since the epoch, in the year 2001: no log is older


class Removal:
    """Removes what some partitions of one agent have put into a store."""

    def __init__(
        self,
        space: Keyspace,
        app: str,
        agent: AgentName,
        rules: Mapping[int, Rules],
        last_scores: Mapping[int, int],
        partition_count: int,
    ) -> None:
        """`rules` are the rules in force, by partition; they also say which partitions are removed.

        `last_scores` are the last scores that the partitions gave.
        """
        self._space, self._app, self._agent = space, app, agent
        self._rules, self._last_scores, self._count = rules, last_scores, partition_count

    def _partition(self, number: int) -> Partition:
        return Partition(self._app, self._agent, number)

    # -- entries and states --------------------------------------------------------------------------------

    async def entries(self) -> AsyncIterator[tuple[int, bytes, list[tuple[bytes, int]]]]:
        """Return the agent's index entries, page by page: partition, key of the index, message ids with scores."""
        if self._agent == "sessions":
            return
        prefix = keys.MESSAGES_PREFIX
        async for page in self._space.scan(prefix):
            kinds = await self._space.run([("TYPE", key) for key in page])
            for key, kind in zip(page, kinds, strict=True):
                topic = _text(key)[len(prefix) :]
                number = partition_of(topic, self._count)
                if kind != b"zset" or number not in self._rules:
                    continue
                if self._rules[number].owner(topic) == self._agent:
                    async for found in self._entries_of(number, key, topic):
                        yield number, key, found

    async def _entries_of(
        self, number: int, key: bytes, topic: str
    ) -> AsyncIterator[list[tuple[bytes, int]]]:
        cursor = b"0"
        while True:
            cursor, page = await self._space.call("ZSCAN", key, cursor, "COUNT", PAGE_SIZE)
            ids = page[::2]
            if ids:
                bodies = await self._space.run([_read_identity(each) for each in ids])
                scores = [int(float(score)) for score in page[1::2]]
                yield [
                    (message_id, score)
                    for message_id, score, body in zip(ids, scores, bodies, strict=True)
                    if self._is_agents(number, topic, message_id, score, body)
                ]
            if cursor == b"0":
                return

    def _is_agents(self, number: int, topic: str, message_id: bytes, score: int, body: Any) -> bool:
        """True if this index entry is the agent's. `body` is the reply to `_read_identity`."""
        # No body, or a hash with other fields.
        if body == [None, None]:
            return SCORE_MIN <= score <= self._last_scores[number]
        return bool(body == [message_id, topic.encode()])

    async def table(self, number: int, name: str) -> AsyncIterator[dict[str, bytes]]:
        """Return a table of packed states, page by page."""
        key, cursor = keys.table(self._partition(number), name), b"0"
        while True:
            cursor, page = await self._space.call("HSCAN", key, cursor, "COUNT", PAGE_SIZE)
            if page:
                yield dict(zip(map(_text, page[::2]), page[1::2], strict=True))
            if cursor == b"0":
                return

    # -- removal -------------------------------------------------------------------------------------------

    async def public(self) -> None:
        """Remove the public keys. The private keys stay, so that an interrupted removal can be repeated."""
        async for _, key, found in self.entries():
            ids = [message_id for message_id, _ in found]
            if ids:
                await self._space.run([("ZREM", key, *ids), *map(_delete_body, ids)])
        for number in self._rules:
            async for commands in self._removal_commands(number):
                await self._space.run(commands)

    async def _removal_commands(self, number: int) -> AsyncIterator[list[RedisCommand]]:
        """Return the commands that remove the public keys that a partition's tables name."""
        async for page in self.table(number, "states"):
            if self._agent == "sessions":
                yield [each for client in page.items() for each in _delete_presence(*client)]
            else:
                yield await self._retained_commands(page)
        if self._agent == "sessions":
            return
        async for page in self.table(number, "dead"):
            dead = [(name, dead_messages.unpack(packed)) for name, packed in page.items()]
            messages = [(name, each.topic) for name, each in dead if each is not None]
            yield await self._body_commands(messages)
        if self._agent == "pubsub":
            async for page in self.table(number, "windows"):
                readers = [split_reader(key) for key in page]
                yield [
                    ("GETDEL", keys.read_offset(shown(subscriber), topic))
                    for subscriber, topic in readers
                ]

    async def _retained_commands(self, page: Mapping[str, bytes]) -> list[RedisCommand]:
        states = [(topic, storage.unpack(packed)) for topic, packed in page.items()]
        known = [(topic, state.message_id) for topic, state in states if state is not None]
        entries: list[RedisCommand] = [
            ("ZREM", keys.retained(topic), message_id) for topic, message_id in known
        ]
        return [*entries, *await self._body_commands([(each, topic) for topic, each in known])]

    async def _body_commands(self, messages: Sequence[tuple[str, str]]) -> list[RedisCommand]:
        """Return the commands that delete bodies: (message id, topic). A body that names another message or topic stays."""
        if not messages:
            return []
        bodies = await self._space.run([_read_identity(each.encode()) for each, _ in messages])
        return [
            _delete_body(message_id.encode())
            for (message_id, topic), body in zip(messages, bodies, strict=True)
            if body == [message_id.encode(), topic.encode()]
        ]

    async def private(self, number: int) -> None:
        """Remove all private keys of a partition in one command, so that no half of a state is left."""
        prefix = keys.applied(self._partition(number)).rpartition(":")[0]
        found = [key async for page in self._space.scan(f"{prefix}:") for key in page]
        if found:
            await self._space.call("UNLINK", *found)


def _read_identity(message_id: bytes) -> RedisCommand:
    """Read the message id and topic that a body names."""
    return ("HMGET", keys.MESSAGES_PREFIX.encode() + message_id, "id", "topic")


def _delete_body(message_id: bytes) -> RedisCommand:
    return ("HDEL", keys.MESSAGES_PREFIX.encode() + message_id, *BODY_FIELDS)


def _delete_presence(client_id: str, packed: bytes) -> list[RedisCommand]:
    commands: list[RedisCommand] = [("HDEL", keys.presence(client_id), *PRESENCE_FIELDS)]
    presence = sessions.unpack(packed).connections.presence()
    if presence is not None and presence.node is not None:
        commands.append(("HDEL", keys.node(presence.node), client_id))
    return commands


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
