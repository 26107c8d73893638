"""The way back of a copy: the topic to which its sender publishes it, by which the hook knows whose it is.

`$millpond/d/{mac}/{lease}/{client id}/{message id}/{topic as it is to be routed}`: lease, client id and message id
percent-encoded, one level each. `mac` is the first 16 hex characters of HMAC-SHA256 over what follows it, keyed with the
secret of the API key: whoever publishes, even with a client id like EMQX's own `http_api`, cannot make one.
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
    """A copy that came back. `lease` is empty if nobody wants a report of it."""

    lease: str
    client_id: str
    message_id: str
    topic: str


class CopyTopic:
    """Makes such topics, and knows them again."""

    def __init__(self, secret: str) -> None:
        """`secret` is that of the API key; all processes of a bridge have the same."""
        self._secret = secret.encode()

    def topic_for(self, lease: str, client_id: str, message_id: str, topic: str) -> str:
        """The topic to publish a copy to. It may be longer than a topic can be: whoever publishes it looks."""
        levels = (quote(text, safe="") for text in (lease, client_id, message_id))
        rest = "/".join((*levels, topic))
        return f"{PREFIX}{self._mac(rest)}/{rest}"

    def parse(self, topic: str) -> ReturnedCopy | None:
        """What `topic_for` made it from; None of any other topic, and of a forged one."""
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
