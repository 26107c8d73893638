"""One topic: who owns it, by which rule, how deep it is, who reads it from where, and who has what in hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from millpond.agents.delivery.dead_messages import unpack as unpack_dead
from millpond.agents.delivery.window import Window
from millpond.agents.pubsub.state import (
    Reader,
    TopicLog,
    reader_key,
    shown,
    subscriber_named,
    unpack_log,
    unpack_reader,
    unpack_subscriber,
)
from millpond.agents.queue.state import QueueWindow
from millpond.agents.queue.state import unpack as unpack_queue
from millpond.agents.reads import ReadIndex, ReadLast, ReadStates
from millpond.agents.topics import storage
from millpond.agents.topics.plans import TopicPlan, TopicPlans
from millpond.pipeline.explain import message_states
from millpond.pipeline.explain.agent_states import MemberOf, members_of, pages
from millpond.pipeline.settings import Settings
from millpond.pipeline.stores.redis.inspection import CountBetween, CountIndex, ReadFence, ReadRules
from millpond.pipeline.stores.redis.reader import StoreReader
from millpond.pipeline.worker.control_channel import partition_of
from millpond.schemas.codec import topic_name_error
from millpond.schemas.errors import ConfigError, MillpondError
from millpond.schemas.events import AgentName
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules

NEWEST: Final = 2**53  # no score is higher


class LeaseFacts(Struct, frozen=True, kw_only=True):
    """A message in somebody's hands: see `MessageState`."""

    message_id: str
    client_id: str
    group: str | None
    number: int
    since: int
    until: int | None
    attempt: int
    sent: bool
    stored: bool
    subscriber: str | None = None


class MemberFacts(Struct, frozen=True, kw_only=True):
    """A client that may be served: what it has in hand in this partition, of at most `max_inflight`; until when it rests,
    after so many failures. `subscribers` are those that it is, or is one of, in pubsub.
    """

    client_id: str
    group: str | None
    qos: int
    in_hand: int
    max_inflight: int
    unconfirmed: int
    rests_until: int | None
    failures: int
    broker_delivers: bool
    subscribers: tuple[str, ...] = ()


class SubscriberFacts(Struct, frozen=True, kw_only=True):
    """One subscriber of a pubsub topic. `read_offset` is the last message that it is done with; of the rest so many are
    `ready`, `returned` among them, `leased`, or `done_ahead` of it; so many were `lost` before it had read them. Not
    `begun` until it was first handed something.
    """

    subscriber: str
    online: int
    begun: bool
    read_offset: str | None
    read_offset_at: int | None
    ready: int
    returned: int
    leased: int
    done_ahead: int
    lost: int
    gone_at: int | None


class TopicFacts(Struct, frozen=True, kw_only=True):
    """What is known of a topic. `ready` and `leased` are of a queue, or of all subscribers of a pubsub topic together."""

    topic: str
    agent: AgentName
    partition: int
    applied: int | None
    rule: dict[str, Any] | None
    expired_time: int | None
    messages: int
    ready: int | None
    leased: int | None
    oldest: int | None
    newest: int | None
    retained: str | None
    dead: int
    members: list[MemberFacts]
    subscribers: list[SubscriberFacts]
    leases: list[LeaseFacts]
    notes: list[str]


async def explain(
    settings: Settings, rules: Rules, topic: str, client: str | None = None
) -> TopicFacts:
    """What is known of a topic; of its members, subscribers and leases only those of one client, if that is named.

    Raises:
        ConfigError: nobody can publish to such a topic.
        MillpondError: nothing is known of it, or of the client there.
        StoreDown, StoreRefused: Redis is away.
    """
    wrong = topic_name_error(topic)
    try:
        (topic + (client or "")).encode()
    except UnicodeEncodeError:
        wrong = "the topic or client id is no UTF-8"
    if wrong is not None:
        raise ConfigError(f"{topic!r}: {wrong}")
    partition = Partition(
        settings.app, rules.owner(topic), partition_of(topic, settings.kafka.partitions)
    )
    async with StoreReader(rules.pool(partition.agent)) as reader:
        found = await _Looking(reader, partition, topic, client).facts(rules)
    if client is not None and not (found.members or found.subscribers or found.leases):
        raise MillpondError(
            f"{client!r} neither reads {topic!r} nor has anything of it in hand, by what {partition} knows"
        )
    if not _something(found):
        raise MillpondError(
            f"nothing is known of the topic {topic!r}: no message is stored, retained or dead, and nobody reads it"
            f" (its agent is {partition.agent}, its partition {partition.number})"
        )
    return found


