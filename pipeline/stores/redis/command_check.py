"""The users' commands, checked against the server that is to run them, before anything starts."""

from __future__ import annotations

from typing import Any, Final

from millpond.pipeline.stores.redis.connection import checked, pack
from millpond.pipeline.stores.registry import connector
from millpond.schemas.rules.pool import Pool
from millpond.schemas.rules.rule import Rule
from millpond.schemas.rules.ruleset import Rules

# Flags and categories of commands that have no place in a transaction of ours, and why.
FORBIDDEN: Final = {
    b"admin": "administers the server",
    b"blocking": "waits",
    b"pubsub": "publishes or subscribes",
    b"@connection": "acts on the connection",
    b"@transaction": "acts on the transaction",
    b"@scripting": "runs a script",
    b"noscript": "is not allowed inside scripts and transactions",
}


async def check_commands(pool: Pool, rules: Rules) -> None:
    """Whether the server knows every command of the pool's rules, with as many arguments.

    Raises:
        ConfigError: which command of which rule is wrong, and why; or an unreadable file.
        StoreDown, StoreRefused: the server could not be asked.
    """
    asked = [
        (rule, fields) for rule in rules.rules if rule.pool == pool.name for fields in rule.commands
    ]
    if not asked:
        return
    connection = await connector(pool)()
    try:
        command = ("COMMAND", "INFO", *(fields[0] for _, fields in asked))
        (known,) = checked(await connection.send(pack(command), 1), connection.address)
    finally:
        await connection.close()
    for (rule, fields), info in zip(asked, known, strict=True):
        check(rule, fields, info)


def check(rule: Rule, fields: tuple[str, ...], info: list[Any] | None) -> None:
    """Raise the `ConfigError` of one command, by what the server says of it (None: unknown)."""
    name = fields[0]
    info = _subcommand(fields, info or None)
    if info is None:
        raise rule.fault(f"the server does not know the command {' '.join(fields[:2])}")
    # https://redis.io/docs/latest/commands/command/: name, arity, flags, keys (3), categories, …
    _, arity, flags, _, _, _, categories, *_ = info
    for forbidden, reason in FORBIDDEN.items():
        if forbidden in flags or forbidden in categories:
            raise rule.fault(f"the command {name} {reason}: a rule must not do that")
    count = len(fields)
    if count != arity if arity >= 0 else count < -arity:
        wanted = f"{arity - 1}" if arity >= 0 else f"at least {-arity - 1}"
        raise rule.fault(f"the command {name} takes {wanted} arguments, not {count - 1}")


def _subcommand(fields: tuple[str, ...], info: list[Any] | None) -> list[Any] | None:
    """What is said of `XGROUP CREATE` rather than of `XGROUP`; Redis 6 says nothing of that."""
    subcommands = info[9] if info is not None and len(info) > 9 else []
    if not subcommands or len(fields) < 2:
        return info
    name = "|".join(fields[:2]).lower().encode()
    return next((each for each in subcommands if each[0] == name), None)
