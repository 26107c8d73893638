"""Where a message is: in Kafka, in Redis, and for each of its subscribers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from msgspec import Struct, structs

from millpond.agents.delivery.dead_messages import DeadMessage
from millpond.agents.delivery.dead_messages import unpack as unpack_dead
from millpond.agents.ports import Applied
from millpond.agents.pubsub.state import (
    TopicLog,
    reader_key,
    subscriber_named,
    unpack_log,
    unpack_reader,
    unpack_subscriber,
)
from millpond.agents.queue.state import QueueWindow
from millpond.agents.queue.state import unpack as unpack_queue
from millpond.agents.reads import ReadBody, ReadEntry, ReadStates
from millpond.agents.topics import storage
from millpond.agents.topics.plans import make_plan
from millpond.pipeline.clock import now_ms
from millpond.pipeline.explain import log_search, message_states, sentences
from millpond.pipeline.explain.agent_states import members_of, pages
from millpond.pipeline.explain.log_search import Progress, SearchResult, WantedMessage
from millpond.pipeline.explain.message_states import Known, Reading
from millpond.pipeline.explain.results import (
    MessageFacts,
    MessageState,
    Searched,
    StoredMessageFacts,
)
from millpond.pipeline.operate.dead_letters import AGENTS as DELIVERING
from millpond.pipeline.operate.dead_letters import stored_message
from millpond.pipeline.settings import Settings
from millpond.pipeline.stores.redis.inspection import (
    CountBefore,
    ReadFence,
    ReadLifetime,
    ReadReceipt,
    ReadRules,
)
from millpond.pipeline.stores.redis.reader import StoreReader
from millpond.pipeline.worker.control_channel import partition_of
from millpond.schemas.codec import topic_name_error
from millpond.schemas.errors import ConfigError, MillpondError
from millpond.schemas.events import AgentName
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules
from millpond.schemas.rules.pool import Pool

RECORDS_MAX: Final = 1_000_000  # looked at in one go: some ten seconds
OWNERS: Final[tuple[AgentName, ...]] = ("messages", "queue", "pubsub")


async def explain(
    settings: Settings,
    rules: Rules,
    message_id: str,
    *,
    topic: str | None = None,
    client: str | None = None,
    records_max: int = RECORDS_MAX,
    progress: Progress = lambda done, total: None,
) -> MessageFacts:
    """All that is known of a message; for one subscriber only, if `client` names it. `topic` None: Redis or Kafka tell it.

    Raises:
        ConfigError: nobody can publish to such a topic.
        MillpondError: there is no such message; it says where it was looked for. Kafka is away.
        StoreDown, StoreRefused: Redis is.
    """
    if not _is_text(message_id, topic, client):
        raise MillpondError(
            f"{message_id!r}, or what comes with it, is no UTF-8: nothing has such a name"
        )
    wrong = None if topic is None else topic_name_error(topic)
    if wrong is not None:
        raise ConfigError(f"{topic!r}: {wrong}")
    notes: list[str] = []
    where = topic or await _topic_in_stores(settings, rules, message_id)
    if where is None:
        notes.append("Redis does not have it, so its topic was looked for in the log")
    async with log_search.LogReader(settings.kafka) as log:
        held = None if where is None else await _held(settings, rules, message_id, where)
        if held is not None and held.elsewhere is not None:
            raise MillpondError(
                f"{message_id!r} is a message of topic {held.elsewhere!r}, not of {where!r}"
            )
        numbers = range(settings.kafka.partitions)
        if where is not None:
            numbers = range((at := partition_of(where, settings.kafka.partitions)), at + 1)
        wanted = WantedMessage(message_id, where, () if held is None else held.aliases)
        since = None if held is None or held.score is None else held.score // 1000
        found = await log_search.search(log, wanted, numbers, since, records_max, progress)
    if wanted.copy_of not in (None, message_id):
        assert wanted.copy_of is not None, "it has just been looked at"
        told = await explain(
            settings, rules, wanted.copy_of,
            topic=topic, client=client, records_max=records_max, progress=progress,
        )  # fmt: skip
        note = f"{message_id!r} is the id that the broker gave to a copy of it"
        return structs.replace(told, notes=[note, *told.notes])
    where = where or next((each.topic for each in found.events if each.topic is not None), None)
    if where is None:
        raise _unknown(message_id, topic, found)
    # Once more, since the log was read meanwhile: what it tells is in Redis by now, or the agent has not come to it.
    held = await _held(settings, rules, message_id, where)
    if not found.events and held.blank():
        raise _unknown(message_id, topic, found)
    return await _facts(settings, rules, held, found, client, notes)


def _is_text(*texts: str | None) -> bool:
    try:
        "".join(filter(None, texts)).encode()
    except UnicodeEncodeError:
        return False
    return True


def _unknown(message_id: str, topic: str | None, found: SearchResult) -> MillpondError:
    looked: dict[str, list[Searched]] = {}
    for each in found.searched:
        looked.setdefault(each.kafka_topic, []).append(each)
    said = [
        sentences.searched(parts[0]) if len(parts) == 1 else _all_of(kafka_topic, parts)
        for kafka_topic, parts in looked.items()
    ]
    part = "" if all(each.whole for each in found.searched) else "; --search N looks at more"
    of = "" if topic is None else f" of topic {topic!r}"
    return MillpondError(
        f"no message {message_id!r}{of} is known: neither in Redis, nor in {', nor in '.join(said)}{part}"
    )


def _all_of(kafka_topic: str, parts: Sequence[Searched]) -> str:
    looked = sum(each.stop - each.first for each in parts)
    total = sum(each.end - each.start for each in parts)
    which = f"the {total} records" if looked == total else f"the newest {looked} of {total} records"
    return f"{which} in the {len(parts)} partitions of {kafka_topic}"


# -- Redis -------------------------------------------------------------------------------------------------------------


class _Held(Struct, frozen=True, kw_only=True):
    """What Redis holds of a message of a topic, read at once."""

    message_id: str
    topic: str
    agent: AgentName
    partition: Partition
    applied: Applied | None
    rules: Rules
    score: int | None
    before: int | None
    body: dict[str, bytes]
    body_lifetime: int | None
    receipts: dict[str, int]
    retained: storage.RetainedState | None
    dead: DeadMessage | None
    window: QueueWindow | None
    log: TopicLog | None

    def blank(self) -> bool:
        """Whether it holds nothing of it."""
        mine = self.retained is not None and self.retained.message_id == self.message_id
        lease = self.window is not None and self.message_id in self.window.leases
        stored = stored_message(self.message_id, self.body) is not None
        return not (stored or mine or lease or self.receipts or self.dead) and self.score is None

    @property
    def elsewhere(self) -> str | None:
        """The topic that its body names, if that is another."""
        if stored_message(self.message_id, self.body) is None:
            return None
        named = self.body.get("topic", b"").decode("utf-8", "replace")
        return None if named == self.topic else named

    @property
    def aliases(self) -> list[str]:
        """The ids that the broker gave the copies of a message that is queued, or dead."""
        known = {} if self.window is None else self.window.aliases
        dead = () if self.dead is None else self.dead.holders
        return [
            *(alias for alias, own in known.items() if own == self.message_id),
            *(alias for _, alias, _ in dead if alias is not None),
        ]


async def _topic_in_stores(settings: Settings, rules: Rules, message_id: str) -> str | None:
    """The topic of a message that has a body, or is a dead letter."""
    asked: dict[Pool, None] = {}
    for agent in OWNERS:
        pool = rules.pool(agent)
        async with StoreReader(pool) as reader:
            if pool not in asked:
                asked[pool] = None
                partition = Partition(settings.app, agent, 0)
                (body,) = await reader.read(partition, [ReadBody(message_id)])
                if stored_message(message_id, body) is not None and "topic" in body:
                    return str(body["topic"].decode("utf-8", "replace"))
            if agent not in DELIVERING:
                continue
            for number in range(settings.kafka.partitions):
                partition = Partition(settings.app, agent, number)
                (found,) = await reader.read(partition, [ReadStates((message_id,), "dead")])
                dead = unpack_dead(found[message_id])
                if dead is not None:
                    return dead.topic
    return None


async def _held(settings: Settings, rules: Rules, message_id: str, topic: str) -> _Held:
    agent = rules.owner(topic)
    number = partition_of(topic, settings.kafka.partitions)
    partition = Partition(settings.app, agent, number)
    reads: list[Any] = [
        ReadFence(),
        ReadRules(),
        ReadEntry(topic, message_id),
        CountBefore(topic, message_id),
        ReadBody(message_id),
        ReadLifetime(message_id),
        ReadReceipt(message_id),
        ReadStates((topic,)),
        ReadStates((message_id,), "dead"),
        ReadStates((topic,), "windows"),
        ReadStates((topic,), "logs"),
    ]
    async with StoreReader(rules.pool(agent)) as reader:
        (
            applied, in_force, score, before, body, lifetime, receipts, kept, dead, windows, logs,
        ) = await reader.read(partition, reads)  # fmt: skip
    return _Held(
        message_id=message_id,
        topic=topic,
        agent=agent,
        partition=partition,
        applied=applied,
        rules=rules if in_force is None else Rules.from_canonical(in_force),
        score=score,
        before=before,
        body=body,
        body_lifetime=lifetime,
        receipts=receipts,
        retained=storage.unpack(kept[topic]),
        dead=unpack_dead(dead[message_id]),
        window=unpack_queue(windows[topic]) if agent == "queue" else None,
        log=unpack_log(logs[topic]) if agent == "pubsub" else None,
    )


# -- together ----------------------------------------------------------------------------------------------------------


async def _facts(
    settings: Settings,
    rules: Rules,
    held: _Held,
    found: SearchResult,
    client: str | None,
    notes: list[str],
) -> MessageFacts:
    plan, now = make_plan(held.rules, held.topic), now_ms()
    retained = held.retained
    retains = retained is not None and retained.message_id == held.message_id
    known = Known(
        message_id=held.message_id,
        plan=plan,
        score=held.score,
        applied=-1 if held.applied is None else held.applied.offset,
        now_ms=now,
        events=found.events,
        dead=held.dead if held.dead is not None and held.dead.topic == held.topic else None,
        retained=retains,
        before=held.before,
    )
    if held.rules.owner(held.topic) != held.agent:
        notes.append(
            f"by the rules in force in {held.partition} its topic is not {held.agent}'s, as it is by this configuration"
        )
    if held.applied is None:
        notes.append(f"Redis holds no state of {held.partition}: the agent has not run there")
    notes += [
        f"only a part of the log was searched ({sentences.searched(each)}): --search N looks at more"
        for each in found.searched
        if not each.whole and (found.published is None or each.stop < each.end)
    ]
    message = stored_message(held.message_id, held.body)
    lifetime = held.body_lifetime
    return MessageFacts(
        message_id=held.message_id,
        topic=held.topic,
        agent=held.agent,
        partition=held.partition.number,
        applied=None if held.applied is None else held.applied.offset,
        states=[
            structs.replace(state, words=sentences.in_words(state, now))
            async for state in _states(rules, held, known, client)
        ],
        stored=StoredMessageFacts(
            message=message,
            body_expires_at=None if message is None or lifetime is None else now + lifetime,
            index_score=held.score,
            expires_at=None if held.score is None else _index_end(held.score, plan, message),
            retained=retains,
            retained_until=retained.expires_at if retained is not None and retains else None,
            receipts=held.receipts,
        ),
        events=found.events,
        searched=found.searched,
        notes=notes,
    )


def _index_end(score: int, plan: Any, message: Any) -> int | None:
    own = None if message is None else message.expires_at
    return storage.earliest(score // 1000, plan.index_lifetime_ms, own)


async def _states(
    rules: Rules, held: _Held, known: Known, client: str | None
) -> AsyncIterator[MessageState]:
    """Of the message as a whole; then of each subscriber of a pubsub topic."""
    if held.agent == "messages":
        yield message_states.of_message(known)
        return
    async with StoreReader(rules.pool(held.agent)) as reader:
        online: dict[str, dict[str, str]] = {}  # subscriber → name → client of its members
        async for _, found in members_of(reader, held.partition, [held.topic]):
            for each in found.subscribers:
                online.setdefault(each, {})[found.reach.name] = found.member.client_id
        if held.window is not None:
            names = {name for members in online.values() for name in members}
            yield message_states.of_queue(known, held.window, len(names))
            return
        assert held.log is not None, "the other agent that delivers has logs"
        yield message_states.of_log(known, held.log)
        async for reading in _readings(reader, held, online, client):
            state = message_states.of_pubsub(known, held.topic, held.log, reading)
            if state is not None:
                yield state


async def _readings(
    reader: StoreReader, held: _Held, online: dict[str, dict[str, str]], client: str | None
) -> AsyncIterator[Reading]:
    """The subscribers of the message's topic, and those that gave up on it."""
    told: dict[str, None] = {}
    dead = () if held.dead is None else held.dead.subscribers
    async for packed in _subscribers(reader, held.partition, client, dead):
        names = [name for name in packed if name not in told]
        known = {name: unpack_subscriber(packed[name]) for name in names}
        wanted = [x for x in names if x in dead or known[x].since(held.topic) is not None]
        told.update(dict.fromkeys(wanted))
        keys = tuple(reader_key(name, held.topic) for name in wanted)
        (windows,) = await reader.read(held.partition, [ReadStates(keys, "windows")])
        for name, key in zip(wanted, keys, strict=True):
            members = online.get(name, {})
            yield Reading(
                subscriber=name,
                known=known[name],
                reader=unpack_reader(windows[key]),
                online=len(members),
                clients=frozenset(members.values()),
            )


async def _subscribers(
    reader: StoreReader, partition: Partition, client: str | None, dead: Sequence[str]
) -> AsyncIterator[dict[str, bytes | None]]:
    if client is not None:
        read = ReadStates((subscriber_named(client),), "subscribers")
        (packed,) = await reader.read(partition, [read])
        yield packed
        return
    async for page in pages(reader, partition, "subscribers"):
        yield dict(page)
    if dead:  # of a subscriber that is forgotten by now
        (packed,) = await reader.read(partition, [ReadStates(tuple(dead), "subscribers")])
        yield packed
