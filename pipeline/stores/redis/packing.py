"""Effects as Redis commands.

A batch becomes four lists of commands, which run in this order:

1. `bodies`: bodies and receipts, with their expiries.
2. `entries`: index entries and retained entries. A reader never finds an id before its body.
3. `state`: the private state, the journal, and the fence last.
4. `removals`: deletions, cleared expiries of bodies, presence, views of read offsets, user commands.

Most effects add their commands at once. Index entries, states, private indexes and due times are collected first, so that
a batch writes each of their keys once. The last effect of a batch on a state or a private index counts.

**A foreign key is never destroyed.** Deletions use commands that work on Millpond's own types only: `HDEL` of a body's
fields, `ZREMRANGEBYRANK` of a retained entry. `DEL` would delete any key. A key of another type refuses such a command
with WRONGTYPE, and the refusal becomes a dead letter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import msgspec

from millpond.agents.effects import (
    ClearBodyExpiry,
    ClearRetained,
    DeleteBody,
    ForgetPresence,
    KeepReceipt,
    Output,
    Reindex,
    Retain,
    RunCommand,
    SetDue,
    SetIndex,
    SetPresence,
    SetRules,
    SetState,
    ShowOffset,
    StoreMessage,
    Unindex,
    WriteSeen,
)
from millpond.agents.ports import Applied, Transaction
from millpond.pipeline.stores.redis.commands import CommandList
from millpond.schemas import keys
from millpond.schemas.codec import payload_bytes
from millpond.schemas.keys import Partition

# How much longer the server keeps a body than the message needs it. A tick removes index entry and body, on the log's
# clock. The server's expiry is a safety net for bodies that no tick removes, and it runs on the server's clock. The hour
# covers clocks that differ and workers that are down, so that no id loses its body before its tick.
BODY_GRACE_MS: Final = 3_600_000

BODY_FIELDS: Final = ("id", "from", "qos", "topic", "payload", "ts", "retain", "expires_at")
PRESENCE_FIELDS: Final = ("state", "online_at", "offline_at")

_encode_json = msgspec.json.Encoder().encode
_encode_lines = msgspec.json.Encoder().encode_lines
decode_applied = msgspec.json.Decoder(Applied).decode
decode_outputs = msgspec.json.Decoder(list[Output]).decode
_decode_lines = msgspec.json.Decoder(str).decode_lines


def decode_seen(lines: bytes | None) -> tuple[str, ...]:
    """Decode the message ids of one generation: a JSON string on each line, because an id may contain a line break."""
    return tuple(_decode_lines(lines or b""))


class BatchCommands:
    """The commands of one batch, in the four lists of this module.

    The other attributes collect what is written once: `indexed` by topic, `states` by table and key, `indexes` by index
    and member, and `due`. None as a state or score means a removal.
    """

    def __init__(self, partition: Partition, transaction: Transaction, wall_ms: int = 0) -> None:
        """Translate the effects of a transaction. `wall_ms` is the time of the wall clock, which resembles the server's."""
        self.partition, self._wall_ms = partition, wall_ms
        self.bodies, self.entries = CommandList(), CommandList()
        self.state, self.removals = CommandList(), CommandList()
        self.indexed: dict[str, list[tuple[StoreMessage | Reindex, str]]] = {}
        self.states: dict[str, dict[str, bytes | None]] = {}
        self.indexes: dict[str, dict[str, int | None]] = {}
        self.due = DueCommands()
        for effect in transaction.effects:
            _TRANSLATE[type(effect)](self, effect)
        self._entries()
        self._states()
        self._fence(transaction)

    def body_expires_at(self, expires_at: int) -> int:
        """Return when the server may delete the body of a message that ends at `expires_at` (ms)."""
        # `max`: a batch of an old log may write a body whose time is over. A later record may still extend that time,
        # and the server would delete the body before the worker reads that record.
        return max(expires_at, self._wall_ms) + BODY_GRACE_MS

    def _entries(self) -> None:
        for topic, messages in self.indexed.items():
            # NX: a repeat of a stored message keeps its place in the log's order.
            zadd: list[str | int] = ["ZADD", keys.message_index(topic), "NX"]
            for message, message_id in messages:
                zadd += (message.score, message_id)
            self.entries.add(tuple(message for message, _ in messages), *zadd)

    def _states(self) -> None:
        for name, states in self.states.items():
            written = [(key, state) for key, state in states.items() if state is not None]
            deleted = [key for key, state in states.items() if state is None]
            if written:
                self.state.add(None, "HSET", name, *(part for pair in written for part in pair))
            if deleted:
                self.state.add(None, "HDEL", name, *deleted)
        for name, scores in self.indexes.items():
            added = {member: score for member, score in scores.items() if score is not None}
            removed = [member for member, score in scores.items() if score is None]
            if added:
                self.state.add(None, "ZADD", name, *_scored(added))
            if removed:
                self.state.add(None, "ZREM", name, *removed)
        name = keys.due(self.partition)
        if self.due.removed:
            self.state.add(None, "ZREM", name, *self.due.removed)
        if self.due.exact:
            self.state.add(None, "ZADD", name, *_scored(self.due.exact))
        if self.due.earliest:
            self.state.add(None, "ZADD", name, "LT", *_scored(self.due.earliest))

    def _fence(self, transaction: Transaction) -> None:
        journal = keys.journal(self.partition)
        if transaction.outputs:
            outputs = _encode_json(transaction.outputs)
            self.state.add(None, "HSET", journal, transaction.applied.sequence, outputs)
        if transaction.produced:
            self.state.add(None, "HDEL", journal, *transaction.produced)
        applied = _encode_json(transaction.applied)
        self.state.add(None, "SET", keys.applied(self.partition), applied)

    def all(self) -> CommandList:
        """Return all four lists as one, for a single server."""
        joined = CommandList()
        for part in (self.bodies, self.entries, self.state, self.removals):
            joined.extend(part)
        return joined


