"""Kafka topics, record keys, consumer groups and Redis keys. They are built here and nowhere else.

**Public keys** (`mqtt:`) have the layout of EMQ X's Redis backend. Any Redis client may read them.

**Private keys** (`millpond:`) hold what the agents know. Their names carry application, agent and partition as a hash
tag. So all keys of a partition share one slot of a Redis Cluster, and one transaction can write them.

The table is shown to users: `docs/generate.py` copies it into docs/reference/redis-keys.md.

| key | type | content | owner | lifetime |
|---|---|---|---|---|
| `mqtt:msg:{topic}` | zset | ids of the stored messages, score = the log's time in µs, no two alike | the topic's agent | an entry: `expired_time` of the rule |
| `mqtt:msg:{message_id}` | hash | one message: `id from qos topic payload ts retain`; `expires_at` in ms, if the message came with an expiry | the topic's agent | while an index entry, a retained entry or a dead message names it |
| `mqtt:retain:{topic}` | zset | the id of the one retained message | the topic's agent | until it is replaced, cleared or expired |
| `mqtt:receipt:{message_id}` | hash | `delivered:{client_id}`, `acked:{client_id}` → epoch seconds | the topic's agent | `expired_time` of the rule, one day without it |
| `mqtt:client:{client_id}` | hash | presence: `state online_at offline_at` | sessions | `expired_time` of the rule `on_client_disconnected`, after the client has gone; for ever without it |
| `mqtt:node:{node}` | hash | id of each online client → epoch seconds of its connect | sessions | an entry: while the client is online |
| `mqtt:sub:{client_id}` | hash | topic filter → QoS | your applications | your applications decide |
| `mqtt:acked:{subscriber}:{topic}` | string | the read offset as the id of its last message; the subscriber is a client id or `$share/{group}/{filter}`; a view, not the state | pubsub | as long as the read offset |
| `millpond:{app:agent:partition}:applied` | string | the fence: applied offset, sequence number and partition-wide state, as JSON | the agent | for ever |
| `millpond:{app:agent:partition}:journal` | hash | sequence number → outputs that Kafka may not have yet, as JSON | the agent | until Kafka has them |
| the same, on a Redis Cluster | | `remove:{sequence}` → commands that run after the fence, as MessagePack | the agent | until they have run |
| `millpond:{app:agent:partition}:rules` | string | the rules in force, as JSON | the agent | for ever |
| `millpond:{app:agent:partition}:seen:{0,1}` | string | the seen message ids in two generations, one JSON string in each line | the agent | until a newer generation takes its place, after 60 seconds or more |
| `millpond:{app:agent:partition}:states` | hash | sessions: client id → its state; other agents: topic → its retained message; as JSON | the agent | sessions: as long as the presence, one day where none is kept; others: while the topic retains a message |
| `millpond:{app:agent:partition}:windows` | hash | queue: topic → its window; pubsub: subscriber and topic → its reader with the read offset; as JSON | queue, pubsub | queue: while the window has content; pubsub: as long as the read offset |
| `millpond:{app:agent:partition}:members` | hash | client, or group and client → the member with its filters and leases, as JSON | queue, pubsub | until ten minutes after the member went offline |
| `millpond:{app:agent:partition}:dead` | hash | message id → the dead message with the reason and its holders, as JSON | queue, pubsub | 7 days |
| `millpond:{app:agent:partition}:aliases` | hash | id that a broker gave a copy → message id of the dead message | queue, pubsub | with the dead message, at most 16 for one of its subscribers |
| `millpond:{app:pubsub:partition}:logs` | hash | topic → its topic log: length, newest message, what was trimmed; as JSON | pubsub | for ever: grows with the topics |
| `millpond:{app:pubsub:partition}:subscribers` | hash | subscriber → its filters, and since when it has each, as JSON | pubsub | until `offset_retention_s` after the end of its session |
| `millpond:{app:agent:partition}:waiting` | zset | windows with messages that no member had room for, by name | queue, pubsub | until the messages are leased |
| `millpond:{app:agent:partition}:work` | zset | members on a round and other work that ticks do in pieces, in order | queue, pubsub | until the work is done |
| `millpond:{app:pubsub:partition}:topics` | zset | topics with stored messages, by name | pubsub | while the topic has stored messages |
| `millpond:{app:pubsub:partition}:readers` | zset | subscriber and topic of each reader, by name | pubsub | as long as the read offset |
| `millpond:{app:agent:partition}:retained` | zset | topics with a retained message, by name | the topic's agent | while the topic retains a message |
| `millpond:{app:sessions:partition}:node:{node}` | zset | client ids, score = the lowest offset at which something of the client on this node was last seen | sessions | while the client has a connection or session on this node |
| `millpond:{app:sessions:partition}:announced` | zset | ids of clients with subscriptions, score = the offset of the rules by which they were announced | sessions | while the client has subscriptions |
| `millpond:{app:agent:partition}:due` | zset | due things, score = their time in ms since the epoch | the agent | until a tick has handled them |
| `millpond:{number}:confirmed`, on a Redis Cluster with replicas | string | nothing: a write in front of each `WAIT`, so that it covers what other connections wrote | all agents | 1 second |
| `millpond:{app:agent}:replay` | hash | what of the log a replay has folded into this database: `complete` (0 or 1), `starts` and `ends` by partition, `from`, `cluster_id` | `millpond replay` | until the database is emptied |
| `millpond:{app}:probe` | string | a random value, by which `millpond replay` finds out whether two addresses are one database | `millpond replay` | a moment, one minute at most |
| `millpond:{app:agent}:rebuild` | hash | partition → its fence before the rebuild; workers of the agent do not start while this key exists | `millpond rebuild` | until the rebuild is complete |
"""

