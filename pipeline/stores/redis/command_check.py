"""A check of the user commands of all rules against the server that will run them.

Workers check at their start, so that a typo is found before the first message. `millpond config check` does the same.
"""

from __future__ import annotations

from typing import Any, Final

from millpond.pipeline.stores.redis.connection import checked, pack
from millpond.pipeline.stores.redis.location import connector
from millpond.schemas.rules.command_keys import (
    holds_payload,
    is_known,
    keys_at,
    known_commands,
)
from millpond.schemas.rules.faults import Faults, did_you_mean
from millpond.schemas.rules.pool import Pool
from millpond.schemas.rules.rule import Rule
from millpond.schemas.rules.ruleset import Rules

# Flags and ACL categories of commands that a rule must not run in a transaction, and what such a command does.
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
    """Check that the server knows each command of the pool's rules, and takes as many arguments.

    Raises:
        ConfigError: commands are unknown, forbidden or have too few or many arguments; or a file cannot be read.
        StoreDown, StoreRefused: the server is down, or refuses the user.
    """
    used = [
        (rule, fields) for rule in rules.rules if rule.pool == pool.name for fields in rule.commands
    ]
    if not used:
        return
    connection = await connector(pool)()
    try:
        command = ("COMMAND", "INFO", *(fields[0] for _, fields in used))
        (infos,) = checked(await connection.send(pack(command), 1), connection.address)
    finally:
        await connection.close()
    faults = Faults()
    for (rule, fields), info in zip(used, infos, strict=True):
        with faults.collect():
            _check(rule, fields, info)
    faults.raise_any()


def _check(rule: Rule, fields: tuple[str, ...], info: list[Any] | None) -> None:
    """Check one command by the server's description of it. None: the server does not know the command.

    Raises:
        ConfigError: the command cannot run, or must not.
    """
    name = fields[0]
    if not info:
        meant = "" if is_known(name) else did_you_mean(name.upper(), known_commands())
        raise rule.fault(f"the server does not know the command {name}{meant}")
    info = _subcommand(fields, info)
    if info is None:
        raise rule.fault(f"the server does not know the command {name} {fields[1]}")
    # https://redis.io/docs/latest/commands/command/: name, arity, flags, keys (3), categories, …
    _, arity, flags, first, last, step, categories, *_ = info
    for forbidden, reason in FORBIDDEN.items():
        if forbidden in flags or forbidden in categories:
            raise rule.fault(f"the command {name} {reason}: a rule must not do that")
    count = len(fields)
    # An arity counts the command's name. A negative one is a minimum.
    if count != arity if arity >= 0 else count < -arity:
        wanted = f"{arity - 1}" if arity >= 0 else f"at least {-arity - 1}"
        raise rule.fault(f"the command {name} takes {wanted} arguments, not {count - 1}")
    # Millpond does not judge the payloads of a command that only the server knows: none of them may be a key.
    movable = b"movablekeys" in flags
    places = range(1, count) if movable else keys_at((first, last, step), count)
    if not is_known(name) and any(holds_payload(fields[at]) for at in places):
        raise rule.fault(
            f"the command {name} would use a payload as a key: a rule must not do that"
        )


def _subcommand(fields: tuple[str, ...], info: list[Any]) -> list[Any] | None:
    """Return the description of a subcommand such as `XGROUP CREATE`, if the server describes subcommands.

    Redis 7 does, as tenth element. Redis 6 does not: then the description of the command has to do.
    """
    subcommands = info[9] if len(info) > 9 else []
    if not subcommands or len(fields) < 2:
        return info
    name = "|".join(fields[:2]).lower().encode()
    return next((each for each in subcommands if each[0] == name), None)
