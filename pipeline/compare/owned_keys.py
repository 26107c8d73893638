"""Which keys of a database are whose: what is compared, and what a replay must not find in its target."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from millpond.pipeline.stores.redis.keyspace import Keyspace
from millpond.schemas import keys
from millpond.schemas.events import AgentName
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules

# What depends on where batches end, and is never compared: the journal; of the fence the `sequence` of transactions,
# and which of them have `produced` their outputs.
JOURNAL_SUFFIX: Final = keys.journal(Partition("", "messages", 0)).rpartition(":")[2].encode()
OF_BATCHES: Final = ("sequence", "produced")


class OwnedKeys:
    """The keys of some agents of one application, by the rules."""

    def __init__(self, app: str, agents: Sequence[AgentName], rules: Rules) -> None:
        """Topics have owners by `rules`; of all agents together every topic's keys are theirs."""
        self._rules, self._agents = rules, agents
        self._all = set(agents) >= set(keys.SOURCE_TOPIC)
        self.private = [keys.private_prefix(app, agent) for agent in agents]
        found = [prefix for agent in agents for prefix in keys.PUBLIC_PREFIXES[agent]]
        self.public = list(dict.fromkeys(found))

    async def scan(self, space: Keyspace) -> AsyncIterator[list[bytes]]:
        """All of these keys that a database holds, page by page, without journals."""
        for prefix in self.private:
            async for page in space.scan(prefix):
                ours = [key for key in page if key.rpartition(b":")[2] != JOURNAL_SUFFIX]
                if ours:
                    yield ours
        for prefix in self.public:
            async for page in space.scan(prefix):
                ours = page if self._is_whole(prefix) else await self._of_topics(space, page)
                if ours:
                    yield ours

    def _is_whole(self, prefix: str) -> bool:
        """Whether all keys that begin so are these agents'."""
        return self._all or prefix not in keys.OF_TOPICS

    async def _of_topics(self, space: Keyspace, page: Sequence[bytes]) -> list[bytes]:
        """Those whose topic has one of the agents as owner. What does not say its topic is nobody's."""
        topics: list[bytes | None] = [None] * len(page)
        asked: list[int] = []
        for at, (key, kind) in enumerate(
            zip(page, await space.ask([("TYPE", key) for key in page]), strict=True)
        ):
            if kind == b"zset":
                topics[at] = _behind_prefix(key)
            elif kind == b"hash":
                asked.append(at)
        named = await space.ask([("HGET", _body_of(page[at]), "topic") for at in asked])
        for at, topic in zip(asked, named, strict=True):
            topics[at] = topic if isinstance(topic, bytes) else None
        return [
            key
            for key, topic in zip(page, topics, strict=True)
            if topic is not None and self.owns(topic)
        ]

    def owns(self, topic: bytes) -> bool:
        """Whether a topic is one of the agents'."""
        return self._rules.owner(topic.decode("utf-8", "replace")) in self._agents


def _behind_prefix(key: bytes) -> bytes:
    """The topic or message id in a public key of a topic's owner."""
    return next(
        key.removeprefix(prefix.encode())
        for prefix in keys.OF_TOPICS
        if key.startswith(prefix.encode())
    )


def _body_of(key: bytes) -> bytes:
    """The body that a hash is, or that a receipt is of: it names its topic."""
    return keys.MESSAGES_PREFIX.encode() + _behind_prefix(key)


def without_batches(fence: Any) -> Any:
    """A fence, decoded, without what depends on batches."""
    return {name: value for name, value in fence.items() if name not in OF_BATCHES}
