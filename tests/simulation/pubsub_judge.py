"""Invariants of a pubsub partition's content that hold after every fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from millpond.agents.delivery import leasing, rounds
from millpond.agents.delivery.dead_messages import DeadMessage
from millpond.agents.delivery.leasing import Counters
from millpond.agents.delivery.members import Member
from millpond.agents.ports import Applied
from millpond.agents.pubsub.readers import READERS, TOPICS
from millpond.agents.pubsub.state import (
    GROUP,
    Reader,
    Subscriber,
    TopicLog,
    reader_key,
    shown,
    split_reader,
    subscriber_of,
    unpack_log,
    unpack_reader,
    unpack_subscriber,
)
from millpond.agents.topics.due_times import WINDOW, due_member
from millpond.pipeline.stores.memory.server import Hash, MemoryServer, Zset
from millpond.schemas import keys
from millpond.schemas.commands import Deliver
from millpond.schemas.events import (
    DeliveriesSent,
    DeliveryFailed,
    Event,
    MessageAcked,
    OperatorRequeue,
    OperatorRewind,
    SubscriberLeft,
)
from millpond.schemas.keys import Partition
from millpond.schemas.topics import matches, split_share
from tests.support.partition import Driver

if TYPE_CHECKING:
    from tests.simulation.pubsub_world import Pubsub

PUBSUB = Partition("millpond", "pubsub", 0)
INDEX, RETAINED = keys.message_index(""), keys.retained("")


def table(server: MemoryServer, name: Any) -> Hash:
    return server.of(keys.table(PUBSUB, name), Hash)


def index(server: MemoryServer, name: str) -> Zset:
    return server.of(keys.index(PUBSUB, name), Zset)


def readers(server: MemoryServer) -> dict[str, Reader]:
    return {key: unpack_reader(packed) for key, packed in table(server, "windows").items()}


def logs(server: MemoryServer) -> dict[str, TopicLog]:
    return {key: unpack_log(packed) for key, packed in table(server, "logs").items()}


def members(server: MemoryServer) -> dict[str, Member]:
    states = table(server, "members").items()
    return {key: msgspec.json.decode(packed, type=Member) for key, packed in states}


def subscribers(server: MemoryServer) -> dict[str, Subscriber]:
    return {key: unpack_subscriber(packed) for key, packed in table(server, "subscribers").items()}


def dead(server: MemoryServer) -> dict[str, DeadMessage]:
    states = table(server, "dead").items()
    return {key: msgspec.json.decode(packed, type=DeadMessage) for key, packed in states}


def scores(server: MemoryServer, topic: str) -> Zset:
    return server.of(keys.message_index(topic), Zset)


def applied(server: MemoryServer) -> Applied:
    packed = server.text(keys.applied(PUBSUB))
    assert packed is not None
    return msgspec.json.decode(packed, type=Applied)


def counters(server: MemoryServer) -> Counters:
    return msgspec.convert(applied(server).machine["delivery"], Counters)


def check(server: MemoryServer, driver: Driver) -> None:
    """Check all invariants that hold after every batch."""
    check_bodies(server)
    check_logs(server)
    check_readers(server)
    check_leases(server, driver)
    check_counters(server)


def check_bodies(server: MemoryServer) -> None:
    """Check that every id has its body, and every body a reference."""
    referenced = {keys.message_body(name) for name in dead(server)}
    for name, value in server.values.items():
        if name.startswith((INDEX, RETAINED)) and isinstance(value, Zset):
            referenced |= {keys.message_body(message_id) for message_id in value}
    bodies = {
        name
        for name, value in server.values.items()
        if name.startswith(INDEX) and isinstance(value, Hash)
    }
    assert not referenced - bodies, f"ids without a body: {referenced - bodies}"
    assert not bodies - referenced, f"bodies without a reference: {bodies - referenced}"


def check_logs(server: MemoryServer) -> None:
    """Check the state of each topic's log against its index."""
    for topic, log in logs(server).items():
        stored = scores(server, topic)
        assert log.length == len(stored), f"{topic}: {log.length} of {dict(stored)}"
        assert 0 <= log.length <= log.number, topic
        assert all(log.cursor < score <= log.last for score in stored.values()), (log, dict(stored))
    assert set(index(server, TOPICS)) == {x for x, log in logs(server).items() if log.length}


