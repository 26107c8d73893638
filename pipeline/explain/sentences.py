"""Results in words: times, counts, and one sentence for each state of a message."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Final

from millpond.pipeline.explain.results import MessageState, State
from millpond.pipeline.kafka.log_reader import Searched


def time(at_ms: int) -> str:
    """A time in UTC, to the millisecond."""
    at = datetime.fromtimestamp(at_ms / 1000, UTC)
    return f"{at:%Y-%m-%d %H:%M:%S}.{at_ms % 1000:03d}Z"


def age(ms: int) -> str:
    """A duration, in the largest unit of which there are at least two."""
    seconds = max(ms, 0) / 1000
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{int(seconds // length)} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def count(number: int, thing: str) -> str:
    """A number of things: `no topics`, `1 topic`, `2 topics`."""
    return f"{number or 'no'} {thing}{'' if number == 1 else 's'}"


def in_words(state: MessageState, now_ms: int) -> str:
    """A state as a sentence without its subject: `ready: 2 clients online`."""
    return _SENTENCES[state.state](state, now_ms)


def _waiting(state: MessageState, now_ms: int) -> str:
    since = "" if state.since is None else f", published at {time(state.since)}"
    return f"in Kafka{since}: its agent has not read it yet"


def _stored(state: MessageState, now_ms: int) -> str:
    why = f": {state.reason}" if state.reason else ""
    since = "" if state.since is None else f" since {time(state.since)}"
    return f"stored{since}{why}"


def _ready(state: MessageState, now_ms: int) -> str:
    details = []
    if state.deliveries:
        details.append(f"delivered {count(state.deliveries, 'time')} without an acknowledgement")
    if state.before is not None:
        details.append(f"{count(state.before, 'stored message')} before it")
    if state.online is not None:
        details.append(f"{count(state.online, 'client')} online")
    return f"ready: {', '.join(details)}" if details else "ready"


def _leased(state: MessageState, now_ms: int) -> str:
    assert state.since is not None, "a lease has a beginning"
    group = "" if state.group is None else f" of {state.group}"
    sentence = f"leased by {state.client_id!r}{group} since {time(state.since)}"
    sentence += f" ({age(now_ms - state.since)} ago), delivery {state.attempt}"
    if state.until is None:
        sentence += ", sent; overdue: it stays with its client unless another one takes it over"
    elif state.sent:
        overdue = state.until <= now_ms
        sentence += ", sent, " + ("its ack is overdue since" if overdue else "its ack is due by")
    else:
        sentence += ", not confirmed by the bridge, returns at"
    if state.until is not None:
        sentence += f" {time(state.until)}"
    if not state.stored:
        sentence += "; it has expired or was superseded, and only this client has it"
    return sentence


def _acked(state: MessageState, now_ms: int) -> str:
    by = "" if state.client_id is None else f" by {state.client_id!r}"
    at = "" if state.since is None else f" at {time(state.since)}"
    return f"acked{by}{at}" + (f" ({state.reason})" if state.reason else "")


def _behind(state: MessageState, now_ms: int) -> str:
    return "behind its read offset: acknowledged, or older than its first read"


def _expired(state: MessageState, now_ms: int) -> str:
    at = "" if state.since is None else f" at {time(state.since)}"
    return f"expired{at}" + (f": {state.reason}" if state.reason else "")


def _dead(state: MessageState, now_ms: int) -> str:
    at = "" if state.since is None else f" since {time(state.since)}"
    had = ", ".join(map(repr, state.holders))
    return f"dead{at}: {state.reason}" + (f" (an ack by {had} takes it back)" if had else "")


def _dropped(state: MessageState, now_ms: int) -> str:
    at = "" if state.since is None else f" at {time(state.since)}"
    return f"dropped by an operator{at}"


def _passed_on(state: MessageState, now_ms: int) -> str:
    return "passed on: at QoS 0 it went to clients that were online, if any, and is not kept"


def _retained(state: MessageState, now_ms: int) -> str:
    return "retained: stored only as the retained message of its topic"


def _not_stored(state: MessageState, now_ms: int) -> str:
    return f"not stored: {state.reason}"


def _gone(state: MessageState, now_ms: int) -> str:
    return f"gone without an acknowledgement: {state.reason}"


_SENTENCES: Final[Mapping[State, Callable[[MessageState, int], str]]] = {
    "waiting": _waiting,
    "stored": _stored,
    "ready": _ready,
    "leased": _leased,
    "acked": _acked,
    "behind": _behind,
    "expired": _expired,
    "dead": _dead,
    "dropped": _dropped,
    "passed_on": _passed_on,
    "retained": _retained,
    "not_stored": _not_stored,
    "gone": _gone,
}


def searched(part: Searched) -> str:
    """The part of a partition that was searched."""
    where = f"{part.kafka_topic}[{part.partition}]"
    if part.start >= part.end:
        return f"{where}, which is empty"
    if part.first >= part.stop:
        return f"{where}: nothing of its records {part.start} to {part.end - 1}"
    of = "" if part.whole else f" of {part.start} to {part.end - 1}"
    return f"{where}, records {part.first} to {part.stop - 1}{of}"
