"""Which fields of a user command are keys, so that a value is judged as a key only where it becomes one.

The facts are those of `COMMAND INFO`, written down here for two reasons. The answer must not depend on the server: a
replay on another server makes the same dead letters. And it must be known without a server: `config check --offline`.
tests/contracts/test_redis_access.py compares this table with a real server.

A command that is not in the table, such as that of a module, may have its keys anywhere. Then every field counts as a
key, except one that holds a payload. At its start a worker asks the server about such a command, and refuses the rule
if a payload would be a key (`pipeline/stores/redis/command_check.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

# The first key, the last key and the step between two keys, as `COMMAND INFO` gives them. -1: the last field.
KEY_FIELDS: Final[dict[tuple[int, int, int], str]] = {
    (0, 0, 0): "TIME",
    (1, 1, 1): (
        "APPEND BITCOUNT BITFIELD BITFIELD_RO BITPOS DECR DECRBY DUMP EXPIRE EXPIREAT EXPIRETIME "
        "GEOADD GEODIST GEOHASH GEOPOS GEORADIUSBYMEMBER_RO GEORADIUS_RO GEOSEARCH GET GETBIT "
        "GETDEL GETEX GETRANGE GETSET HDEL HEXISTS HEXPIRE HEXPIREAT HEXPIRETIME HGET HGETALL "
        "HGETDEL HGETEX HINCRBY HINCRBYFLOAT HKEYS HLEN HMGET HMSET HPERSIST HPEXPIRE HPEXPIREAT "
        "HPEXPIRETIME HPTTL HRANDFIELD HSCAN HSET HSETEX HSETNX HSTRLEN HTTL HVALS INCR INCRBY "
        "INCRBYFLOAT LINDEX LINSERT LLEN LPOP LPOS LPUSH LPUSHX LRANGE LREM LSET LTRIM MOVE "
        "PERSIST PEXPIRE PEXPIREAT PEXPIRETIME PFADD PSETEX PTTL RESTORE RPOP RPUSH RPUSHX SADD "
        "SCARD SET SETBIT SETEX SETNX SETRANGE SISMEMBER SMEMBERS SMISMEMBER SPOP SRANDMEMBER "
        "SREM SSCAN STRLEN SUBSTR TTL TYPE XACK XADD XAUTOCLAIM XCLAIM XDEL XLEN XPENDING XRANGE "
        "XREVRANGE XSETID XTRIM ZADD ZCARD ZCOUNT ZINCRBY ZLEXCOUNT ZMSCORE ZPOPMAX ZPOPMIN "
        "ZRANDMEMBER ZRANGE ZRANGEBYLEX ZRANGEBYSCORE ZRANK ZREM ZREMRANGEBYLEX ZREMRANGEBYRANK "
        "ZREMRANGEBYSCORE ZREVRANGE ZREVRANGEBYLEX ZREVRANGEBYSCORE ZREVRANK ZSCAN ZSCORE"
    ),
    (1, 2, 1): "COPY GEOSEARCHSTORE LCS LMOVE RENAME RENAMENX RPOPLPUSH SMOVE ZRANGESTORE",
    (1, -1, 1): (
        "DEL EXISTS MGET PFCOUNT PFMERGE SDIFF SDIFFSTORE SINTER SINTERSTORE SUNION SUNIONSTORE "
        "TOUCH UNLINK"
    ),
    (1, -1, 2): "MSET MSETNX",
    (2, 2, 1): "OBJECT XGROUP XINFO",
    (2, -1, 1): "BITOP",
}
# The keys of these depend on other fields, such as a count of keys. None of them takes a payload as a value.
_MOVABLE: Final = (
    "GEORADIUS GEORADIUSBYMEMBER LMPOP SINTERCARD SORT SORT_RO ZDIFF ZDIFFSTORE ZINTER ZINTERCARD "
    "ZINTERSTORE ZMPOP ZUNION ZUNIONSTORE"
)
MOVABLE_KEYS: Final = frozenset(_MOVABLE.split())
_PLACES: Final = {name: place for place, names in KEY_FIELDS.items() for name in names.split()}
_PAYLOADS: Final = ("${payload}", "${message}")


def is_known(name: str) -> bool:
    """True if the table has the command, in any case of its letters."""
    return name.upper() in _PLACES or name.upper() in MOVABLE_KEYS


def known_commands() -> tuple[str, ...]:
    """Return the names of all commands in the table."""
    return (*_PLACES, *sorted(MOVABLE_KEYS))


@lru_cache(maxsize=1024)  # far more than a rule file has commands
def key_fields(fields: tuple[str, ...]) -> tuple[int, ...]:
    """Return the positions of the fields that are keys, or may be. The name of the command is field 0."""
    name = fields[0].upper()
    if name in _PLACES:
        return keys_at(_PLACES[name], len(fields))
    every = range(1, len(fields))
    if name in MOVABLE_KEYS:
        return tuple(every)
    return tuple(at for at in every if not holds_payload(fields[at]))


def keys_at(place: Sequence[int], count: int) -> tuple[int, ...]:
    """Return the positions of the keys of a command with `count` fields. `place` is a key of `KEY_FIELDS`."""
    first, last, step = place
    if first == 0:
        return ()
    end = count + last if last < 0 else min(last, count - 1)
    return tuple(range(first, end + 1, step))


def holds_payload(field: str) -> bool:
    """True if a payload enters this field."""
    return any(each in field for each in _PAYLOADS)
