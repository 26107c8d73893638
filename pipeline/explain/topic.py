"""What is known of one topic: its owner and rule, its depth, members, subscribers, read offsets and leases."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from millpond.agents.delivery.window import Window
from millpond.agents.pubsub.state import (
    Reader,
    TopicLog,
    shown,
    unpack_log,
)
from millpond.agents.queue.state import QueueWindow
from millpond.agents.queue.state import unpack as unpack_queue
from millpond.agents.reads import ReadIndex, ReadLast, ReadStates
from millpond.agents.topics import storage
from millpond.agents.topics.plans import TopicPlan, TopicPlans
from millpond.pipeline.explain import message_states
from millpond.pipeline.explain.agent_states import (
    MemberOf,
    clients_by_subscriber,
    members_of,
    subscribers_of,
)
from millpond.pipeline.explain.message_states import SubscriberView
from millpond.pipeline.explain.results import (
    LeaseFacts,
    MemberFacts,
    SubscriberFacts,
    TopicFacts,
)
from millpond.pipeline.kafka.partitioning import partition_of
from millpond.pipeline.operate.dead_letters import dead_letters_of, is_utf8
from millpond.pipeline.settings import Settings
from millpond.pipeline.stores.redis.inspection import CountBetween, CountIndex, ReadFence, ReadRules
from millpond.pipeline.stores.redis.reader import StoreReader
from millpond.schemas.errors import ConfigError, MillpondError
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules
from millpond.schemas.topics import topic_name_error

SCORE_MAX: Final = 2**53  # scores are doubles in Redis: beyond this, integers are not exact


async def explain(
    settings: Settings, rules: Rules, topic: str, client: str | None = None
) -> TopicFacts:
    """Read what is known of a topic. With `client`, only the members, subscribers and leases of that client.

    Raises:
        ConfigError: the topic name is invalid.
        MillpondError: nothing is known of the topic, or of the client in it.
        StoreDown, StoreRefused: Redis does not answer, or refuses.
    """
    invalid = topic_name_error(topic)
    if not is_utf8(topic + (client or "")):
        invalid = "the topic or client id is no UTF-8"
    if invalid is not None:
        raise ConfigError(f"{topic!r}: {invalid}")
    partition = Partition(
        settings.app, rules.owner(topic), partition_of(topic, settings.kafka.partitions)
    )
    async with StoreReader(rules.pool(partition.agent)) as reader:
        found = await _TopicQuery(reader, partition, topic, client).facts(rules)
    if client is not None and not (found.members or found.subscribers or found.leases):
        raise MillpondError(
            f"{client!r} neither reads {topic!r} nor has a lease of it, in the state of {partition}"
        )
    if not _exists(found):
        foreign = "".join(f"; {each}" for each in reader.foreign_keys.values())
        raise MillpondError(
            f"nothing is known of the topic {topic!r}{foreign}: it has no stored, retained or dead message, and no subscriber"
            f" (its agent is {partition.agent}, its partition {partition.number})"
        )
    return found


def _exists(found: TopicFacts) -> bool:
    kept = found.messages or found.retained or found.dead
    return bool(kept or found.members or found.subscribers or found.leases)


class _TopicQuery:
    """The reads about one topic, optionally for one client."""

    def __init__(
        self, reader: StoreReader, partition: Partition, topic: str, client: str | None
    ) -> None:
        self._reader, self._partition = reader, partition
        self._topic, self._client = topic, client

    async def facts(self, configured: Rules) -> TopicFacts:
        """Read the facts, by the rules in force, or by the configured ones if no worker has run there."""
        topic, agent = self._topic, self._partition.agent
        reads = (
            ReadFence(), ReadRules(), CountIndex(topic), ReadIndex(topic, 1), ReadLast(topic, SCORE_MAX),
            ReadStates((topic,)), ReadStates((topic,), "windows"), ReadStates((topic,), "logs"),
        )  # fmt: skip
        applied, text, messages, oldest, newest, kept, windows, logs = await self._reader.read(
            self._partition, reads
        )
        rules = configured if text is None else Rules.from_canonical(text)
        plans, rule = TopicPlans(rules), rules.delivery_rule(topic)
        plan = plans.of(topic)
        members = await self._members(plans) if agent != "messages" else {}
        facts = [_member_facts(each, plan) for each in members.values()]
        queue = unpack_queue(windows[topic]) if agent == "queue" else None
        log = unpack_log(logs[topic]) if agent == "pubsub" else None
        leases = [] if queue is None else list(self._leases(queue, None))
        subscribers: list[SubscriberFacts] = []
        if log is not None:
            async for one, its_leases in self._subscribers(plans, log, members):
                subscribers.append(one)
                leases += its_leases
        retained, lifetime_ms = storage.unpack(kept[topic]), plan.index_lifetime_ms
        return TopicFacts(
            topic=topic, agent=agent, partition=self._partition.number,
            applied=None if applied is None else applied.offset,
            rule=None if rule is None else _settings(rule, plan),
            expired_time=None if lifetime_ms is None else lifetime_ms // 1000, messages=messages,
            ready=_ready(queue, log, subscribers), leased=_leased(queue, log, subscribers),
            oldest=oldest[0][1] // 1000 if oldest else None,
            newest=newest[0][1] // 1000 if newest else None,
            retained=None if retained is None else retained.message_id,
            dead=await self._dead() if agent != "messages" else 0,
            members=[each for each in facts if self._is_wanted(each)], subscribers=subscribers, leases=leases,
            notes=self._notes(configured, rules, applied),
        )  # fmt: skip

    def _notes(self, configured: Rules, rules: Rules, applied: Any) -> list[str]:
        notes = list(self._reader.foreign_keys.values())
        if applied is None:
            notes.append(f"Redis has no state of {self._partition}: the agent has not run there")
        if rules.canonical() != configured.canonical():
            notes.append(
                f"the rules in force in {self._partition} differ from this configuration: restart its workers with it"
            )
        return notes

    async def _dead(self) -> int:
        """Count the dead letters of the topic."""
        found: dict[str, None] = {}  # the scan may return one twice
        async for dead in dead_letters_of(self._reader, self._partition):
            if dead.topic == self._topic:
                found[dead.message_id] = None
        return len(found)

    # -- members

    async def _members(self, plans: TopicPlans) -> dict[str, MemberOf]:
        found = {}
        async for _, member in members_of(self._reader, self._partition, [self._topic], plans):
            found[member.reach.name] = member
        return dict(sorted(found.items()))

    def _is_wanted(self, member: MemberFacts) -> bool:
        client = self._client
        return client is None or member.client_id == client or client in member.subscribers

    # -- leases and subscribers

    def _leases(self, window: Window, subscriber: str | None) -> Iterator[LeaseFacts]:
        for message_id, lease in sorted(window.leases.items(), key=lambda each: each[1].number):
            state = message_states.leased(lease)
            assert state.client_id is not None, "a lease has a holder"
            if self._client not in (None, state.client_id, subscriber):
                continue
            yield LeaseFacts(
                message_id=message_id, client_id=state.client_id, group=state.group,
                number=lease.number, since=lease.leased_at, until=state.until,
                attempt=state.attempt or 0, sent=lease.sent, stored=lease.stored,
                subscriber=subscriber,
            )  # fmt: skip

    async def _subscribers(
        self, plans: TopicPlans, log: TopicLog, members: Mapping[str, MemberOf]
    ) -> AsyncIterator[tuple[SubscriberFacts, list[LeaseFacts]]]:
        online = clients_by_subscriber(members.values())
        async for views in subscribers_of(
            self._reader, self._partition, self._topic, online, self._client
        ):
            of_topic = [(self._topic, view) for view in views]
            logs = {self._topic: log}
            ready = await ready_for(self._reader, self._partition, of_topic, logs, plans)
            done = await self._done_ahead([view.reader for view in views], log)
            for view, ready_count, done_count in zip(views, ready, done, strict=True):
                leases = list(self._leases(view.reader, shown(view.subscriber)))
                yield _subscriber_facts(view, log, ready_count, done_count), leases

    async def _done_ahead(self, readers: Sequence[Reader], log: TopicLog) -> list[int]:
        """Count the stored messages that each reader is done with, ahead of its read offset."""
        reads = [
            CountBetween(self._topic, max(each.read_offset, log.cursor), each.cursor)
            for each in readers
        ]
        handed_out = await self._reader.read(self._partition, reads)
        return [
            count - _unfinished(each, log) for count, each in zip(handed_out, readers, strict=True)
        ]


def _member_facts(found: MemberOf, plan: TopicPlan) -> MemberFacts:
    member, reach, subscribers = found
    group, client_id = message_states.member_of(reach.name)
    return MemberFacts(
        client_id=client_id, group=group, qos=reach.qos, in_hand=len(member.leases),
        max_inflight=0 if plan.delivery is None else plan.delivery.max_inflight,
        unconfirmed=member.unconfirmed, rests_until=member.rests_until or None,
        failures=member.failures, broker_delivers=reach.newest is not None,
        subscribers=tuple(map(shown, subscribers)),
    )  # fmt: skip


def _subscriber_facts(
    view: SubscriberView, log: TopicLog, ready: int, done_ahead: int
) -> SubscriberFacts:
    reader = view.reader
    return SubscriberFacts(
        subscriber=shown(view.subscriber),
        online=view.online,
        begun=reader.made_at is not None,
        read_offset=reader.message_id or None,
        read_offset_at=reader.read_offset // 1000 or None if reader.made_at is not None else None,
        ready=ready,
        returned=_returned(reader, log),
        leased=len(reader.leases),
        done_ahead=done_ahead,
        lost=reader.lost,
        gone_at=view.known.gone_at,
    )


def _returned(reader: Reader, log: TopicLog) -> int:
    """How many messages were returned to a reader and are still stored."""
    return sum(
        message_states.is_stored(log, reader, each.message_id, each.score)
        for each in reader.returned
    )


def _unfinished(reader: Reader, log: TopicLog) -> int:
    """How many stored messages a reader was handed out and is not done with."""
    leased = [x for x in reader.leases if reader.leases[x].stored]
    returned = [each.message_id for each in reader.returned]
    places = [reader.unfinished[x].score for x in (*leased, *returned) if x in reader.unfinished]
    return sum(score > log.cursor for score in places)


async def ready_for(
    reader: StoreReader,
    partition: Partition,
    views: Sequence[tuple[str, SubscriberView]],
    logs: Mapping[str, TopicLog],
    plans: TopicPlans,
) -> list[int]:
    """Count the messages that wait for each subscriber of a topic: returned ones, and those after its cursor."""
    reads = []
    for topic, view in views:
        log, cursor = logs[topic], view.reader.cursor
        if view.reader.made_at is None:
            start = message_states.start_of(view, topic, log, plans.of(topic))
            cursor = log.last if start is None else start
        reads.append(CountBetween(topic, max(cursor, log.cursor), log.last))
    ahead = await reader.read(partition, reads)
    return [
        _returned(view.reader, logs[topic]) + number
        for (topic, view), number in zip(views, ahead, strict=True)
    ]


def _settings(rule: Any, plan: TopicPlan) -> dict[str, Any]:
    """The delivery rule as a JSON object, with its effective settings."""
    delivery = {} if plan.delivery is None else msgspec.structs.asdict(plan.delivery)
    return {"hook": rule.hook, "topic": rule.topic, "action": rule.action, **delivery}


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
