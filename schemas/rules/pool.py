"""A pool: one Redis, named by rules."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct, structs

POOL_SIZE: Final = 8  # the default of EMQ X's Redis backend
POOL_SIZE_MAX: Final = 1_024
DATABASE_MAX: Final = 65_535  # far above Redis's default of 16 databases
CHANNEL: Final = "mqtt_channel"
REDIS_PORT: Final = 6379
SENTINEL_PORT: Final = 26379


class Pool(Struct, frozen=True, kw_only=True):
    """One Redis: a single server, Sentinel or a Cluster.

    servers: (host, port) of the single server, of the sentinels, or of some nodes of the Cluster.
    sentinel: The name by which the sentinels know the primary. Only with the type `sentinel`.
    sentinel_username, sentinel_password_file: For AUTH at the sentinels. Without them Millpond sends none there.
    password, password_file: At most one of them. The first line of the file is the password.
    pool_size: Accepted for old files. Millpond opens one connection for each partition.
    channel: The control channel: applications publish subscribe and unsubscribe orders on it.
    """

    name: str
    servers: tuple[tuple[str, int], ...]
    type: Literal["single", "sentinel", "cluster"] = "single"
    sentinel: str | None = None
    sentinel_username: str | None = None
    sentinel_password_file: str | None = None
    database: Annotated[int, Meta(ge=0, le=DATABASE_MAX)] = 0
    username: str | None = None
    password: str | None = None
    password_file: str | None = None
    tls: bool = False
    ca_file: str | None = None
    pool_size: Annotated[int, Meta(ge=1, le=POOL_SIZE_MAX)] = POOL_SIZE
    channel: str = CHANNEL

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """Show every field, but hide the password."""
        shown = structs.asdict(self)
        hidden = "********"
        if self.password is not None:
            shown["password"] = hidden
        return list(shown.items())

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"Pool({fields})"