def check_readers(server: MemoryServer) -> None:
    """Check read offsets, the messages above them, their views, and that each has a subscriber."""
    every = readers(server)
    assert set(index(server, READERS)) == set(every)
    views = dict[str, bytes]()
    for key, reader in every.items():
        subscriber, topic = split_reader(key)
        assert reader.read_offset <= reader.cursor, key
        open_ones = {x.message_id for x in reader.returned} | set(reader.leases)
        assert set(reader.unfinished) == open_ones - set(reader.requeued), key
        places = [each.score for each in reader.unfinished.values()]
        assert places == sorted(set(places)), key
        assert all(each.before < each.score for each in reader.unfinished.values()), key
        unsafe = [*(x.score for x in reader.leases.values()), *(x.score for x in reader.returned)]
        assert set(reader.requeued) <= open_ones
        assert reader.returned == sorted(reader.returned), key
        assert len({x.message_id for x in reader.returned}) == len(reader.returned), key
        assert not {x.message_id for x in reader.returned} & set(reader.leases), key
        assert all(score <= reader.cursor for score in unsafe), key
        if reader.message_id:
            views[keys.read_offset(shown(subscriber), topic)] = reader.message_id.encode()
        known = subscribers(server).get(subscriber)
        assert known is not None, f"{key!r} has no subscriber"
        assert known.wants(topic) is not None or known.given_up, f"{key!r} has no filter"
    shown_keys = {
        x: v for x, v in server.values.items() if x.startswith(keys.read_offset("", "")[:11])
    }
    assert shown_keys == views


def check_leases(server: MemoryServer, driver: Driver) -> None:
    """Check that each lease is in its window and its member, and that a tick is due before its deadline."""
    in_windows = Counter[tuple[str, int, str]]()
    due, every = server.of(keys.due(PUBSUB), Zset), members(server)
    for key, reader in readers(server).items():
        for lease in reader.leases.values():
            in_windows[lease.member, lease.number, key] += 1
            at = due.get(due_member(WINDOW, key))
            if lease.until:
                assert at is not None, (key, lease)
                assert at <= lease.until, (key, lease)
            else:
                assert lease.silent, (key, lease)
            member = every[lease.member]
            assert not lease.silent or (lease.sent and member.filters), (key, lease)
    with_members = Counter[tuple[str, int, str]]()
    limit = max(each.max_inflight for each in driver.machine.rules.delivery_rules_of("pubsub"))
    for name, member in members(server).items():
        assert member.in_hand <= limit, f"{name} has {member.leases} {member.left}"
        with_members.update((name, number, key) for number, key in member.leases.items())
    assert in_windows == with_members


def check_counters(server: MemoryServer) -> None:
    """Check the counters of the partition against its content."""
    counted, every = counters(server), readers(server)
    leases = [lease for reader in every.values() for lease in reader.leases.values()]
    assert counted.unconfirmed == sum(not lease.sent for lease in leases)
    waiting = {key for key, reader in every.items() if reader.waits}
    assert waiting == set(index(server, leasing.WAITING))
    assert counted.waiting == len(waiting)
    work = index(server, leasing.WORK)
    assert counted.work == len(work), f"{counted.work} of {dict(work)}"
    assert counted.forgetting == sum(name.startswith(rounds.BESIDES) for name in work)
    assert counted.resuming == (leasing.RESUME in work)
    active = {name for name, member in members(server).items() if member.round.active}
    assert active == {x for x in work if not x.startswith((leasing.RESUME, rounds.BESIDES))}
    dying = [each for each in dead(server).values() if each.holders]
    assert counted.retractable == len(dying)
    aliases = {x: each.message_id for each in dying for _, x, _ in each.holders if x is not None}
    assert {x: name.decode() for x, name in table(server, "aliases").items()} == aliases
    if not counted.forgetting:
        assert not any(each.given_up for each in subscribers(server).values())
    if not counted.paused:
        assert counted.unconfirmed <= leasing.UNCONFIRMED_MAX


def check_nothing_idle(server: MemoryServer, driver: Driver, now_ms: int) -> None:
    """Check, with nothing due, that no available member has room for a message that waits for it."""
    if counters(server).paused:
        return
    every, stored, known = readers(server), logs(server), subscribers(server)
    for name, member in members(server).items():
        for topic_filter in member.filters:
            for topic, log in stored.items():
                rule = driver.machine.rules.delivery_rule(topic)
                if rule is None or not matches(topic_filter, topic):
                    continue
                if member.in_hand >= rule.max_inflight or not member.available():
                    continue
                subscriber = subscriber_of(name, topic_filter)
                reader = every.get(reader_key(subscriber, topic))
                left = _left(scores(server, topic), reader, known[subscriber], topic, rule.start)
                left = [x for x in left if not has_copy(server, member.client_id, x)]
                assert not left or not log.length, f"{name} could receive {left} of {topic}"


def has_copy(server: MemoryServer, client_id: str, message_id: str) -> bool:
    """True if a client still has a copy of a lease that is over."""
    return any(
        copy.message_id == message_id
        for member in members(server).values()
        if member.client_id == client_id
        for copy in member.left.values()
    )


def _left(
    stored: Zset, reader: Reader | None, known: Subscriber, topic: str, start: str
) -> list[str]:
    if reader is None:
        wants = known.wants(topic)
        assert wants is not None, (known, topic)
        begin = 0 if start == "earliest" else wants.start
        return [name for name, score in stored.items() if score > begin]
    ahead = [name for name, score in stored.items() if score > reader.cursor]
    return [*(each.message_id for each in reader.returned), *ahead]


