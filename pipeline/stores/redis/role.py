"""Is a server a replica? One answer for workers, `replay`, `rebuild` and `config check`.

`ROLE` says so, but a user without administration may not ask. Then a write that is queued and discarded tells: a
replica refuses to queue it. A user that may not ask for `ROLE` is no reason to stop.
"""

from __future__ import annotations

from hiredis import ReplyError

from millpond.pipeline.stores.redis.connection import Connection, checked, error_code, pack
from millpond.schemas.keys import PRIVATE_PREFIX


async def is_replica(connection: Connection) -> bool:
    """Ask the server. Nothing is written.

    Raises:
        StoreDown, StoreRefused: the server is not ready, or the user may not run transactions.
    """
    # XX: if the user may not run MULTI, the write is not queued but run, and finds no key to replace.
    write = ("SET", f"{PRIVATE_PREFIX}role", "", "XX")
    probe = (("MULTI",), write, ("DISCARD",), ("ROLE",))
    multi, queued, discarded, role = await connection.send(b"".join(map(pack, probe)), len(probe))
    checked((multi, discarded), connection.address)
    if isinstance(role, list):
        return bool(role[0] != b"master")
    if error_code(role) != "NOPERM":
        checked((role,), connection.address)
    return isinstance(queued, ReplyError) and error_code(queued) == "READONLY"
