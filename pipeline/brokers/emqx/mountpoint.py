"""Mountpoints: what EMQX puts in front of the topics of a listener's clients, so that each has topics of its own.

A listener with `mountpoint = "mp/${clientid}/"` turns a subscription of the client `c2` to `queue/t` into one to
`mp/c2/queue/t`, and its publishes alike; what is published to `mp/c2/queue/t` reaches that client only, which sees
`queue/t`. Of a shared subscription the group stays in front: `$share/{group}/mp/c2/queue/t`.
"""

from __future__ import annotations

from typing import Final

from millpond.schemas.topics import SHARE_PREFIX, split_share

CLIENT_ID_PLACE: Final = "${clientid}"
QUEUE_PREFIX: Final = (
    "$queue/"  # how EMQX also writes a shared subscription: one group for each filter
)
# Of a client with one of these in its id, the mounted topics could be another client's, or everybody's.
AMBIGUOUS: Final = "/+#"


class Mountpoint:
    """The mountpoint of the listener that Millpond delivers through."""

    def __init__(self, template: str) -> None:
        """`template` is EMQX's setting: a prefix, `${clientid}` as a level of its own, and nothing behind."""
        assert template.endswith(f"/{CLIENT_ID_PLACE}/"), "the settings are checked"
        self.prefix = template.removesuffix(f"{CLIENT_ID_PLACE}/")

    def of(self, client_id: str) -> str:
        """What stands in front of the topics of one client; ClientInfo.mountpoint shows it."""
        return f"{self.prefix}{client_id}/"

    def can_serve(self, client_id: str) -> bool:
        """Whether what is published below the client's mountpoint reaches this client only."""
        return bool(client_id) and not any(character in client_id for character in AMBIGUOUS)

    def holds(self, topic: str) -> bool:
        """Whether a topic is below the mountpoint, of whichever client."""
        return topic.startswith(self.prefix)

    def mount(self, client_id: str, topic: str) -> str:
        """The topic that reaches this client, which sees `topic`."""
        return self.of(client_id) + topic

    def unmount(self, client_id: str, topic: str) -> str | None:
        """The topic as the client sees it; None if it is not one of this client's."""
        mine = self.of(client_id)
        return topic[len(mine) :] if topic.startswith(mine) and len(topic) > len(mine) else None

    def unmount_filter(self, client_id: str, topic_filter: str) -> str | None:
        """The filter as the client subscribed to it; None if it is not one of this client's."""
        group, plain = split_share(topic_filter)
        mine = self.unmount(client_id, plain)
        return None if mine is None else shared(group, mine)

    def of_any(self, topic_filter: str) -> str:
        """The filter of the topics that some client sees as ones of `topic_filter`, which has no group."""
        return f"{self.prefix}+/{topic_filter}"


def shared(group: str | None, topic_filter: str) -> str:
    """The filter with its group in front, if there is one."""
    return topic_filter if group is None else f"{SHARE_PREFIX}{group}/{topic_filter}"


def standard_filter(topic_filter: str, share: str = "") -> str:
    """A filter as the broker tells it, spelled as MQTT 5.0 does (4.8.2).

    `$queue/{filter}` is a shared subscription of the group `$queue`. Before EMQX 5.4 the hook had the group apart, as
    `share`.
    """
    if topic_filter.startswith(QUEUE_PREFIX):
        return shared("$queue", topic_filter[len(QUEUE_PREFIX) :])
    if share and not topic_filter.startswith(SHARE_PREFIX):
        return shared(share, topic_filter)
    return topic_filter
