"""Ask a set of Sentinels for the address of a primary."""

from __future__ import annotations

from collections.abc import Sequence

from hiredis import ReplyError

from millpond.pipeline.stores.redis.connection import (
    Access,
    Address,
    Connection,
    checked,
    error_code,
)
from millpond.schemas.errors import StoreDown, StoreRefused

# What a sentinel calls a primary that it cannot reach.
DOWN_FLAGS = frozenset((b"s_down", b"o_down"))


async def primary_of(sentinels: Sequence[Address], name: str, access: Access) -> Address:
    """Return the primary that the first sentinel names that knows one that is up.

    `access` holds the credentials for the sentinels. They are not those of the primary.

    Raises:
        StoreDown: no sentinel answers, or none knows a primary of this name that is up.
        StoreRefused: none does, and one of them refuses the credentials or is not a sentinel.
    """
    refused: StoreRefused | None = None
    reasons = []
    for sentinel in sentinels:
        try:
            return await _asked(sentinel, name, access)
        except StoreDown as error:
            reasons.append(str(error))
        except StoreRefused as error:
            refused = refused or error
    if refused is not None:
        raise refused
    raise StoreDown(f"the sentinels name no primary of {name!r}: {'; '.join(reasons)}")


async def _asked(sentinel: Address, name: str, access: Access) -> Address:
    try:
        connection = await Connection.open(sentinel, access)
        try:
            (reply,) = await connection.call("SENTINEL", "MASTER", name)
        finally:
            await connection.close()
        if isinstance(reply, ReplyError) and error_code(reply) == "ERR":
            if "unknown command" in str(reply):
                raise StoreRefused(f"{sentinel} is no sentinel: {reply}")
            raise StoreDown(f"{sentinel} answers: {reply}")
        (fields,) = checked([reply], sentinel)
    except StoreRefused as error:
        # The reason names the pool's user, who is another than the sentinels'.
        reason = str(error).replace(
            "the pool's username", "sentinel_username and sentinel_password_file"
        )
        raise StoreRefused(f"the sentinel {reason}") from error
    about = dict(zip(fields[::2], fields[1::2], strict=True))
    flags = about[b"flags"].split(b",")
    if b"master" not in flags or not DOWN_FLAGS.isdisjoint(flags):
        raise StoreDown(f"{sentinel} says {about[b'flags'].decode()}")
    return Address(about[b"ip"].decode(), int(about[b"port"]))
