"""Taking out of a store what one agent has put there, and nothing else: by its private state, which names it.

| what | named by |
|---|---|
| index entries and their bodies | the owner of the index's topic; an entry is the agent's if its body says so, or if it has none (any more) and its score is a time of the partition's log |
| retained entries and their bodies | `states` of messages, queue and pubsub: topic → message id |
| bodies of dead letters | `dead` |
| presence | `states` of sessions: client ids, and the nodes that they are online on |
| views of read offsets | `windows` of pubsub: subscriber and topic |
| private keys | their prefix |

Receipts stay: nobody can say whose one without its message is, and folding writes the same into them once more.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final

from millpond.agents.delivery import dead_messages
from millpond.agents.pubsub.state import shown, split_reader
from millpond.agents.sessions import state as sessions
from millpond.agents.topics import storage
from millpond.pipeline.stores.redis.connection import RedisCommand
from millpond.pipeline.stores.redis.keyspace import Keyspace
from millpond.pipeline.stores.redis.packing import BODY_FIELDS
from millpond.pipeline.worker.control_channel import partition_of
from millpond.schemas import keys
from millpond.schemas.events import AgentName
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules

AT_ONCE: Final = 500
PRESENCE_FIELDS: Final = ("state", "online_at", "offline_at")
SCORE_MIN: Final = 10**15  # µs since the epoch in 2001: what is lower is no log's time


class Removal:
    """What one agent's partitions have put into a store. `last_scores` are the last ones that each has given."""

    def __init__(
        self,
        space: Keyspace,
        app: str,
        agent: AgentName,
        rules: Mapping[int, Rules],
        last_scores: Mapping[int, int],
        partition_count: int,
    ) -> None:
        """`rules` are those in force, of the partitions that are meant."""
        self._space, self._app, self._agent = space, app, agent
        self._rules, self._last_scores, self._count = rules, last_scores, partition_count

    def _partition(self, number: int) -> Partition:
        return Partition(self._app, self._agent, number)

    # -- what there is -------------------------------------------------------------------------------------

    async def entries(self) -> AsyncIterator[tuple[int, bytes, list[tuple[bytes, int]]]]:
        """The index entries of the agent's topics: partition, key of the index, message ids with their scores."""
        if self._agent == "sessions":
            return
        prefix = keys.MESSAGES_PREFIX
        async for page in self._space.scan(prefix):
            kinds = await self._space.ask([("TYPE", key) for key in page])
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
            cursor, told = await self._space.get("ZSCAN", key, cursor, "COUNT", AT_ONCE)
            ids = told[::2]
            if ids:
                bodies = await self._space.ask([_names(each) for each in ids])
                scores = [int(float(score)) for score in told[1::2]]
                yield [
                    (message_id, score)
                    for message_id, score, body in zip(ids, scores, bodies, strict=True)
                    if self._is_ours(number, topic, message_id, score, body)
                ]
            if cursor == b"0":
                return

    def _is_ours(self, number: int, topic: str, message_id: bytes, score: int, body: Any) -> bool:
        if body == [None, None]:
            return SCORE_MIN <= score <= self._last_scores[number]
        return bool(body == [message_id, topic.encode()])

    async def table(self, number: int, name: str) -> AsyncIterator[dict[str, bytes]]:
        """A table of packed states, page by page."""
        key, cursor = keys.table(self._partition(number), name), b"0"
        while True:
            cursor, told = await self._space.get("HSCAN", key, cursor, "COUNT", AT_ONCE)
            if told:
                yield dict(zip(map(_text, told[::2]), told[1::2], strict=True))
            if cursor == b"0":
                return

    # -- what goes -----------------------------------------------------------------------------------------

    async def public(self) -> None:
        """Remove the public keys, and leave the private ones that name them."""
        async for _, key, found in self.entries():
            ids = [message_id for message_id, _ in found]
            if ids:
                await self._space.ask([("ZREM", key, *ids), *map(_drop, ids)])
        for number in self._rules:
            async for commands in self._named(number):
                await self._space.ask(commands)

    async def _named(self, number: int) -> AsyncIterator[list[RedisCommand]]:
        """The commands that remove what a partition's tables name."""
        async for page in self.table(number, "states"):
            if self._agent == "sessions":
                yield [each for client in page.items() for each in _of_client(*client)]
            else:
                yield await self._retained(page)
        if self._agent == "sessions":
            return
        async for page in self.table(number, "dead"):
            letters = [(each, dead_messages.unpack(packed)) for each, packed in page.items()]
            of_topics = [(each, letter.topic) for each, letter in letters if letter is not None]
            yield await self._bodies(of_topics)
        if self._agent == "pubsub":
            async for page in self.table(number, "windows"):
                readers = [split_reader(key) for key in page]
                yield [
                    ("GETDEL", keys.read_offset(shown(subscriber), topic))
                    for subscriber, topic in readers
                ]

    async def _retained(self, page: Mapping[str, bytes]) -> list[RedisCommand]:
        held = [(topic, storage.unpack(packed)) for topic, packed in page.items()]
        known = [(topic, state.message_id) for topic, state in held if state is not None]
        entries: list[RedisCommand] = [
            ("ZREM", keys.retained(topic), message_id) for topic, message_id in known
        ]
        return [*entries, *await self._bodies([(each, topic) for topic, each in known])]

    async def _bodies(self, messages: Sequence[tuple[str, str]]) -> list[RedisCommand]:
        """The removal of bodies that say that they are these: (message id, topic)."""
        if not messages:
            return []
        bodies = await self._space.ask([_names(each.encode()) for each, _ in messages])
        return [
            _drop(message_id.encode())
            for (message_id, topic), body in zip(messages, bodies, strict=True)
            if body == [message_id.encode(), topic.encode()]
        ]

    async def private(self, number: int) -> None:
        """Remove all private keys of a partition, in one command."""
        prefix = keys.applied(self._partition(number)).rpartition(":")[0]
        found = [key async for page in self._space.scan(f"{prefix}:") for key in page]
        if found:
            await self._space.get("UNLINK", *found)


def _names(message_id: bytes) -> RedisCommand:
    """Which message a body is, and of which topic."""
    return ("HMGET", keys.MESSAGES_PREFIX.encode() + message_id, "id", "topic")


def _drop(message_id: bytes) -> RedisCommand:
    return ("HDEL", keys.MESSAGES_PREFIX.encode() + message_id, *BODY_FIELDS)


def _of_client(client_id: str, packed: bytes) -> list[RedisCommand]:
    commands: list[RedisCommand] = [("HDEL", keys.presence(client_id), *PRESENCE_FIELDS)]
    shown_now = sessions.unpack(packed).connections.presence()
    if shown_now is not None and shown_now.node is not None:
        commands.append(("HDEL", keys.node(shown_now.node), client_id))
    return commands


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