def _something(found: TopicFacts) -> bool:
    kept = found.messages or found.retained or found.dead
    return bool(kept or found.members or found.subscribers or found.leases)


class _Looking:
    """At one topic, through one reader."""

    def __init__(
        self, reader: StoreReader, partition: Partition, topic: str, client: str | None
    ) -> None:
        self._reader, self._partition = reader, partition
        self._topic, self._client = topic, client

    async def facts(self, configured: Rules) -> TopicFacts:
        """All of it."""
        topic, agent = self._topic, self._partition.agent
        reads = (
            ReadFence(), ReadRules(), CountIndex(topic), ReadIndex(topic, 1), ReadLast(topic, NEWEST),
            ReadStates((topic,)), ReadStates((topic,), "windows"), ReadStates((topic,), "logs"),
        )  # fmt: skip
        applied, text, messages, oldest, newest, kept, windows, logs = await self._reader.read(
            self._partition, reads
        )
        rules = configured if text is None else Rules.from_canonical(text)
        plans, rule = TopicPlans(rules), rules.delivery_rule(topic)
        plan = plans.of(topic)
        members = await self._members(plan) if agent != "messages" else {}
        shown_members = [each for each in members.values() if self._is_asked(each)]
        queue = unpack_queue(windows[topic]) if agent == "queue" else None
        log = unpack_log(logs[topic]) if agent == "pubsub" else None
        leases = [] if queue is None else list(self._leases(queue, None))
        subscribers: list[SubscriberFacts] = []
        if log is not None:
            async for one, reader_leases in self._subscribers(plans, log, members):
                subscribers.append(one)
                leases += reader_leases
        retained = storage.unpack(kept[topic])
        return TopicFacts(
            topic=topic, agent=agent, partition=self._partition.number,
            applied=None if applied is None else applied.offset,
            rule=None if rule is None else _settings(rule, plan),
            expired_time=_seconds(plan.index_lifetime_ms), messages=messages,
            ready=_ready(queue, log, subscribers), leased=_leased(queue, log, subscribers),
            oldest=oldest[0][1] // 1000 if oldest else None,
            newest=newest[0][1] // 1000 if newest else None,
            retained=None if retained is None else retained.message_id,
            dead=await self._dead() if agent != "messages" else 0,
            members=shown_members, subscribers=subscribers, leases=leases,
            notes=self._notes(configured, rules, applied),
        )  # fmt: skip

    def _notes(self, configured: Rules, rules: Rules, applied: Any) -> list[str]:
        notes = []
        if applied is None:
            notes.append(f"Redis holds no state of {self._partition}: the agent has not run there")
        if rules.canonical() != configured.canonical():
            notes.append(
                f"{self._partition} goes by other rules than this configuration's, until its worker starts with them"
            )
        return notes

    async def _dead(self) -> int:
        """How many dead letters the topic has."""
        found: dict[str, None] = {}
        async for page in pages(self._reader, self._partition, "dead"):
            for dead in map(unpack_dead, page.values()):
                if dead is not None and dead.topic == self._topic and not dead.requeued:
                    found[dead.message_id] = None
        return len(found)

    # -- members

    async def _members(self, plan: TopicPlan) -> dict[str, MemberFacts]:
        found = {}
        async for _, member in members_of(self._reader, self._partition, [self._topic]):
            found[member.reach.name] = _member(member, plan)
        return dict(sorted(found.items()))

    def _is_asked(self, member: MemberFacts) -> bool:
        client = self._client
        return client is None or member.client_id == client or client in member.subscribers

    # -- leases and subscribers

    def _leases(self, window: Window, subscriber: str | None) -> Iterator[LeaseFacts]:
        for message_id, lease in sorted(window.leases.items(), key=lambda each: each[1].number):
            state = message_states.leased(lease)
            assert state.client_id is not None, "somebody has it"
            if self._client not in (None, state.client_id, subscriber):
                continue
            yield LeaseFacts(
                message_id=message_id, client_id=state.client_id, group=state.group,
                number=lease.number, since=lease.leased_at, until=state.until,
                attempt=state.attempt or 0, sent=lease.sent, stored=lease.stored,
                subscriber=subscriber,
            )  # fmt: skip

    async def _subscribers(
        self, plans: TopicPlans, log: TopicLog, members: dict[str, MemberFacts]
    ) -> AsyncIterator[tuple[SubscriberFacts, list[LeaseFacts]]]:
        told: dict[str, None] = {}
        online = Counter(name for each in members.values() for name in each.subscribers)
        async for packed in self._known():
            known = {name: unpack_subscriber(packed[name]) for name in packed if name not in told}
            names = [name for name, each in known.items() if each.since(self._topic) is not None]
            told.update(dict.fromkeys(names))
            keys = tuple(reader_key(name, self._topic) for name in names)
            (windows,) = await self._reader.read(self._partition, [ReadStates(keys, "windows")])
            readings = [
                message_states.Reading(
                    subscriber=name, known=known[name], reader=unpack_reader(windows[key]),
                    online=online[shown(name)],
                )
                for name, key in zip(names, keys, strict=True)
            ]  # fmt: skip
            about = [(self._topic, reading) for reading in readings]
            logs = {self._topic: log}
            ready = await ready_for(self._reader, self._partition, about, logs, plans)
            for reading, number in zip(readings, ready, strict=True):
                leases = list(self._leases(reading.reader, shown(reading.subscriber)))
                yield subscriber_facts(reading, log, number), leases

    async def _known(self) -> AsyncIterator[dict[str, bytes | None]]:
        if self._client is not None:
            read = ReadStates((subscriber_named(self._client),), "subscribers")
            (packed,) = await self._reader.read(self._partition, [read])
            yield packed
            return
        async for page in pages(self._reader, self._partition, "subscribers"):
            yield dict(page)


