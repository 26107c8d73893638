"""Effects and outputs: what a machine decides, as data.

Concepts

- **Effect**: a change to the store. It says *what* is stored. A store says how.
- **Output**: something that the driver produces to Kafka after the transaction, for example a command or a dead letter.
- **Source**: the offset of the record that asked for an effect or output. `NO_SOURCE` if no single record did.
- **Transaction**: the effects and outputs of one batch, with the new fence (`agents/ports.py`).
- **Refusal**: one part of a transaction that the store could not write, because a foreign key is in the way.

The three lists

A store carries out the effects of a batch in three lists, one after the other:

1. **store**: first bodies and receipts, then index entries and retained entries.
   A reader therefore never sees an id without its message.
2. **state**: the partition's private state, the fence and the journal.
3. **remove**: deletions, presence, read offsets and user commands. Only the partition's owner may do these.

On one Redis server all three are one transaction. On a Redis Cluster only the state is: the fence lets a worker pass
to the third list only if it still owns the partition. Therefore the first list must be harmless if it is repeated.

Invariants that a machine keeps

1. Within a batch, nothing is removed and then stored again. The list of removals comes last, so it would win.
   A machine drops such a removal, or lets the event stand alone in its batch (`Machine.alone`).
2. A key of a table, an index or the due set has the value of its last effect in the batch.
   For the due set, SetDue says more.
3. A body is stored before, or with, the first effect that names it, and deleted with or after the last.
   Index entry, retained entry and dead message name a body.

Refusals

| part | refused effect | what the machine does in the next batch |
|---|---|---|
| `body` | StoreMessage, Reindex | removes what names the body |
| `index` | StoreMessage with `indexed`, Reindex | deletes the body, unless the topic retains it |
| `retained` | Retain | forgets the retained entry, and deletes the body unless the index has it |
| `receipt`, `presence`, `read offset`, `command`, `removal` | the others | nothing: no other effect depends on them |

The record at the refusal's offset becomes a dead letter. With `NO_SOURCE`, the driver only logs the refusal.
Private state is never refused: a foreign key there stops the worker.

Outputs

The driver produces the outputs of a batch in order, after its transaction. The journal keeps them until Kafka has them.
Their tags and field names are stored there: do not rename them. Two tags, `hand_out` and `give_up`, are older than the
names of their classes. An output names its data instead of holding it. The driver reads bodies and source records when
it produces, so a journal entry stays small.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from msgspec import Struct

from millpond.schemas.commands import Subscribe, Unsubscribe
from millpond.schemas.events import Message, SubscriberJoined, SubscriberLeft

# The tables of packed states of a partition (schemas/keys.py has the content of each). The default is `states`:
# clients for the sessions agent, retained messages for the others.
Table: TypeAlias = Literal["states", "windows", "members", "dead", "aliases", "logs", "subscribers"]

# The source of effects without a record: expiry at a tick, and cleaning up after a refusal. No record has this offset.
NO_SOURCE = -1


# -- list 1: store


class StoreMessage(Struct, frozen=True, gc=False):
    """Store the body of a message, and its entry in the topic's index if `indexed`.

    score: The place in the index: the log's time in µs, unique in the partition. An entry that exists keeps its score,
        so a repeat changes nothing.
    expires_at: When nothing names the body any more, in ms. None: never. The store adds a grace period before the
        server deletes the body, because a tick normally comes first.
    """

    offset: int
    event: Message
    score: int
    indexed: bool
    expires_at: int | None


class Reindex(Struct, frozen=True, gc=False):
    """Put a message into its topic's index again. The store still has its body. For the fields see StoreMessage."""

    offset: int
    topic: str
    message_id: str
    score: int
    expires_at: int | None


class Retain(Struct, frozen=True, gc=False):
    """Replace the topic's retained entry by `message_id`. The store has its body."""

    offset: int
    topic: str
    message_id: str
    score: int


class KeepReceipt(Struct, frozen=True, gc=False):
    """Note in a message's receipt that a client received or acknowledged it.

    at_s: When, in s since the epoch: the unit of public keys.
    expires_at: When the whole receipt expires, in ms.
    """

    offset: int
    message_id: str
    kind: Literal["delivered", "acked"]
    client_id: str
    at_s: int
    expires_at: int


# -- list 2: state


class SetState(Struct, frozen=True, gc=False):
    """Replace the packed state of a key in one of the partition's tables. None removes it."""

    key: str
    state: bytes | None
    table: Table = "states"


class SetIndex(Struct, frozen=True, gc=False):
    """Put a key into one of the partition's indexes, or move it there. The score None removes it."""

    index: str
    key: str
    score: int | None


class SetRules(Struct, frozen=True, gc=False):
    """Replace the rules in force, given in canonical form."""

    canonical: str


class WriteSeen(Struct, frozen=True, gc=False):
    """Add message ids to a generation of seen ids. `fresh` empties the generation first.

    Two keys take turns. So a fresh generation takes the place of the one before the last.
    """

    generation: int
    fresh: bool
    message_ids: tuple[str, ...]


