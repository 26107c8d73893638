"""The copy topic: the topic to which the bridge publishes a copy, so that the hook recognises the copy.

EMQX calls the hook `message.publish` for each copy. The hook learns lease, client and message from the topic, and lets
EMQX route the copy to the topic at the end:

    $millpond/d/{mac}/{lease}/{client id}/{message id}/{topic to route to}

Lease, client id and message id are percent-encoded, one level each. `mac` is the first 16 hexadecimal digits of
HMAC-SHA256 over everything behind it. Its key is the secret of the API key. So a client cannot forge a copy, not even
one with the client id `http_api`, which EMQX gives to publishes through REST.
"""

from __future__ import annotations

import hmac
from hashlib import sha256
from typing import Final, NamedTuple
from urllib.parse import quote, unquote

from millpond.schemas.keys import RESERVED_TOPIC_PREFIX

PREFIX: Final = f"{RESERVED_TOPIC_PREFIX}d/"
MAC_HEX_DIGITS: Final = 16


class ReturnedCopy(NamedTuple):
    """A copy whose publish reached the hook. `lease` is empty if no agent expects a report."""

    lease: str
    client_id: str
    message_id: str
    topic: str


class CopyTopic:
    """Makes copy topics and parses them."""

    def __init__(self, secret: str) -> None:
        """`secret` belongs to the API key, so all processes of a bridge have the same."""
        self._secret = secret.encode()

    def topic_for(self, lease: str, client_id: str, message_id: str, topic: str) -> str:
        """The topic to publish a copy to. It may be longer than MQTT allows: EMQX then refuses the publish."""
        levels = (quote(text, safe="") for text in (lease, client_id, message_id))
        rest = "/".join((*levels, topic))
        return f"{PREFIX}{self._mac(rest)}/{rest}"

    def parse(self, topic: str) -> ReturnedCopy | None:
        """The parts that `topic_for` joined. None for any other topic and for a forged one."""
        if not topic.startswith(PREFIX):
            return None
        mac, _, rest = topic[len(PREFIX) :].partition("/")
        levels = rest.split("/", 3)
        if len(levels) < 4 or not mac.isascii() or not hmac.compare_digest(mac, self._mac(rest)):
            return None
        lease, client_id, message_id = map(unquote, levels[:3])
        return ReturnedCopy(lease, client_id, message_id, levels[3])

    def _mac(self, rest: str) -> str:
        signed = rest.encode("utf-8", "surrogatepass")
        return hmac.digest(self._secret, signed, sha256).hex()[:MAC_HEX_DIGITS]
