"""Mountpoints: the prefix that EMQX puts in front of a client's topics, so that the bridge can reach one client alone.

A listener with `mountpoint = "mp/${clientid}/"` changes the topics of its clients, here of the client `c2`:

| the client | EMQX |
|---|---|
| subscribes to `queue/t` | holds a subscription to `mp/c2/queue/t` |
| subscribes to `$share/g/queue/t` | holds a subscription to `$share/g/mp/c2/queue/t` |
| publishes to `queue/t` | routes to `mp/c2/queue/t` |
| receives `queue/t` | got a publish to `mp/c2/queue/t` |
"""

from __future__ import annotations

from typing import Final

from millpond.schemas.topics import shared, split_share

CLIENT_ID_PLACE: Final = "${clientid}"
# With one of these in a client id, the mounted topics could also match those of other clients.
AMBIGUOUS: Final = "/+#"


class Mountpoint:
    """The mountpoint of the listener that Millpond delivers through."""

    def __init__(self, template: str) -> None:
        """`template` is EMQX's setting. Its last level is `${clientid}`."""
        assert template.endswith(f"/{CLIENT_ID_PLACE}/"), "the settings were validated"
        self.prefix = template.removesuffix(f"{CLIENT_ID_PLACE}/")

    def of(self, client_id: str) -> str:
        """The prefix of one client's topics, as EMQX reports it in `ClientInfo.mountpoint`."""
        return f"{self.prefix}{client_id}/"

    def can_serve(self, client_id: str) -> bool:
        """True if a publish below the client's mountpoint reaches this client only."""
        return bool(client_id) and not any(character in client_id for character in AMBIGUOUS)

    def holds(self, topic: str) -> bool:
        """True if a topic is below the mountpoint of any client."""
        return topic.startswith(self.prefix)

    def mount(self, client_id: str, topic: str) -> str:
        """The topic to publish to, so that this client alone receives `topic`."""
        return self.of(client_id) + topic

    def unmount(self, client_id: str, topic: str) -> str | None:
        """The topic as the client sees it. None if it is not below this client's mountpoint."""
        prefix = self.of(client_id)
        found = topic.startswith(prefix) and len(topic) > len(prefix)
        return topic[len(prefix) :] if found else None

    def unmount_filter(self, client_id: str, topic_filter: str) -> str | None:
        """The filter as the client wrote it. None if it is not below this client's mountpoint."""
        group, plain = split_share(topic_filter)
        own = self.unmount(client_id, plain)
        return None if own is None else shared(group, own)

    def of_any(self, topic_filter: str) -> str:
        """The filter that matches what any client sees as a topic of `topic_filter`, which has no group."""
        return f"{self.prefix}+/{topic_filter}"


def reported_filter(topic_filter: str, share: str = "") -> str:
    """A filter as EMQX reports it, in the spelling of MQTT 5.0.

    Before EMQX 5.4 the hook reported the group separately, as `share`.
    """
    group, plain = split_share(topic_filter)
    return shared(share or None if group is None else group, plain)