from __future__ import annotations

from typing import Final, NamedTuple

from millpond.schemas.events import (
    AgentName,
    DeliveriesSent,
    DeliveryFailed,
    Event,
    MembersActive,
    Message,
    MessageAcked,
    MessageDelivered,
    NodeStarted,
    NodeStopped,
    NodeSyncCompleted,
    NodeSyncStarted,
    OperatorDrop,
    OperatorRequeue,
    OperatorRewind,
    RulesChanged,
    SubscriberJoined,
    SubscriberLeft,
    Tick,
)
from millpond.schemas.topics import split_share

CLIENTS_TOPIC: Final = "mqtt.clients"
MESSAGES_TOPIC: Final = "mqtt.messages"
DELIVERIES_TOPIC: Final = "mqtt.deliveries"
DEAD_LETTERS_TOPIC: Final = "mqtt.dead-letters"
TOPICS: Final = (CLIENTS_TOPIC, MESSAGES_TOPIC, DELIVERIES_TOPIC, DEAD_LETTERS_TOPIC)

# Millpond's own names. No client may publish below the first. No user command may name a key with the second prefix.
RESERVED_TOPIC_PREFIX: Final = "$millpond/"
PRIVATE_PREFIX: Final = "millpond:"

MESSAGES_PREFIX, RETAINED_PREFIX, RECEIPTS_PREFIX = "mqtt:msg:", "mqtt:retain:", "mqtt:receipt:"
PRESENCE_PREFIX, NODES_PREFIX, OFFSETS_PREFIX = "mqtt:client:", "mqtt:node:", "mqtt:acked:"
# Three agents write these keys. The topic in a key decides which of them owns it.
OF_TOPICS: Final = (MESSAGES_PREFIX, RETAINED_PREFIX, RECEIPTS_PREFIX)
# The prefixes of the public keys that each agent writes.
PUBLIC_PREFIXES: Final[dict[AgentName, tuple[str, ...]]] = {
    "sessions": (PRESENCE_PREFIX, NODES_PREFIX),
    "messages": OF_TOPICS,
    "queue": OF_TOPICS,
    "pubsub": (*OF_TOPICS, OFFSETS_PREFIX),
}

# The `node` of records that workers and commands write. Bridges give the name of a broker node.
AGENT_NODE: Final = "millpond"

SOURCE_TOPIC: Final[dict[AgentName, str]] = {
    "sessions": CLIENTS_TOPIC,
    "messages": MESSAGES_TOPIC,
    "queue": MESSAGES_TOPIC,
    "pubsub": MESSAGES_TOPIC,
}


class Partition(NamedTuple):
    """One partition of one agent. Its name is part of every private key, so two applications can share a Redis."""

    app: str
    agent: AgentName
    number: int

    @property
    def topic(self) -> str:
        """The Kafka topic that the agent reads."""
        return SOURCE_TOPIC[self.agent]

    def __str__(self) -> str:
        return f"{self.topic}[{self.number}] ({self.app}.{self.agent})"


def group_id(app: str, agent: AgentName) -> str:
    """Return the Kafka consumer group of an agent."""
    return f"{app}.{agent}"


def bridge_group_id(app: str) -> str:
    """Return the consumer group of the bridge that carries out commands."""
    return f"{app}.bridge"


def rule_events_group_id(app: str) -> str:
    """Return the consumer group of `millpond bridge emqx-kafka`."""
    return f"{bridge_group_id(app)}.emqx-kafka"


def app_of_group(group: str) -> str | None:
    """Return the application whose workers or bridge have this consumer group. None if the group is another program's."""
    app, _, role = group.rpartition(".")
    return app if app and role in (*SOURCE_TOPIC, "bridge") else None


def agent_record_key(agent: AgentName) -> str:
    """Return the record key of events about an agent. Their producer names the partition."""
    return f"{RESERVED_TOPIC_PREFIX}{agent}"


