"""What the pubsub agent knows: of a topic its log, of a subscriber since when it is known, of both together a reader.

A subscriber is a client, or a group of clients with one shared subscription; the key of a reader names it and its topic.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec
from msgspec import Struct, field

from millpond.agents.delivery.window import Waiting, Window
from millpond.schemas.topics import SHARE_PREFIX, matches

# In front of a group's subscription, since a client id can look like one. No client id begins so ([MQTT-1.5.4-2]).
GROUP: Final = "\0"


def subscriber_of(member: str, topic_filter: str) -> str:
    """The subscriber that a member is, or is one of, by a filter."""
    group, separator, _ = member.partition("\0")
    return f"{GROUP}{group}/{topic_filter}" if separator else member


def reader_key(subscriber: str, topic: str) -> str:
    """The key of a reader."""
    return f"{subscriber}\0{topic}"


def split_reader(key: str) -> tuple[str, str]:
    """Subscriber and topic of a reader."""
    subscriber, _, topic = key.rpartition("\0")
    return subscriber, topic


def subscriber_named(name: str) -> str:
    """A subscriber, as users write it."""
    return f"{GROUP}{name}" if name.startswith(SHARE_PREFIX) else name


def shown(subscriber: str) -> str:
    """A subscriber as users write it: a client id, or a shared subscription."""
    return subscriber.removeprefix(GROUP)


class TopicLog(Window, array_like=True, dict=True):
    """What is stored of a topic: `length` messages; `number` have ever been, the newest at `last` (a score).

    All up to `cursor` was taken off the log's head, `floor_id` last, if that is known; one that expired by itself leaves a gap behind it.
    """

    length: int = 0
    number: int = 0
    last: int = 0
    floor_id: str = ""

    @property
    def gone(self) -> int:
        """How many are stored no more."""
        return self.number - self.length

    def complete(self) -> bool:
        """Whether all that is stored is in memory."""
        return self.read_to >= self.last


class Unfinished(NamedTuple):
    """A message that a reader has handed out, and that is not done: its place, and place and id of the one handed out before
    it. That one is what the read offset shows while this one is the oldest.
    """

    score: int
    before: int
    before_id: str


class Reader(Window, array_like=True, dict=True):
    """One subscriber's way through one topic.

    `unfinished` are the messages that were handed out and are not done, in log order: they are leased or returned. All
    others up to the cursor are done, so the read offset follows from these two, and nothing has to remember what is done
    ahead of it. `cursor_id` is the message at the cursor, if that is known. `number` is that of the message at the cursor,
    `lost` counts those that had gone before they were done with, and that are in nobody's hands. `made_at` is the
    `since` by which it was made; None if it was not yet. `requeued` are dead messages that come once more, whatever the
    log and the offset are at.
    """

    read_offset: int = 0
    message_id: str = ""
    unfinished: dict[str, Unfinished] = field(default_factory=dict)  # by message id
    number: int = 0
    lost: int = 0
    made_at: int | None = None
    requeued: list[str] = field(default_factory=list)
    cursor_id: str = ""

    def clear(self) -> None:
        """It was never made."""
        self.cursor = self.read_offset = self.number = self.lost = 0
        self.message_id = self.cursor_id = self.turn = ""
        self.returned, self.leases, self.unfinished, self.requeued = [], {}, {}, []
        self.made_at = self.due = None
        self.stored_leases = 0
        self.aliases, self.silent = {}, []
        self.forget_ahead()

    def start(self, at: int) -> None:
        """It is made, and begins behind a place in the log."""
        self.cursor = self.read_offset = at
        self.forget_trimmed(at)
        self.read_to = max(self.read_to, at)

    def forget_trimmed(self, floor: int) -> None:
        """Of what is ahead in memory, forget all up to a place in the log: it is not handed out any more."""
        for message_id in [each for each, score in self.ahead.items() if score <= floor]:
            del self.ahead[message_id]
        if self.read_to:  # else nothing was read yet, and it is not decided where that begins
            self.read_to = max(self.read_to, floor)

    def take(self, waiting: Waiting) -> None:
        before = self.cursor
        super().take(waiting)
        if self.cursor > before:  # not one that had come back
            self.number += 1
            handed_out = Unfinished(waiting.score, before, self.cursor_id)
            self.unfinished.setdefault(waiting.message_id, handed_out)
            self.cursor_id = waiting.message_id

    def remove(self, message_id: str) -> None:
        super().remove(message_id)
        if message_id in self.requeued:
            self.requeued.remove(message_id)
        self.unfinished.pop(message_id, None)
        self.advance()

    def advance(self) -> None:
        """Move the read offset up to the oldest message that is not done."""
        oldest = next(iter(self.unfinished.values()), None)
        score, message_id = (
            (self.cursor, self.cursor_id) if oldest is None else (oldest.before, oldest.before_id)
        )
        if score > self.read_offset:
            self.read_offset, self.message_id = score, message_id or self.message_id

    def move_up(self, log: TopicLog) -> None:
        """Move up to what the log still has. What is leased is its holder's alone."""
        floor = log.cursor
        for message_id, lease in self.leases.items():
            if lease.score <= floor and lease.stored and message_id not in self.requeued:
                self.unstore(message_id)
        for waiting in list(self.returned):
            if waiting.score <= floor and waiting.message_id not in self.requeued:
                self.remove(waiting.message_id)
                self.lost += 1
        if self.cursor < floor:
            self.forget_trimmed(floor)
            self.lost += max(log.gone - self.number, 0)
            self.number = max(log.gone, self.number)
            self.cursor, self.cursor_id = floor, log.floor_id or self.cursor_id
            self.read_to = max(self.read_to, floor)
        oldest = next(iter(self.unfinished), None)
        if oldest is not None:
            score, before, before_id = self.unfinished[oldest]
            if score > floor > before:
                self.unfinished[oldest] = Unfinished(score, floor, log.floor_id or before_id)
        self.advance()