class DueCommands:
    """The `SetDue` effects of a batch, combined to at most one change for each member.

    - `removed`: the member has no time.
    - `exact`: the member has exactly this time, because the batch removed it first.
    - `earliest`: the member has this time, unless the one in the store is earlier.
    """

    def __init__(self) -> None:
        self.removed: dict[str, None] = {}
        self.exact: dict[str, int] = {}
        self.earliest: dict[str, int] = {}

    def fold(self, member: str, at: int | None) -> None:
        """Combine one more effect with those before it. None as time removes the member."""
        if at is None:
            self.exact.pop(member, None)
            self.earliest.pop(member, None)
            self.removed[member] = None
        elif member in self.removed:
            del self.removed[member]
            self.exact[member] = at
        else:
            times = self.exact if member in self.exact else self.earliest
            times[member] = min(at, times.get(member, at))


def _scored(scores: dict[str, int]) -> Iterable[str | int]:
    return (part for member, score in scores.items() for part in (score, member))


def _store_message(commands: BatchCommands, effect: StoreMessage) -> None:
    event = effect.event
    body = keys.message_body(event.message_id)
    payload = event.payload if event.payload_encoding == "utf-8" else payload_bytes(event)
    # Only a message that came with an expiry has this field. It is in ms.
    expiry = () if event.expires_at is None else ("expires_at", event.expires_at)
    # fmt: off
    commands.bodies.add(
        effect, "HSET", body, "id", event.message_id, "from", event.client_id, "qos", event.qos,
        "topic", event.topic, "payload", payload, "ts", event.published_at // 1000,
        "retain", "true" if event.retain else "false", *expiry,
    )
    # fmt: on
    if effect.expires_at is not None:
        commands.bodies.add(effect, "PEXPIREAT", body, commands.body_expires_at(effect.expires_at))
    if effect.indexed:
        commands.indexed.setdefault(event.topic, []).append((effect, event.message_id))


def _reindex(commands: BatchCommands, effect: Reindex) -> None:
    commands.indexed.setdefault(effect.topic, []).append((effect, effect.message_id))
    if effect.expires_at is not None:
        body = keys.message_body(effect.message_id)
        commands.bodies.add(effect, "PEXPIREAT", body, commands.body_expires_at(effect.expires_at))


def _retain(commands: BatchCommands, effect: Retain) -> None:
    name = keys.retained(effect.topic)
    commands.entries.add(effect, "ZREMRANGEBYRANK", name, 0, -1)
    commands.entries.add(effect, "ZADD", name, effect.score, effect.message_id)
    _set_score(commands, keys.index(commands.partition, keys.RETAINED_INDEX), effect.topic, 0)


