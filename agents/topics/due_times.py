"""Due things of a partition: names with a time. The store has all of them, this module the earliest time only.

That time decides when the owner sends a tick. The tick then reads the earliest due things from the store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from millpond.agents.effects import SetDue
from millpond.agents.reads import ReadDue

# Due things for one tick. The rest stays due, so another tick follows at once.
SWEEP_DUE_MAX: Final = 32

# Members of the due set: `{kind}\0{key}`, or `{kind}\0{topic}\0{message id}` for one message. No topic or client id has
# a null character ([MQTT-1.5.4-2]). An index or a window has one member with its earliest deadline, not one a message.
INDEX, RETAINED, MESSAGE = "index", "retained", "message"
WINDOW, MEMBER, DEAD, SUBSCRIBER = "window", "member", "dead", "subscriber"
CLIENT = "client"

OF_MESSAGES: Final = (MESSAGE, DEAD)


def due_member(kind: str, key: str, message_id: str = "") -> str:
    """Return the name of a due thing: of a topic, a member, a subscriber, a client, or one message of a topic."""
    return f"{kind}\0{key}\0{message_id}" if message_id else f"{kind}\0{key}"


def split_due(member: str) -> tuple[str, str, str]:
    """Return kind, key and message id of a due thing; the message id is empty for most kinds."""
    kind, _, key = member.partition("\0")
    if kind not in OF_MESSAGES:
        return kind, key, ""
    topic, _, message_id = key.partition("\0")
    return kind, topic, message_id


class DueTimes:
    """The earliest due time, and during a tick the due things that were read for it.

    `next_ms` is None if nothing falls due. It may be too early, never too late: a tick that finds nothing corrects it.
    `supplied` is None outside of a tick.
    """

    def __init__(self) -> None:
        self.restore({})

    def restore(self, partition_state: Mapping[str, Any]) -> None:
        """Continue from an earlier `partition_state`."""
        self.next_ms: int | None = partition_state.get("next_due_ms")
        self.supplied: Sequence[tuple[str, int]] | None = None

    def partition_state(self) -> dict[str, int]:
        """Return the part of the fence that `restore` needs."""
        return {} if self.next_ms is None else {"next_due_ms": self.next_ms}

    def falls_due(self, member: str, at: int) -> SetDue:
        """Let `member` fall due at this time. An earlier time that the store has stays."""
        if self.next_ms is None or at < self.next_ms:
            self.next_ms = at
        return SetDue(member, at)

    def wanted(self) -> ReadDue:
        """Return the read that a tick needs first. One more than a tick handles shows when the next is due."""
        return ReadDue(SWEEP_DUE_MAX + 1)

    def overdue(self, now_ms: int) -> list[tuple[str, str, str]]:
        """Return kind, key and message id of the due things that a tick at `now_ms` will handle."""
        assert self.supplied is not None, "the driver supplies what a tick wants"
        return [split_due(member) for member, at in self.supplied[:SWEEP_DUE_MAX] if at <= now_ms]

    def take(self, now_ms: int) -> list[str]:
        """Return the due things that a tick at `now_ms` handles, and set `next_ms` to the earliest of the others.

        The caller removes each one, or lets it fall due again.
        """
        assert self.supplied is not None, "the driver supplies what a tick wants"
        due, self.supplied = self.supplied, None
        self.next_ms = min((at for _, at in due if at > now_ms), default=None)
        if len(due) > SWEEP_DUE_MAX:
            left_over = due[SWEEP_DUE_MAX][1]
            self.next_ms = left_over if self.next_ms is None else min(left_over, self.next_ms)
        return [member for member, at in due[:SWEEP_DUE_MAX] if at <= now_ms]
