"""Effects applied to a `MemoryServer` by their meaning. `redis/packing.py` translates the same effects into commands.

The contract tests apply random effects to every store, and compare the contents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import msgspec

from millpond.agents.effects import (
    NO_SOURCE,
    ClearBodyExpiry,
    ClearRetained,
    DeleteBody,
    Effect,
    ForgetPresence,
    KeepReceipt,
    Refusal,
    RefusedPart,
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
from millpond.pipeline.stores.memory.server import Hash, Kind, MemoryServer, RefusedError, Zset
from millpond.pipeline.stores.redis.packing import BODY_GRACE_MS, PRESENCE_FIELDS, offline_at
from millpond.schemas import keys
from millpond.schemas.codec import payload_bytes
from millpond.schemas.keys import Partition


class EffectWriter:
    """Applies the effects of one batch of one partition. An error about one key refuses one part of one record."""

    def __init__(self, server: MemoryServer, partition: Partition) -> None:
        self._server, self._partition = server, partition
        self._refused: dict[tuple[int, RefusedPart], str] = {}

    def refusals(self) -> list[Refusal]:
        """Return the refusals. A part of a record is refused once, with its first error."""
        return [Refusal(offset, part, why) for (offset, part), why in self._refused.items()]

    def write(self, effects: Sequence[Effect]) -> None:
        """Apply the effects in the order in which a store must: bodies, entries, state, removals."""
        for step in (
            self._body_or_receipt,
            self._entry,
            self._state,
            self._retained_index,
            self._removal,
        ):
            for effect in effects:
                step(effect)

    def _try_part(self, offset: int, part: RefusedPart, write: Callable[[], None]) -> None:
        try:
            write()
        except RefusedError as error:
            self._refused.setdefault((offset, part), str(error))

    def _body_or_receipt(self, effect: Effect) -> None:
        match effect:
            case StoreMessage():
                self._try_part(effect.offset, "body", lambda: self._write_body(effect))
                if effect.expires_at is not None:
                    key = keys.message_body(effect.event.message_id)
                    self._server.expire(key, effect.expires_at + BODY_GRACE_MS)
            case Reindex(_, _, message_id, _, expires_at) if expires_at is not None:
                self._server.expire(keys.message_body(message_id), expires_at + BODY_GRACE_MS)
            case KeepReceipt():
                self._try_part(effect.offset, "receipt", lambda: self._write_receipt(effect))
                self._server.expire(keys.receipt(effect.message_id), effect.expires_at)

    def _entry(self, effect: Effect) -> None:
        match effect:
            case StoreMessage(offset, event, score, True):
                entry = partial(self._add_to_index, event.topic, event.message_id, score)
                self._try_part(offset, "index", entry)
            case Reindex(offset, topic, message_id, score):
                self._try_part(
                    offset, "index", partial(self._add_to_index, topic, message_id, score)
                )
            case Retain():
                self._try_part(effect.offset, "retained", lambda: self._write_retained(effect))

    def _state(self, effect: Effect) -> None:
        match effect:
            case SetState(key, state, table):
                self._set(keys.table(self._partition, table), {key: state})
            case SetIndex(index, key, score):
                self._set_index(keys.index(self._partition, index), key, score)
            case SetRules(canonical):
                self._server.keep(keys.rules(self._partition), canonical.encode())
            case WriteSeen():
                self._write_seen(effect)
            case SetDue(member, at):
                self._set_due(member, at)

    def _retained_index(self, effect: Effect) -> None:
        """Update the private index of topics with a retained message. A refused public key does not change this."""
        name = keys.index(self._partition, keys.RETAINED_INDEX)
        match effect:
            case Retain(topic=topic):
                self._set_index(name, topic, 0)
            case ClearRetained(topic=topic):
                self._set_index(name, topic, None)

    def _removal(self, effect: Effect) -> None:
        match effect:
            case Unindex(offset):
                self._try_part(offset, "removal", lambda: self._unindex(effect))
            case ClearRetained(offset, topic):
                self._try_part(offset, "removal", lambda: self._remove(keys.retained(topic), Zset))
            case DeleteBody(message_id):
                name = keys.message_body(message_id)
                self._try_part(NO_SOURCE, "removal", lambda: self._remove(name, Hash))
            case ClearBodyExpiry(message_id):
                self._server.expires_at.pop(keys.message_body(message_id), None)
            case SetPresence():
                self._presence(effect)
            case ForgetPresence(offset, client_id):
                fields: dict[str, bytes | None] = dict.fromkeys(PRESENCE_FIELDS)
                forget = partial(self._set, keys.presence(client_id), fields)
                self._try_part(offset, "presence", forget)
            case ShowOffset(offset, subscriber, topic, message_id):
                name = keys.read_offset(subscriber, topic)
                self._try_part(
                    offset, "read offset", partial(self._write_read_offset, name, message_id)
                )
            case RunCommand(offset, arguments):
                self._try_part(offset, "command", lambda: self._run_command(*arguments))

    def _write_body(self, effect: StoreMessage) -> None:
        event = effect.event
        name = keys.message_body(event.message_id)
        body = self._server.of(name, Hash)
        body.update(
            {
                "id": event.message_id.encode(),
                "from": event.client_id.encode(),
                "qos": str(event.qos).encode(),
                "topic": event.topic.encode(),
                "payload": payload_bytes(event),
                "ts": str(event.published_at // 1000).encode(),
                "retain": str(event.retain).lower().encode(),
            }
        )
        if event.expires_at is not None:
            body["expires_at"] = str(event.expires_at).encode()
        self._server.keep(name, body)

    def _write_receipt(self, effect: KeepReceipt) -> None:
        name = keys.receipt(effect.message_id)
        receipt = self._server.of(name, Hash)
        receipt[f"{effect.kind}:{effect.client_id}"] = str(effect.at_s).encode()
        self._server.keep(name, receipt)

    def _add_to_index(self, topic: str, message_id: str, score: int) -> None:
        name = keys.message_index(topic)
        index = self._server.of(name, Zset)
        index.setdefault(message_id, score)
        self._server.keep(name, index)

    def _write_retained(self, effect: Retain) -> None:
        name = keys.retained(effect.topic)
        self._remove(name, Zset)
        self._server.keep(name, Zset({effect.message_id: effect.score}))

    def _presence(self, effect: SetPresence) -> None:
        client_id, online_at = effect.client_id, b"%d" % (effect.online_at // 1000)
        shown: dict[str, bytes | None] = {
            "state": b"%d" % effect.online,
            "online_at": online_at,
            "offline_at": offline_at(effect).encode(),
        }
        self._try_part(
            effect.offset, "presence", lambda: self._set(keys.presence(client_id), shown)
        )
        for node, at in ((effect.left_node, None), (effect.node, online_at)):
            if node is not None:
                name, field = keys.node(node), {client_id: at}
                self._try_part(effect.offset, "presence", partial(self._set, name, field))

    def _write_read_offset(self, name: str, message_id: str | None) -> None:
        if message_id is not None:
            self._server.keep(name, message_id.encode())
        elif self._server.text(name) is not None:
            self._server.remove(name)

    def _set(self, name: str, fields: Mapping[str, bytes | None]) -> None:
        """Set fields of a hash. None removes a field."""
        values = self._server.of(name, Hash)
        for field, value in fields.items():
            if value is None:
                values.pop(field, None)
            else:
                values[field] = value
        self._server.keep(name, values)

    def _set_index(self, name: str, key: str, score: int | None) -> None:
        entries = self._server.of(name, Zset)
        entries.pop(key, None)
        if score is not None:
            entries[key] = score
        self._server.keep(name, entries)

    def _remove(self, name: str, kind: type[Kind]) -> None:
        # Refuses a foreign key, as `HDEL` and `ZREMRANGEBYRANK` do.
        self._server.of(name, kind)
        self._server.remove(name)

    def _unindex(self, effect: Unindex) -> None:
        name = keys.message_index(effect.topic)
        index = self._server.of(name, Zset)
        for message_id in effect.message_ids:
            index.pop(message_id, None)
        self._server.keep(name, index)

    def _write_seen(self, effect: WriteSeen) -> None:
        name = keys.seen(self._partition, effect.generation)
        before = b"" if effect.fresh else self._server.text(name) or b""
        lines = b"".join(msgspec.json.encode(each) + b"\n" for each in effect.message_ids)
        self._server.keep(name, before + lines)

    def _set_due(self, member: str, at: int | None) -> None:
        name = keys.due(self._partition)
        due = self._server.of(name, Zset)
        if at is None:
            due.pop(member, None)
        else:
            due[member] = min(at, due.get(member, at))
        self._server.keep(name, due)

    def _run_command(self, verb: bytes, *arguments: bytes) -> None:
        """Run one of the few commands that tests use. Any other is refused as unknown."""
        match verb.upper(), *arguments:
            case b"INCR", key:
                value = self._server.text(key.decode()) or b"0"
                if not value.removeprefix(b"-").isdigit():
                    raise RefusedError("ERR value is not an integer or out of range")
                self._server.keep(key.decode(), b"%d" % (int(value) + 1))
            case b"SET", key, value:
                self._server.remove(key.decode())
                self._server.keep(key.decode(), value)
            case b"HSET", key, *pairs if pairs and len(pairs) % 2 == 0:
                fields = self._server.of(key.decode(), Hash)
                names = (name.decode() for name in pairs[::2])
                fields.update(zip(names, pairs[1::2], strict=True))
                self._server.keep(key.decode(), fields)
            case b"DEL", *names:
                for each in names:
                    self._server.remove(each.decode())
            case _:
                raise RefusedError(f"ERR unknown command '{verb.decode(errors='replace')}'")
