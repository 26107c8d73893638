"""Announcements: `subscriber.joined` and `subscriber.left`, from the members before and after an event."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

from millpond.agents.effects import AnnounceMembership, Output
from millpond.agents.sessions.state import ServedSubscription
from millpond.schemas.events import SubscriberJoined, SubscriberLeft
from millpond.schemas.keys import AGENT_NODE

LeftReason: TypeAlias = Literal["unsubscribed", "session_ended", "disconnected"]


class ClientChange(NamedTuple):
    """The event that changed a client: its record's offset and its time. `reason` is why members may leave by it."""

    offset: int
    at: int
    client_id: str
    reason: LeftReason


def announcements(
    change: ClientChange,
    before: Mapping[str, ServedSubscription],
    after: Mapping[str, ServedSubscription],
    *,
    announce_all: bool,
) -> list[Output]:
    """Return a leave for each member that is gone, and a join for each new or changed one.

    Both mappings are members by topic filter. `announce_all` sends a join for every member, changed or not.
    """
    offset, at, client_id, reason = change
    outputs: list[Output] = []
    for topic_filter, member in before.items():
        if topic_filter not in after:
            left = SubscriberLeft(
                at=at, node=AGENT_NODE, client_id=client_id, topic_filter=topic_filter,
                reason=reason, session=member.session, source_offset=offset,
            )  # fmt: skip
            outputs.append(AnnounceMembership(offset, left))
    for topic_filter, member in after.items():
        if announce_all or before.get(topic_filter) != member:
            joined = SubscriberJoined(
                at=at, node=AGENT_NODE, client_id=client_id, topic_filter=topic_filter,
                qos=member.qos, session=member.session, source_offset=offset,
                broker_delivers=member.broker_delivers, subscribed_at=member.subscribed_at,
            )  # fmt: skip
            outputs.append(AnnounceMembership(offset, joined))
    return outputs
