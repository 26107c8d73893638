"""What the pubsub agent knows: of a topic its log, of a subscriber since when it is known, of both together a reader.

A subscriber is a client, or a group of clients with one shared subscription; the key of a reader names it and its topic.
"""

from __future__ import annotations

from bisect import insort
from typing import Final

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


class Reader(Window, array_like=True, dict=True):
    """One subscriber's way through one topic.

    `done` are messages that are done with, ahead of the read offset: it moves over them once all before are. `number` is
    that of the message at the cursor, `lost` counts those that had gone before they were done with, and that are in
    nobody's hands. `made_at` is when (a score) it was made; None if it was not yet. `requeued` are dead messages that come
    once more, whatever the log and the offset are at.
    """

    read_offset: int = 0
    message_id: str = ""
    done: list[tuple[int, str]] = field(default_factory=list)
    number: int = 0
    lost: int = 0
    made_at: int | None = None
    requeued: list[str] = field(default_factory=list)

    def clear(self) -> None:
        """It was never made."""
        self.cursor = self.read_offset = self.number = self.lost = 0
        self.message_id = self.turn = ""
        self.returned, self.leases, self.done, self.requeued = [], {}, [], []
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
        self.number += waiting.score > self.cursor
        super().take(waiting)

    def remove(self, message_id: str) -> None:
        super().remove(message_id)
        if message_id in self.requeued:
            self.requeued.remove(message_id)

    def finish(self, score: int, message_id: str) -> None:
        """A message is done with. One before the read offset was for a second time."""
        if score > self.read_offset and (score, message_id) not in self.done:
            insort(self.done, (score, message_id))
            self.advance()

    def advance(self) -> None:
        """Move the read offset over the unbroken run of messages that are done with."""
        leased = ((message_id, lease.score) for message_id, lease in self.leases.items())
        returned = ((each.message_id, each.score) for each in self.returned)
        first = min(
            (score for each, score in (*leased, *returned) if each not in self.requeued),
            default=None,
        )
        count = 0
        for score, message_id in self.done:
            if first is not None and score > first:
                break
            self.read_offset, self.message_id = score, message_id or self.message_id
            count += 1
        del self.done[:count]

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
            self.cursor = floor
            self.read_to = max(self.read_to, floor)
        if self.read_offset < floor and floor not in (score for score, _ in self.done):
            insort(self.done, (floor, log.floor_id))
        self.advance()


class Subscriber(Struct, array_like=True):
    """Since when (a score) a subscriber is known by each of its filters, without `$share/{group}/`; when (ms) it has gone
    for good; the filters that it gave up, and when (a score), whose readers are still to be forgotten.
    """

    known: dict[str, int] = field(default_factory=dict)
    gone_at: int | None = None
    given_up: dict[str, int] = field(default_factory=dict)

    def since(self, topic: str) -> int | None:
        """Since when it is known to want a topic; None if it does not."""
        times = [at for each, at in self.known.items() if matches(each, topic)]
        return min(times, default=None)

    def has_given_up(self, topic: str, made_at: int) -> bool:
        """Whether a reader of a topic is to be forgotten: its filter was given up since, and no other one goes on."""
        for topic_filter, at in self.given_up.items():
            if made_at < at and matches(topic_filter, topic):
                since = self.since(topic)
                if since is None or since > at:
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
