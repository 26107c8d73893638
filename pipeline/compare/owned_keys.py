"""The keys of a database that some agents own. A comparison compares these, and a replay must not find any in its target.

An agent owns

- its private keys, by their prefix,
- presence and nodes (sessions), and views of read offsets (pubsub), by their prefix,
- index, bodies, retained entry and receipts of each topic that it owns by the rules.

The last kind shares its prefixes with the other agents. An index or retained entry has the topic in its key. A body has
it in the field `topic`. A receipt has the message id in its key, and the message's body has the topic. So a receipt whose
body is gone has no known owner.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from millpond.pipeline.stores.redis.keyspace import Keyspace
from millpond.schemas import keys
from millpond.schemas.events import AgentName
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules

# These depend on where batches end, so they are never compared: the journal, and two fields of the fence.
JOURNAL_SUFFIX: Final = keys.journal(Partition("", "messages", 0)).rpartition(":")[2].encode()
BATCH_FIELDS: Final = ("sequence", "produced")


class OwnedKeys:
    """The keys of some agents of one application, by the rules."""

    def __init__(self, app: str, agents: Sequence[AgentName], rules: Rules) -> None:
        """`rules` name the owner of each topic. All agents together own every topic."""
        self._rules, self._agents = rules, agents
        self._all_agents = set(agents) >= set(keys.SOURCE_TOPIC)
        self.private = [keys.private_prefix(app, agent) for agent in agents]
        prefixes = [prefix for agent in agents for prefix in keys.PUBLIC_PREFIXES[agent]]
        # Several agents share prefixes: each is scanned once.
        self.public = list(dict.fromkeys(prefixes))

    async def scan(self, space: Keyspace) -> AsyncIterator[list[bytes]]:
        """Return the owned keys of a database, page by page, without journals."""
        for prefix in self.private:
            async for page in space.scan(prefix):
                owned = [key for key in page if key.rpartition(b":")[2] != JOURNAL_SUFFIX]
                if owned:
                    yield owned
        for prefix in self.public:
            async for page in space.scan(prefix):
                owned = page if self._owns_all(prefix) else await self._of_owned_topics(space, page)
                if owned:
                    yield owned

    def _owns_all(self, prefix: str) -> bool:
        """True if the agents own every key with this prefix."""
        return self._all_agents or prefix not in keys.OF_TOPICS

    async def _of_owned_topics(self, space: Keyspace, page: Sequence[bytes]) -> list[bytes]:
        """Return the keys whose topic one of the agents owns. A key without a known topic is left out."""
        topics: list[bytes | None] = [None] * len(page)
        hashes: list[int] = []
        for at, (key, kind) in enumerate(
            zip(page, await space.run([("TYPE", key) for key in page]), strict=True)
        ):
            if kind == b"zset":
                topics[at] = _without_prefix(key)
            elif kind == b"hash":
                hashes.append(at)
        named = await space.run([("HGET", _body_key(page[at]), "topic") for at in hashes])
        for at, topic in zip(hashes, named, strict=True):
            topics[at] = topic if isinstance(topic, bytes) else None
        return [
            key
            for key, topic in zip(page, topics, strict=True)
            if topic is not None and self.owns(topic)
        ]

    def owns(self, topic: bytes) -> bool:
        """True if one of the agents owns the topic."""
        return self._rules.owner(topic.decode("utf-8", "replace")) in self._agents


def _without_prefix(key: bytes) -> bytes:
    """Return the topic or message id in a key of a topic's owner."""
    return next(
        key.removeprefix(prefix.encode())
        for prefix in keys.OF_TOPICS
        if key.startswith(prefix.encode())
    )


def _body_key(key: bytes) -> bytes:
    """Return the key of the body that a body's or receipt's key belongs to."""
    return keys.MESSAGES_PREFIX.encode() + _without_prefix(key)


def without_batch_fields(fence: Any) -> Any:
    """Return a decoded fence without the fields that depend on where batches end."""
    return {name: value for name, value in fence.items() if name not in BATCH_FIELDS}
