"""What a machine decides, as data. An effect says *what* is kept; a store says how.

A store carries out three lists, in this order:

1. stores: message bodies and index entries: written before anything refers to them;
2. state: the partition's private state, fenced together with the applied offset;
3. removals: deletes, presence, and the user's own commands: what only the owner may do.

Within a batch a key is stored at most once and removed after it was stored, so the order of the lists is the
only order that matters. On one Redis server all three are one transaction.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from msgspec import Struct

from millpond.schemas.commands import Subscribe, Unsubscribe
from millpond.schemas.events import Message, SubscriberJoined, SubscriberLeft

# The tables of packed states that a partition has: retained messages or clients; what is being handed out, and to whom;
# dead letters, and the ids that brokers gave their copies; what pubsub knows of topics and subscribers.
Table: TypeAlias = Literal["states", "windows", "members", "dead", "aliases", "logs", "subscribers"]

# The source of an effect that no single record asked for (expiry, cleaning up after a refusal).
NO_SOURCE = -1


# -- stores


class StoreMessage(Struct, frozen=True, gc=False):
    """Keep the body of a message and, if `indexed`, its entry in the topic's index.

    `score` orders the index (µs, never a tie); `expires_at` (ms) is when nobody needs the body any more.
    """

    offset: int
    event: Message
    score: int
    indexed: bool
    expires_at: int | None


class Reindex(Struct, frozen=True, gc=False):
    """Place a message, whose body is kept, in its topic's index once more; the rest as for `StoreMessage`."""

    offset: int
    topic: str
    message_id: str
    score: int
    expires_at: int | None


class Retain(Struct, frozen=True, gc=False):
    """Make `message_id` the topic's one retained message; its body is stored."""

    offset: int
    topic: str
    message_id: str
    score: int


class KeepReceipt(Struct, frozen=True, gc=False):
    """Note that a client got or acknowledged a message at `at_s` (seconds); forget all of it at `expires_at` (ms)."""

    offset: int
    message_id: str
    kind: Literal["delivered", "acked"]
    client_id: str
    at_s: int
    expires_at: int


# -- state


class SetState(Struct, frozen=True, gc=False):
    """Replace the packed state of a key (an MQTT topic, a client id, …) in one of the partition's tables; None removes
    it.
    """

    key: str
    state: bytes | None
    table: Table = "states"


class SetIndex(Struct, frozen=True, gc=False):
    """Place a record key in one of the partition's indexes; None takes it out."""

    index: str
    key: str
    score: int | None


class SetRules(Struct, frozen=True, gc=False):
    """The rules in force from here on, in canonical form."""

    canonical: str


class WriteSeen(Struct, frozen=True, gc=False):
    """Add message ids to one generation of seen ids; `fresh` empties it first."""

    generation: int
    fresh: bool
    message_ids: tuple[str, ...]


class SetDue(Struct, frozen=True, gc=False):
    """Something falls due at `at` (ms): None removes it, else the earlier of this and what is known stays."""

    member: str
    at: int | None


# -- removals


class Unindex(Struct, frozen=True, gc=False):
    """Take messages out of a topic's index."""

    offset: int
    topic: str
    message_ids: tuple[str, ...]


class ClearRetained(Struct, frozen=True, gc=False):
    """The topic has no retained message any more."""

    offset: int
    topic: str


class DeleteBody(Struct, frozen=True, gc=False):
    """Nobody refers to this message any more."""

    message_id: str


class ClearBodyExpiry(Struct, frozen=True, gc=False):
    """Take back the lifetime of a body: it was somebody else's key, or is the body of a dead letter."""

    message_id: str


class SetPresence(Struct, frozen=True, gc=False):
    """Show whether a client is online. Times are ms; the nodes are where it was and is connected, as far as known."""

    offset: int
    client_id: str
    online: bool
    online_at: int
    offline_at: int | None
    left_node: str | None
    node: str | None


class ShowOffset(Struct, frozen=True, gc=False):
    """Show the last message id of a subscriber's read offset; None if it has none (any more)."""

    offset: int
    subscriber: str
    topic: str
    message_id: str | None


class RunCommand(Struct, frozen=True, gc=False):
    """A command of the user's own, substituted and checked."""

    offset: int
    arguments: tuple[bytes, ...]


# -- outputs


class DeadLetter(Struct, frozen=True, gc=False, tag="dead_letter"):
    """An output: the record at `offset` was given up on, for this reason."""

    offset: int
    reason: str


class AnnounceMembership(Struct, frozen=True, gc=False, tag="announce"):
    """An output: tell the owners of delivery rules of a member that came or went."""

    offset: int
    event: SubscriberJoined | SubscriberLeft


class SendCommand(Struct, frozen=True, gc=False, tag="command"):
    """An output: have the bridge change a client's subscriptions."""

    offset: int
    command: Subscribe | Unsubscribe


class DeliverMessage(Struct, frozen=True, gc=False, tag="hand_out"):
    """An output: have the bridge deliver a message to one client. `lease` is 0 if nobody wants to know what comes of it.

    `stored` if its body is in the store; else, and if `offset` is its own publish's, it is in that record. A bridge may
    deliver it until `valid_until` (log time, ms), whenever its command is written.
    """

    offset: int
    lease: int
    client_id: str
    epoch: int
    message_id: str
    topic: str
    qos: int
    attempt: int
    expires_at: int | None
    stored: bool = True
    valid_until: int | None = None


class DeadLetterMessage(Struct, frozen=True, gc=False, tag="give_up"):
    """An output: a stored message is a dead letter, for this reason, after so many deliveries."""

    offset: int
    topic: str
    message_id: str
    reason: str
    deliveries: int


class LookUpSubscriptions(Struct, frozen=True, gc=False, tag="look_up_subscriptions"):
    """An output: have the bridge subscribe a client to what its `mqtt:sub` says by then."""

    offset: int
    client_id: str


class LookUpRetained(Struct, frozen=True, gc=False, tag="look_up_retained"):
    """An output: have the bridge deliver the retained messages that match a filter by then, to one client."""

    offset: int
    client_id: str
    topic_filter: str
    qos: int


Effect: TypeAlias = (
    StoreMessage
    | Reindex
    | Retain
    | KeepReceipt
    | SetState
    | SetIndex
    | SetRules
    | WriteSeen
    | SetDue
    | Unindex
    | ClearRetained
    | DeleteBody
    | ClearBodyExpiry
    | SetPresence
    | ShowOffset
    | RunCommand
)
"""What a store carries out."""

Output: TypeAlias = (
    DeadLetter
    | AnnounceMembership
    | SendCommand
    | DeliverMessage
    | DeadLetterMessage
    | LookUpSubscriptions
    | LookUpRetained
)
"""What is produced to Kafka once the store has the effects; kept in the journal until then."""

RefusedPart: TypeAlias = Literal[
    "body", "index", "retained", "receipt", "presence", "read offset", "command", "removal"
]


class Refusal(Struct, frozen=True):
    """The store would not write one part of what the record at `offset` asked for (a foreign key in the way)."""

    offset: int
    part: RefusedPart
    reason: str