class KnownFilter(NamedTuple):
    """How a subscriber is known by a filter. Both are places in the log of this partition (scores).

    `since` is the place of the announcement: it tells which of announcements, readers and unsubscribes came first. `start`
    is where `latest` begins. That place comes from a time of the clients' log, so it orders nothing else.
    """

    since: int
    start: int


class Subscriber(Struct, array_like=True):
    """How a subscriber is known by each of its filters, without `$share/{group}/`; when (ms) it has gone for good; the
    filters that it gave up, and where in the log (a score), whose readers are still to be forgotten.
    """

    known: dict[str, KnownFilter] = field(default_factory=dict)
    gone_at: int | None = None
    given_up: dict[str, int] = field(default_factory=dict)

    def wants(self, topic: str) -> KnownFilter | None:
        """How it is known to want a topic, by the first of all filters that match; None if it does not."""
        wanting = [known for each, known in self.known.items() if matches(each, topic)]
        if not wanting:
            return None
        return KnownFilter(min(each.since for each in wanting), min(each.start for each in wanting))

    def has_given_up(self, topic: str, made_at: int) -> bool:
        """Whether a reader of a topic is to be forgotten: its filter was given up since, and no other one goes on."""
        for topic_filter, at in self.given_up.items():
            if made_at < at and matches(topic_filter, topic):
                known = self.wants(topic)
                if known is None or known.since > at:
                    return True
        return False


_encode: Final = msgspec.json.Encoder().encode
_decode_log: Final = msgspec.json.Decoder(TopicLog).decode
_decode_reader: Final = msgspec.json.Decoder(Reader).decode
_decode_subscriber: Final = msgspec.json.Decoder(Subscriber).decode


def pack(state: TopicLog | Reader | Subscriber) -> bytes:
    """A state as it is stored."""
    return _encode(state)


def unpack_log(packed: bytes | None) -> TopicLog:
    """A topic's log as it was stored."""
    return TopicLog() if packed is None else _decode_log(packed)


def unpack_reader(packed: bytes | None) -> Reader:
    """A reader as it was stored."""
    return Reader() if packed is None else _decode_reader(packed)


def unpack_subscriber(packed: bytes | None) -> Subscriber:
    """A subscriber as it was stored."""
    return Subscriber() if packed is None else _decode_subscriber(packed)
