"""User commands: Redis commands of a rule. Which ones are allowed, and how the values of an event enter them.

A command is split at single spaces when its rule is read. Values enter the fields afterwards, so a payload with spaces
stays one argument. A value is never read as a command, nor as another variable.

Three checks protect the store:

1. ON reading a rule: `command_error` refuses forbidden commands, unknown variables and private keys.
2. ON the start of a worker: the server is asked about each command (`pipeline/stores/redis/command_check.py`).
3. ON an event: `forbidden_key` refuses keys that became private keys by a value.

Checks 1 and 3 judge only the fields that are keys (`command_keys.py`). Any other field may hold any value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final

from millpond.schemas.codec import encode, payload_bytes
from millpond.schemas.events import (
    ClientConnected,
    ClientDisconnected,
    Event,
    MessageAcked,
    MessageDelivered,
    MessagePublished,
    SessionCreated,
    SessionSubscribed,
    SessionUnsubscribed,
)
from millpond.schemas.keys import PRIVATE_PREFIX
from millpond.schemas.rules.command_keys import key_fields

Values = Mapping[str, str | bytes]

# The variables of each hook. `ts` is in s, as every time in a public key. `message` is the event in canonical JSON.
VARIABLES: Final[Mapping[str, tuple[str, ...]]] = {
    "client.connected": ("clientid", "username", "node", "ts"),
    "client.disconnected": ("clientid", "node", "ts"),
    "session.created": ("clientid", "node", "ts"),
    "session.subscribed": ("clientid", "topic", "qos", "node", "ts"),
    "session.unsubscribed": ("clientid", "topic", "node", "ts"),
    "message.publish": (
        *("clientid", "username", "topic", "qos", "msgid", "payload", "message", "node", "ts"),
    ),
    "message.delivered": ("clientid", "topic", "qos", "msgid", "node", "ts"),
    "message.acked": ("clientid", "topic", "qos", "msgid", "node", "ts"),
}

# Reason → forbidden commands. They would stop the server or the connection, break the transaction of a batch, wait, or
# touch keys that the rule does not name. For all others the worker asks the server at start (COMMAND INFO).
FORBIDDEN: Final[Mapping[str, str]] = {
    "administers the server": (
        "ACL BGREWRITEAOF BGSAVE CLUSTER COMMAND CONFIG DEBUG FAILOVER INFO LASTSAVE LATENCY "
        "LOLWUT MEMORY MODULE MONITOR PFDEBUG PFSELFTEST PSYNC REPLCONF REPLICAOF "
        "RESTORE-ASKING ROLE SAVE SHUTDOWN SLAVEOF SLOWLOG SYNC"
    ),
    "acts on the connection": (
        "ASKING AUTH CLIENT ECHO HELLO PING QUIT READONLY READWRITE RESET SELECT"
    ),
    "acts on the transaction": "DISCARD EXEC MULTI UNWATCH WATCH",
    "waits": (
        "BLMOVE BLMPOP BLPOP BRPOP BRPOPLPUSH BZMPOP BZPOPMAX BZPOPMIN WAIT WAITAOF XREAD "
        "XREADGROUP"
    ),
    "publishes or subscribes": (
        "PSUBSCRIBE PUBLISH PUBSUB PUNSUBSCRIBE SPUBLISH SSUBSCRIBE SUBSCRIBE SUNSUBSCRIBE "
        "UNSUBSCRIBE"
    ),
    "runs a script": "EVAL EVALSHA EVALSHA_RO EVAL_RO FCALL FCALL_RO FUNCTION SCRIPT",
    "works on the whole keyspace": "DBSIZE FLUSHALL FLUSHDB KEYS MIGRATE RANDOMKEY SCAN SWAPDB",
}

_PRIVATE: Final = PRIVATE_PREFIX.encode()
_VARIABLE: Final = re.compile(r"\$\{([^}]*)\}")


def command_error(hook: str, fields: Sequence[str]) -> str | None:
    """Explain why a rule of `hook` must not have this command. None if it may. Does not ask the server."""
    if not "".join(fields):
        return "the command is empty"
    if "" in fields:
        return "fields of a command are separated by exactly one space, with none before or after"
    name = fields[0]
    if "${" in name:
        return "the name of a command cannot hold a variable"
    for reason, names in FORBIDDEN.items():
        if name.upper() in names.split():
            return f"the command {name} {reason}, which a rule must not do"
    for field in fields[1:]:
        for variable in _VARIABLE.findall(field):
            if variable not in VARIABLES[hook]:
                known = " ".join(f"${{{known}}}" for known in VARIABLES[hook])
                return f"{hook} has no ${{{variable}}}, only {known}"
        if "${" in _VARIABLE.sub("", field):
            return f"'${{' is not closed in {field!r}"
    for at in key_fields(tuple(fields)):
        if fields[at].startswith(PRIVATE_PREFIX):
            return f"{fields[at]!r} begins with {PRIVATE_PREFIX!r}, which is Millpond's own"
    return None


def command_values(event: Event) -> Values:
    """Return variable → value of an event. A value that the event does not have is missing. No hook, no values."""
    values: dict[str, str | bytes] = {"node": event.node, "ts": str(event.at // 1000)}
    match event:
        case ClientConnected() | ClientDisconnected() | SessionCreated():
            values["clientid"] = event.client_id
        case SessionSubscribed() | SessionUnsubscribed():
            values.update(clientid=event.client_id, topic=event.topic_filter)
        case MessagePublished() | MessageDelivered() | MessageAcked():
            values.update(clientid=event.client_id, topic=event.topic, msgid=event.message_id)
        case _:
            return {}
    if isinstance(event, ClientConnected | MessagePublished) and event.username is not None:
        values["username"] = event.username
    if isinstance(event, SessionSubscribed | MessagePublished | MessageDelivered | MessageAcked):
        values["qos"] = str(event.qos)
    if isinstance(event, MessagePublished):
        values.update(payload=payload_bytes(event), message=encode(event))
    return values


@lru_cache(maxsize=1024)  # far more than a rule file has fields
def _parts(field: str) -> tuple[bytes | str, ...]:
    """Split a field into literals (bytes) and names of variables (str), in turn. The first and last are literals."""
    return tuple(
        part if place % 2 else part.encode() for place, part in enumerate(_VARIABLE.split(field))
    )


def substitute(fields: Sequence[str], values: Values) -> list[bytes]:
    """Return the arguments of a command. Each `${name}` becomes its value, or nothing if the event has none."""
    return [b"".join(_fill(part, values) for part in _parts(field)) for field in fields]


def _fill(part: bytes | str, values: Values) -> bytes:
    if isinstance(part, bytes):
        return part
    value = values.get(part, b"")
    return value if isinstance(value, bytes) else value.encode()


def forbidden_key(fields: Sequence[str], arguments: Sequence[bytes]) -> str | None:
    """Explain why a command must not run with these arguments. None if it may.

    A client could publish to a topic that is spelled like a private key. So no key may begin like a private one.
    """
    for at in key_fields(tuple(fields)):
        if arguments[at].startswith(_PRIVATE):
            return f"a key of {fields[0]} begins with {PRIVATE_PREFIX!r}, which is Millpond's own"
    return None