def _member(found: MemberOf, plan: TopicPlan) -> MemberFacts:
    member, reach, subscribers = found
    group, client_id = message_states.member_of(reach.name)
    return MemberFacts(
        client_id=client_id, group=group, qos=reach.qos, in_hand=len(member.leases),
        max_inflight=0 if plan.delivery is None else plan.delivery.max_inflight,
        unconfirmed=member.unconfirmed, rests_until=member.rests_until or None,
        failures=member.failures, broker_delivers=reach.newest is not None,
        subscribers=tuple(map(shown, subscribers)),
    )  # fmt: skip


def subscriber_facts(reading: message_states.Reading, log: TopicLog, ready: int) -> SubscriberFacts:
    """How far one subscriber of a pubsub topic is; `ready` are those that are to be handed to it."""
    reader = reading.reader
    return SubscriberFacts(
        subscriber=shown(reading.subscriber),
        online=reading.online,
        begun=reader.made_at is not None,
        read_offset=reader.message_id or None,
        read_offset_at=reader.read_offset // 1000 or None if reader.made_at is not None else None,
        ready=ready,
        returned=returned_to(reader, log),
        leased=len(reader.leases),
        done_ahead=len(reader.done),
        lost=reader.lost,
        gone_at=reading.known.gone_at,
    )


def returned_to(reader: Reader, log: TopicLog) -> int:
    """How many messages have come back to a reader, and are still there."""
    return sum(
        message_states.still_in(log, reader, each.message_id, each.score)
        for each in reader.returned
    )


async def ready_for(
    reader: StoreReader,
    partition: Partition,
    readings: Sequence[tuple[str, message_states.Reading]],
    logs: Mapping[str, TopicLog],
    plans: TopicPlans,
) -> list[int]:
    """How many messages are to be handed to each of these subscribers of topics: what came back, and what lies ahead."""
    reads = []
    for topic, reading in readings:
        log, cursor = logs[topic], reading.reader.cursor
        if reading.reader.made_at is None:
            start = message_states.start_of(reading, topic, log, plans.of(topic))
            cursor = log.last if start is None else start
        reads.append(CountBetween(topic, max(cursor, log.cursor), log.last))
    ahead = await reader.read(partition, reads)
    return [
        returned_to(reading.reader, logs[topic]) + number
        for (topic, reading), number in zip(readings, ahead, strict=True)
    ]


def _settings(rule: Any, plan: TopicPlan) -> dict[str, Any]:
    """The delivery rule, with its settings as they come to."""
    delivery = {} if plan.delivery is None else msgspec.structs.asdict(plan.delivery)
    return {"hook": rule.hook, "topic": rule.topic, "action": rule.action, **delivery}


def _seconds(ms: int | None) -> int | None:
    return None if ms is None else ms // 1000


def _ready(
    queue: QueueWindow | None, log: TopicLog | None, subscribers: list[SubscriberFacts]
) -> int | None:
    if queue is not None:
        return queue.ready
    return None if log is None else sum(each.ready for each in subscribers)


def _leased(
    queue: QueueWindow | None, log: TopicLog | None, subscribers: list[SubscriberFacts]
) -> int | None:
    if queue is not None:
        return len(queue.leases)
    return None if log is None else sum(each.leased for each in subscribers)
