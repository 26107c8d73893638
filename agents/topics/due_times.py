"""What falls due in a partition: names with a time, in the store; here only when the next tick is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from millpond.agents.effects import SetDue
from millpond.agents.reads import ReadDue

# One tick looks at no more than this many due things. What is left over is still due, so that another tick follows.
SWEEP_DUE_MAX: Final = 32

# Members of the due set: a kind and a key, which for some is a topic and a message id. A null character separates: no
# topic holds one ([MQTT-1.5.4-2]). An index or a window has its earliest deadline there, not one for each message.
INDEX, RETAINED, MESSAGE = "index", "retained", "message"
WINDOW, MEMBER, DEAD, SUBSCRIBER = "window", "member", "dead", "subscriber"

OF_MESSAGES: Final = (MESSAGE, DEAD)


def due_member(kind: str, key: str, message_id: str = "") -> str:
    """The name of something that falls due: of a topic, a member, or one message of a topic."""
    return f"{kind}\0{key}\0{message_id}" if message_id else f"{kind}\0{key}"


def split_due(member: str) -> tuple[str, str, str]:
    """Kind, key and message id (may be empty)."""
    kind, _, key = member.partition("\0")
    if kind not in OF_MESSAGES:
        return kind, key, ""
    topic, _, message_id = key.partition("\0")
    return kind, topic, message_id


class DueTimes:
    """When something falls due next, and what a tick has been told is due."""

    def __init__(self) -> None:
        """Nothing falls due."""
        self.restore({})

    def restore(self, partition_state: Mapping[str, Any]) -> None:
        """Go on from what `partition_state` returned."""
        self.next_ms: int | None = partition_state.get("next_due_ms")
        self.supplied: Sequence[tuple[str, int]] | None = None

    def partition_state(self) -> dict[str, int]:
        """What travels in the fence."""
        return {} if self.next_ms is None else {"next_due_ms": self.next_ms}

    def falls_due(self, member: str, at: int) -> SetDue:
        """`member` is to be looked at, at this time or earlier."""
        if self.next_ms is None or at < self.next_ms:
            self.next_ms = at
        return SetDue(member, at)

    def wanted(self) -> ReadDue:
        """What a tick asks for first."""
        return ReadDue(SWEEP_DUE_MAX + 1)

    def overdue(self, now_ms: int) -> list[tuple[str, str, str]]:
        """Of what is supplied, the parts of what a tick at `now_ms` will look at."""
        assert self.supplied is not None, "the driver supplies what a tick wants"
        return [split_due(member) for member, at in self.supplied[:SWEEP_DUE_MAX] if at <= now_ms]

    def take(self, now_ms: int) -> list[str]:
        """What is due; the next thing due is known again afterwards, and each of these is looked at once."""
        assert self.supplied is not None, "the driver supplies what a tick wants"
        due, self.supplied = self.supplied, None
        self.next_ms = min((at for _, at in due if at > now_ms), default=None)
        if len(due) > SWEEP_DUE_MAX:
            left_over = due[SWEEP_DUE_MAX][1]
            self.next_ms = left_over if self.next_ms is None else min(left_over, self.next_ms)
        return [member for member, at in due[:SWEEP_DUE_MAX] if at <= now_ms]