class SetDue(Struct, frozen=True, gc=False):
    """Put a due thing into the due set, with its time in ms. None removes it.

    The store keeps the earlier one of the stored time and this one. So a machine that wants a later time removes the
    due thing first, in the same batch.
    """

    member: str
    at: int | None


# -- list 3: remove


class Unindex(Struct, frozen=True, gc=False):
    """Remove messages from a topic's index."""

    offset: int
    topic: str
    message_ids: tuple[str, ...]


class ClearRetained(Struct, frozen=True, gc=False):
    """Remove the topic's retained entry."""

    offset: int
    topic: str


class DeleteBody(Struct, frozen=True, gc=False):
    """Delete the body of a message that nothing names any more."""

    message_id: str


class ClearBodyExpiry(Struct, frozen=True, gc=False):
    """Remove the expiry from the key of a body. Two cases need it.

    The body of a dead message lives until a tick or an operator deletes it. And after a refusal, StoreMessage may have
    set an expiry on a foreign key.
    """

    message_id: str


class SetPresence(Struct, frozen=True, gc=False):
    """Write whether a client is online.

    online_at, offline_at: In ms. None: the client never went offline.
    left_node: The node whose hash loses the client. None if there is none, or if it is `node`.
    node: The node whose hash shows the client. None if it is offline, or its node is unknown.
    """

    offset: int
    client_id: str
    online: bool
    online_at: int
    offline_at: int | None
    left_node: str | None
    node: str | None


class ForgetPresence(Struct, frozen=True, gc=False):
    """Remove what `SetPresence` has written about an offline client. Fields of other programs stay."""

    offset: int
    client_id: str


class ShowOffset(Struct, frozen=True, gc=False):
    """Write the view of a read offset: the id of its last message. None removes the view."""

    offset: int
    subscriber: str
    topic: str
    message_id: str | None


class RunCommand(Struct, frozen=True, gc=False):
    """Run a user command. Its values are filled in, and its arguments name no private key."""

    offset: int
    arguments: tuple[bytes, ...]


# -- outputs


class DeadLetter(Struct, frozen=True, gc=False, tag="dead_letter"):
    """Write a dead letter of the record at `offset`: its bytes, and the reason in a header."""

    offset: int
    reason: str


class AnnounceMembership(Struct, frozen=True, gc=False, tag="announce"):
    """Announce to the delivery agents that a member joined or left.

    A filter without a wildcard goes to the partition of its topic, one with a wildcard to every partition.
    """

    offset: int
    event: SubscriberJoined | SubscriberLeft


class SendCommand(Struct, frozen=True, gc=False, tag="command"):
    """Send the bridge a command that changes a client's subscriptions."""

    offset: int
    command: Subscribe | Unsubscribe


class DeliverMessage(Struct, frozen=True, gc=False, tag="hand_out"):
    """Send the bridge a command that delivers one message to one client.

    offset: The record that caused the delivery. If it is the publish of this message, it holds the payload.
    lease: The number of the lease. 0: no lease, and no report is wanted (a QoS 0 publish).
    qos: That of the subscription. The copy has the lower one of this and the message's.
    attempt: Which delivery this is, from 1.
    expires_at: When the message expires by its rule, in ms. The message's own expiry can be earlier.
    valid_until: Until when a bridge may deliver it, in ms of the log's time, whenever its command reaches Kafka.
    stored: True if the store has the body. Otherwise only the record at `offset` has the payload.
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
    """Write a dead letter of a stored message: its payload, with reason and number of deliveries in headers."""

    offset: int
    topic: str
    message_id: str
    reason: str
    deliveries: int


class LookUpSubscriptions(Struct, frozen=True, gc=False, tag="look_up_subscriptions"):
    """Read `mqtt:sub:{client_id}` when this is produced, and send the bridge one command with its filters."""

    offset: int
    client_id: str


class LookUpRetained(Struct, frozen=True, gc=False, tag="look_up_retained"):
    """Read the retained messages that match a filter when this is produced, and deliver them to one client."""

    offset: int
    client_id: str
    topic_filter: str
    qos: int


# What a store carries out.
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
    | ForgetPresence
    | ShowOffset
    | RunCommand
)

# What the driver produces after the transaction.
Output: TypeAlias = (
    DeadLetter
    | AnnounceMembership
    | SendCommand
    | DeliverMessage
    | DeadLetterMessage
    | LookUpSubscriptions
    | LookUpRetained
)

RefusedPart: TypeAlias = Literal[
    "body", "index", "retained", "receipt", "presence", "read offset", "command", "removal"
]


class Refusal(Struct, frozen=True):
    """One part of a transaction that the store could not write, because a foreign key is in the way.

    offset: The source of the refused effect.
    reason: The server's words.
    """

    offset: int
    part: RefusedPart
    reason: str