def _keep_receipt(commands: BatchCommands, effect: KeepReceipt) -> None:
    name = keys.receipt(effect.message_id)
    commands.bodies.add(effect, "HSET", name, f"{effect.kind}:{effect.client_id}", effect.at_s)
    commands.bodies.add(effect, "PEXPIREAT", name, effect.expires_at)


def _set_state(commands: BatchCommands, effect: SetState) -> None:
    name = keys.table(commands.partition, effect.table)
    commands.states.setdefault(name, {})[effect.key] = effect.state


def _set_index(commands: BatchCommands, effect: SetIndex) -> None:
    _set_score(commands, keys.index(commands.partition, effect.index), effect.key, effect.score)


def _set_score(commands: BatchCommands, index: str, member: str, score: int | None) -> None:
    commands.indexes.setdefault(index, {})[member] = score


def _set_rules(commands: BatchCommands, effect: SetRules) -> None:
    commands.state.add(None, "SET", keys.rules(commands.partition), effect.canonical)


def _write_seen(commands: BatchCommands, effect: WriteSeen) -> None:
    name = keys.seen(commands.partition, effect.generation)
    verb = "SET" if effect.fresh else "APPEND"
    commands.state.add(None, verb, name, _encode_lines(effect.message_ids))


def _set_due(commands: BatchCommands, effect: SetDue) -> None:
    commands.due.fold(effect.member, effect.at)


def _unindex(commands: BatchCommands, effect: Unindex) -> None:
    if effect.message_ids:
        name = keys.message_index(effect.topic)
        commands.removals.add(effect, "ZREM", name, *effect.message_ids)


def _clear_retained(commands: BatchCommands, effect: ClearRetained) -> None:
    commands.removals.add(effect, "ZREMRANGEBYRANK", keys.retained(effect.topic), 0, -1)
    _set_score(commands, keys.index(commands.partition, keys.RETAINED_INDEX), effect.topic, None)


def _delete_body(commands: BatchCommands, effect: DeleteBody) -> None:
    commands.removals.add(effect, "HDEL", keys.message_body(effect.message_id), *BODY_FIELDS)


def _clear_body_expiry(commands: BatchCommands, effect: ClearBodyExpiry) -> None:
    commands.removals.add(effect, "PERSIST", keys.message_body(effect.message_id))


def _set_presence(commands: BatchCommands, effect: SetPresence) -> None:
    online_at = effect.online_at // 1000
    commands.removals.add(
        effect, "HSET", keys.presence(effect.client_id), "state", int(effect.online),
        "online_at", online_at, "offline_at", offline_at(effect),
    )  # fmt: skip
    if effect.left_node is not None:
        commands.removals.add(effect, "HDEL", keys.node(effect.left_node), effect.client_id)
    if effect.node is not None:
        commands.removals.add(effect, "HSET", keys.node(effect.node), effect.client_id, online_at)


def _forget_presence(commands: BatchCommands, effect: ForgetPresence) -> None:
    commands.removals.add(effect, "HDEL", keys.presence(effect.client_id), *PRESENCE_FIELDS)


def offline_at(effect: SetPresence) -> str:
    """Return the `offline_at` of a presence key: epoch seconds, or `undefined` for a client that never went offline."""
    return "undefined" if effect.offline_at is None else str(effect.offline_at // 1000)


def _show_offset(commands: BatchCommands, effect: ShowOffset) -> None:
    name = keys.read_offset(effect.subscriber, effect.topic)
    if effect.message_id is None:
        # GETDEL deletes strings only, so a foreign key of another type stays.
        commands.removals.add(effect, "GETDEL", name)
    else:
        commands.removals.add(effect, "SET", name, effect.message_id)


def _run_command(commands: BatchCommands, effect: RunCommand) -> None:
    commands.removals.add(effect, *effect.arguments)


_TRANSLATE: Final[dict[type[Any], Callable[[BatchCommands, Any], None]]] = {
    StoreMessage: _store_message,
    Reindex: _reindex,
    Retain: _retain,
    KeepReceipt: _keep_receipt,
    SetState: _set_state,
    SetIndex: _set_index,
    SetPresence: _set_presence,
    ForgetPresence: _forget_presence,
    ShowOffset: _show_offset,
    SetRules: _set_rules,
    WriteSeen: _write_seen,
    SetDue: _set_due,
    Unindex: _unindex,
    ClearRetained: _clear_retained,
    DeleteBody: _delete_body,
    ClearBodyExpiry: _clear_body_expiry,
    RunCommand: _run_command,
}
