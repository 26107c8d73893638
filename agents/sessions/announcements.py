"""Telling the delivery agents of the members that came and went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

from millpond.agents.effects import AnnounceMembership, Output
from millpond.agents.sessions.state import ServedSubscription
from millpond.schemas.events import SubscriberJoined, SubscriberLeft
from millpond.schemas.keys import AGENT_NODE

LeftReason: TypeAlias = Literal["unsubscribed", "session_ended", "disconnected"]


class ClientChange(NamedTuple):
    """What happened to a client at which record, and why those that left did."""

    offset: int
    at: int
    client_id: str
    reason: LeftReason


def announcements(
    change: ClientChange,
    was: Mapping[str, ServedSubscription],
    now: Mapping[str, ServedSubscription],
    *,
    again: bool,
) -> list[Output]:
    """A leave for each member that is no more, a join for each that is new; with `again` for all there are."""
    offset, at, client_id, reason = change
    said: list[Output] = []
    for topic_filter, member in was.items():
        if topic_filter not in now:
            left = SubscriberLeft(
                at=at, node=AGENT_NODE, client_id=client_id, topic_filter=topic_filter,
                reason=reason, session=member.session, source_offset=offset,
            )  # fmt: skip
            said.append(AnnounceMembership(offset, left))
    for topic_filter, member in now.items():
        if again or was.get(topic_filter) != member:
            joined = SubscriberJoined(
                at=at, node=AGENT_NODE, client_id=client_id, topic_filter=topic_filter,
                qos=member.qos, session=member.session, source_offset=offset,
                broker_delivers=member.broker_delivers, subscribed_at=member.subscribed_at,
            )  # fmt: skip
            said.append(AnnounceMembership(offset, joined))
    return said
