"""Public keys that another program wrote, with another type than Millpond's.

Such a key is never destroyed, and stops nothing. It counts as empty, and the log names it.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from hiredis import ReplyError

from millpond.pipeline.stores.redis.connection import error_code

logger = logging.getLogger(__name__)

# Keys whose line is in the log. Beyond it no more are named: the first ones show what kind of program wrote them.
NAMED_MAX: Final = 100
_named: Final[dict[str, None]] = {}


def is_wrong_type(reply: Any) -> bool:
    """True if the server says that the key has another type."""
    return isinstance(reply, ReplyError) and error_code(reply) == "WRONGTYPE"


def foreign_key(key: str, reply: object) -> str:
    """What is to be said of such a key."""
    return f"{key} is not of the type that Millpond writes there, and counts as empty: {reply}"


def name_foreign_key(key: str, reply: object) -> None:
    """Log a key, once in a process: it is read again with each message of its topic."""
    if key not in _named and len(_named) < NAMED_MAX:
        _named[key] = None
        logger.warning("%s; another program wrote it", foreign_key(key, reply))