def record_key(event: Event) -> str:
    """Return the Kafka key of an event's record.

    The key decides the partition, and so which events have an order among them. Three kinds of events go to a partition
    that their producer names: events about an agent, events about a node, and announcements with a wildcard.
    """
    if isinstance(event, Message | MessageAcked | MessageDelivered):
        return event.topic
    if isinstance(event, OperatorRequeue | OperatorDrop | OperatorRewind):
        return event.topic
    if isinstance(event, RulesChanged | Tick | DeliveriesSent | DeliveryFailed | MembersActive):
        return agent_record_key(event.agent)
    if isinstance(event, SubscriberJoined | SubscriberLeft):
        # Without a wildcard, the filter is a topic. With one, a record goes to every partition.
        return split_share(event.topic_filter)[1]
    if isinstance(event, NodeStarted | NodeStopped | NodeSyncStarted | NodeSyncCompleted):
        # A node's clients are in all partitions, so each partition gets a record.
        return agent_record_key("sessions")
    return event.client_id


def message_index(topic: str) -> str:
    """The zset of the ids of a topic's stored messages, in the order of the log."""
    return f"{MESSAGES_PREFIX}{topic}"


def message_body(message_id: str) -> str:
    """The hash of one stored message."""
    return f"{MESSAGES_PREFIX}{message_id}"


def retained(topic: str) -> str:
    """The zset with a topic's retained message id."""
    return f"{RETAINED_PREFIX}{topic}"


def subscriptions(client_id: str) -> str:
    """The hash of a client's subscriptions, which applications write."""
    return f"mqtt:sub:{client_id}"


def read_offset(subscriber: str, topic: str) -> str:
    """The string with the last message id of a subscriber's read offset."""
    return f"{OFFSETS_PREFIX}{subscriber}:{topic}"


def presence(client_id: str) -> str:
    """The hash that says whether a client is online."""
    return f"{PRESENCE_PREFIX}{client_id}"


def node(name: str) -> str:
    """The hash of the clients that are online at a broker node."""
    return f"{NODES_PREFIX}{name}"


def receipt(message_id: str) -> str:
    """The hash of the clients that received or acknowledged a message."""
    return f"{RECEIPTS_PREFIX}{message_id}"


def _private(partition: Partition, name: str) -> str:
    app, agent, number = partition
    return f"{PRIVATE_PREFIX}{{{app}:{agent}:{number}}}:{name}"


def private_prefix(app: str, agent: AgentName) -> str:
    """The common prefix of the private keys of all partitions of an agent."""
    return f"{PRIVATE_PREFIX}{{{app}:{agent}:"


def replay_marker(app: str, agent: AgentName) -> str:
    """The hash that marks a database as the target of a replay; see `pipeline/replay/target.py`."""
    return f"{PRIVATE_PREFIX}{{{app}:{agent}}}:replay"


def probe(app: str) -> str:
    """The string that tells whether two connections see one database; see `pipeline/stores/redis/keyspace.py`."""
    return f"{PRIVATE_PREFIX}{{{app}}}:probe"


def rebuild_marker(app: str, agent: AgentName) -> str:
    """The hash that marks an agent as being rebuilt; see `pipeline/rebuild/rebuild.py`."""
    return f"{PRIVATE_PREFIX}{{{app}:{agent}}}:rebuild"


def applied(partition: Partition) -> str:
    """The string with the fence of a partition."""
    return _private(partition, "applied")


def confirmed(number: int) -> str:
    """The key that is written in front of a WAIT. The number decides its slot. Only on a Redis Cluster with replicas."""
    return f"{PRIVATE_PREFIX}{{{number}}}:confirmed"


def journal(partition: Partition) -> str:
    """The hash of outputs that Kafka may not have yet."""
    return _private(partition, "journal")


def removal_field(sequence: int) -> str:
    """The journal's field with the commands that run after the fence of a transaction. Only on a Redis Cluster."""
    return f"remove:{sequence}"


def rules(partition: Partition) -> str:
    """The string with the rules in force in a partition."""
    return _private(partition, "rules")


def seen(partition: Partition, generation: int) -> str:
    """The string with one generation of seen ids. Two keys take turns: the parity of the generation names the key."""
    return _private(partition, f"seen:{generation & 1}")


# The index of topics with a retained message. Stores write it with the retained entry, whichever agent owns the topic.
RETAINED_INDEX: Final = "retained"


def index(partition: Partition, name: str) -> str:
    """A zset of a partition, by the name of the index."""
    return _private(partition, name)


def table(partition: Partition, name: str) -> str:
    """A hash of packed states of a partition, by the name of the table."""
    return _private(partition, name)


def due(partition: Partition) -> str:
    """The zset of due things of a partition."""
    return _private(partition, "due")