def check_nothing_overdue(server: MemoryServer, now_ms: int) -> None:
    """Check that nothing that is due is left."""
    due = server.of(keys.due(PUBSUB), Zset)
    assert all(at > now_ms for at in due.values()), f"overdue at {now_ms}: {due}"


def rewound_key(event: OperatorRewind) -> str:
    """Return the key of the reader that an order rewinds."""
    group = GROUP if event.subscriber.startswith("$share/") else ""
    return reader_key(group + event.subscriber, event.topic)


def is_group(topic_filter: str) -> bool:
    """True if a filter is a shared subscription."""
    return split_share(topic_filter)[0] is not None


class Watcher:
    """Checks step by step that offsets pass finished messages only, and that first deliveries are in order.

    - `_before`: the readers after the last step.
    - `_done`: (client id, message id) of acknowledged messages, and of those that need no acknowledgement.
    - `_first`: reader → message id → score of the messages that were delivered to it.
    - `_events`: the events since the last check.
    - `_requeued`: message ids of requeued dead letters. They have a new place in the log.
    - `_given_up`: reader → its `made_at`, of readers that an unsubscribe ended.
    """

    def __init__(self, world: Pubsub) -> None:
        self._world = world
        self._before: dict[str, Reader] = {}
        self._done: set[tuple[str, str]] = set()
        self._first: dict[str, dict[str, int]] = {}
        self._events: list[Event] = []
        self._requeued: set[str] = set()
        self._given_up: dict[str, int | None] = {}
        self._scores: dict[str, int] = {}

    def record(self, events: Iterable[Event]) -> None:
        """Record events that the partition will fold."""
        self._events += events
        for event in events:
            match event:
                case MessageAcked():
                    # An alias is the message id, "@" and the lease.
                    name, _, _ = event.message_id.partition("@")
                    self._done.add((event.client_id, name))
                case DeliveriesSent():
                    for report in event.sent:
                        if report.qos == 0:
                            self._done.add((report.client_id, report.message_id))
                case DeliveryFailed(reason="gone"):
                    self._done.add((event.client_id, event.message_id))
                case OperatorRequeue():
                    self._requeued.add(event.message_id)
                case SubscriberLeft(reason="unsubscribed"):
                    self._unsubscribed(event)

    def _unsubscribed(self, event: SubscriberLeft) -> None:
        """Note the readers that end by this event: those of a single client that no other filter of it matches."""
        if is_group(event.topic_filter):
            return
        held = self._world.clients[event.client_id].filters
        others = [x for x in held if x != event.topic_filter and not is_group(x)]
        for key, reader in self._before.items():
            subscriber, topic = split_reader(key)
            ends = subscriber == event.client_id and matches(event.topic_filter, topic)
            if ends and not any(matches(each, topic) for each in others):
                self._given_up[key] = reader.made_at

    def _check_given_up(self, now: Mapping[str, Reader]) -> None:
        """Check, once ticks have done their work, that no reader goes on after its subscription was given up."""
        if counters(self._world.server).forgetting:
            return
        for key, made_at in self._given_up.items():
            assert key not in now or now[key].made_at != made_at, f"{key!r} was given up"
        self._given_up.clear()

    def check(self, commands: Sequence[Deliver]) -> None:
        """Check the readers and the new commands after a step."""
        server = self._world.server
        rewound = {rewound_key(x) for x in self._events if isinstance(x, OperatorRewind)}
        self._events = []
        now = readers(server)
        for topic in logs(server):
            self._scores.update(scores(server, topic))
        for key, before in self._before.items():
            after = now.get(key)
            if after is None or after.made_at != before.made_at or key in rewound:
                self._first.pop(key, None)
                continue
            assert after.read_offset >= before.read_offset, f"{key!r} went back"
            assert after.lost >= before.lost
            self._check_passed(key, before, after)
        self._check_order(commands, now)
        self._check_given_up(now)
        self._before = now

    def _check_passed(self, key: str, before: Reader, after: Reader) -> None:
        subscriber, topic = split_reader(key)
        for message_id, score in scores(self._world.server, topic).items():
            if before.read_offset < score <= after.read_offset:
                acked = any(name == message_id for _, name in self._done)
                given_up = dead(self._world.server).get(message_id)
                gave_up = given_up is not None and subscriber in given_up.subscribers
                assert acked or gave_up, f"{key!r} passed {message_id}"

    def _check_order(self, commands: Sequence[Deliver], now: Mapping[str, Reader]) -> None:
        for command in commands:
            number = int(command.lease.rpartition("/")[2]) if command.lease else 0
            for key, reader in now.items():
                lease = reader.leases.get(command.message_id)
                if lease is None or lease.number != number:
                    continue
                first = self._first.setdefault(key, {})
                if command.message_id in first or command.message_id in self._requeued:
                    continue
                latest = max(first.values(), default=0)
                assert lease.score > latest, f"{key!r} received {command.message_id} out of order"
                first[command.message_id] = lease.score
