"""One Redis that rules name."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct, structs

POOL_SIZE: Final = 8  # as the broker backends had it
POOL_SIZE_MAX: Final = 1_024
DATABASE_MAX: Final = 65_535  # Redis has 16 unless told otherwise
CHANNEL: Final = "mqtt_channel"
REDIS_PORT: Final = 6379
SENTINEL_PORT: Final = 26379


class Pool(Struct, frozen=True, kw_only=True):
    """One Redis: `servers` are (host, port) of the server, the sentinels, or some cluster nodes.

    At most one of `password` and `password_file` (whose first line is the password) is given.
    `channel` carries the subscribe and unsubscribe orders of the user's applications.
    """

    name: str
    servers: tuple[tuple[str, int], ...]
    type: Literal["single", "sentinel", "cluster"] = "single"
    sentinel: str | None = None
    database: Annotated[int, Meta(ge=0, le=DATABASE_MAX)] = 0
    username: str | None = None
    password: str | None = None
    password_file: str | None = None
    tls: bool = False
    ca_file: str | None = None
    pool_size: Annotated[int, Meta(ge=1, le=POOL_SIZE_MAX)] = POOL_SIZE
    channel: str = CHANNEL

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """Every field, the password hidden."""
        shown = structs.asdict(self)
        hidden = "********"
        if self.password is not None:
            shown["password"] = hidden
        return list(shown.items())

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"Pool({fields})"
