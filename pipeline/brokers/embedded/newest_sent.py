"""What a client got of each topic since it subscribed: a stored retained message that is older must not follow it.

A retained message is looked up while newer messages are on their way. Whoever shows the latest value of a topic would end with
the older one. No IO, no clock.
"""

from __future__ import annotations

from typing import Final

from millpond.pipeline.brokers.commands.deliveries import published_at_s
from millpond.schemas.topics import matches, split_share

# A retained message follows its SUBSCRIBE within milliseconds, or within the time that its agent was away.
REMEMBERED_MS: Final = 600_000
# Topics of one client. The one that was sent to least recently goes first: its retained message may then follow.
TOPICS_MAX: Final = 1_000


class NewestSent:
    """The newest message of each topic that went to one client since it subscribed to the topic."""

    def __init__(self) -> None:
        """Of a client without a subscription."""
        self._newest: dict[
            str, str
        ] = {}  # topic → message id; the topic of the latest copy is the last
        self._until_ms = 0

    def subscribed(self, topic_filter: str, now_ms: int) -> None:
        """The client gets the retained messages of this filter's topics, whatever it got before."""
        plain = split_share(topic_filter)[1]
        for topic in [each for each in self._newest if matches(plain, each)]:
            del self._newest[topic]
        self._until_ms = now_ms + REMEMBERED_MS

    def sent(self, topic: str, message_id: str, now_ms: int) -> None:
        """A copy went to the client."""
        if now_ms > self._until_ms:
            self._newest.clear()
            return
        if published_at_s(message_id) is None:
            return  # its id does not tell its time
        self._newest[topic] = max(message_id, self._newest.pop(topic, ""))
        if len(self._newest) > TOPICS_MAX:
            del self._newest[next(iter(self._newest))]

    def covers(self, topic: str, message_id: str) -> bool:
        """True if the client has got this message, or a newer one, since it subscribed."""
        newest = self._newest.get(topic)
        return (
            newest is not None and published_at_s(message_id) is not None and message_id <= newest
        )
