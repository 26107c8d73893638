"""Every Kafka topic and Redis key, in one table; built here and nowhere else.

Public keys (`mqtt:`): any Redis client may read them. Private keys (`millpond:`) hold what the agents
know; they carry application, agent and partition as hash tag, so that one partition's state shares a
Redis Cluster slot and can be written in one transaction.

| key | type | content | owner | lifetime |
|---|---|---|---|---|
| `mqtt:msg:{topic}` | zset | message ids, score = log time in µs, never a tie | the topic's agent | an entry: `expired_time` |
| `mqtt:msg:{message_id}` | hash | `id from qos topic payload ts retain`; `expires_at` in ms, if the message came with an expiry | the topic's agent | until index, retained entry and dead letter let go |
| `mqtt:retain:{topic}` | zset | the one retained message id | the topic's agent | until replaced, cleared or expired |
| `mqtt:receipt:{message_id}` | hash | `delivered:{client_id}`, `acked:{client_id}` → epoch seconds | the topic's agent | `expired_time` of the rule |
| `mqtt:client:{client_id}` | hash | `state online_at offline_at` | sessions | grows with the clients |
| `mqtt:node:{node}` | hash | client id → online timestamp | sessions | grows with the clients online |
| `mqtt:sub:{client_id}` | hash | topic filter → QoS | your applications | yours |
| `mqtt:acked:{subscriber}:{topic}` | string | last message id of the read offset of a client, or of `$share/{group}/{filter}` (a view) | pubsub | with the offset |
| `millpond:{app:agent:partition}:applied` | string | the fence: applied offset, sequence and partition-wide state, as JSON | the agent | for ever |
| `millpond:{app:agent:partition}:journal` | hash | sequence → what must still be produced, as JSON | the agent | until produced |
| the same, on a Redis Cluster | | `remove:{sequence}` → what runs after the fence, as MessagePack | the agent | until it has run |
| `millpond:{app:agent:partition}:rules` | string | the rules in force, as JSON | the agent | for ever |
| `millpond:{app:agent:partition}:seen:{0,1}` | string | two generations of message ids seen, a JSON string per line | the agent | two `dedup_window_s` |
| `millpond:{app:agent:partition}:states` | hash | client id → its state; topic → its retained message, as JSON | the agent | while it has state |
| `millpond:{app:agent:partition}:windows` | hash | queue: topic; pubsub: subscriber and topic → what is handed out, and how far, as JSON | queue, pubsub | while there is something; pubsub: with the offset |
| `millpond:{app:agent:partition}:members` | hash | client, or group and client → its filters and what it has in hand, as JSON | queue, pubsub | ten minutes longer than it is online |
| `millpond:{app:agent:partition}:dead` | hash | message id → why it was given up on, and who had it, as JSON | queue, pubsub | 7 days |
| `millpond:{app:agent:partition}:aliases` | hash | id that a broker gave a copy → message id of the dead message | queue, pubsub | with the dead message, at most 16 for one of its subscribers |
| `millpond:{app:pubsub:partition}:logs` | hash | topic → how long its log is, and what was trimmed, as JSON | pubsub | grows with the topics |
| `millpond:{app:pubsub:partition}:subscribers` | hash | subscriber → since when it is known by which filters, as JSON | pubsub | `offset_retention_s` longer than its session |
| `millpond:{app:agent:partition}:waiting` | zset | windows with something that nobody had room for, by name | queue, pubsub | until it is handed out |
| `millpond:{app:agent:partition}:work` | zset | members that go round many topics, in their order | queue, pubsub | until they have |
| `millpond:{app:pubsub:partition}:topics` | zset | topics with a log, by name | pubsub | with its messages |
| `millpond:{app:pubsub:partition}:readers` | zset | subscriber and topic of each offset, by name | pubsub | with the offset |
| `millpond:{app:agent:partition}:retained` | zset | topics that retain a message, by name | the topic's agent | with the message |
| `millpond:{app:sessions:partition}:node:{node}` | zset | client ids, score = offset that last showed all of theirs | sessions | with the session |
| `millpond:{app:sessions:partition}:announced` | zset | ids of clients with subscriptions, score = offset of the rules they were announced by | sessions | with the subscriptions |
| `millpond:{app:agent:partition}:due` | zset | what falls due, score = ms since the epoch | the agent | until done |
| `millpond:{app:agent}:replay` | hash | `complete` 0/1, `starts` and `ends` by partition, `from`, `cluster_id`: what of the log a replay has put here | `millpond replay` | until the database is emptied |
| `millpond:{app:agent}:rebuild` | hash | partition → the fence that a rebuild began with, until it is done; its workers do not start meanwhile | `millpond rebuild` | while one is unfinished |
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

# What is Millpond's own: no client may publish below it, no user command may touch a key below it.
RESERVED_TOPIC_PREFIX: Final = "$millpond/"
PRIVATE_PREFIX: Final = "millpond:"

MESSAGES_PREFIX, RETAINED_PREFIX, RECEIPTS_PREFIX = "mqtt:msg:", "mqtt:retain:", "mqtt:receipt:"
PRESENCE_PREFIX, NODES_PREFIX, OFFSETS_PREFIX = "mqtt:client:", "mqtt:node:", "mqtt:acked:"
OF_TOPICS: Final = (MESSAGES_PREFIX, RETAINED_PREFIX, RECEIPTS_PREFIX)
# The public keys that each agent writes begin so. Those of topics are three agents': each has its own topics.
PUBLIC_PREFIXES: Final[dict[AgentName, tuple[str, ...]]] = {
    "sessions": (PRESENCE_PREFIX, NODES_PREFIX),
    "messages": OF_TOPICS,
    "queue": OF_TOPICS,
    "pubsub": (*OF_TOPICS, OFFSETS_PREFIX),
}

AGENT_NODE: Final = "millpond"  # the node in records that agents write

SOURCE_TOPIC: Final[dict[AgentName, str]] = {
    "sessions": CLIENTS_TOPIC,
    "messages": MESSAGES_TOPIC,
    "queue": MESSAGES_TOPIC,
    "pubsub": MESSAGES_TOPIC,
}


class Partition(NamedTuple):
    """One partition as one agent sees it: whose state, of which application."""

    app: str
    agent: AgentName
    number: int

    @property
    def topic(self) -> str:
        """The Kafka topic that this agent reads."""
        return SOURCE_TOPIC[self.agent]

    def __str__(self) -> str:
        return f"{self.topic}[{self.number}] ({self.app}.{self.agent})"


def group_id(app: str, agent: AgentName) -> str:
    """The Kafka consumer group of an agent."""
    return f"{app}.{agent}"


def bridge_group_id(app: str) -> str:
    """The Kafka consumer group of the bridge that carries out commands."""
    return f"{app}.bridge"


def rule_events_group_id(app: str) -> str:
    """The Kafka consumer group of the bridge that reads what EMQX's rules wrote."""
    return f"{bridge_group_id(app)}.emqx-kafka"


def agent_record_key(agent: AgentName) -> str:
    """The Kafka key of records that concern an agent rather than an MQTT topic."""
    return f"{RESERVED_TOPIC_PREFIX}{agent}"


def record_key(event: Event) -> str:
    """The Kafka key of an event's record: it decides the partition, and so what the event is ordered with."""
    if isinstance(event, Message | MessageAcked | MessageDelivered):
        return event.topic
    if isinstance(event, OperatorRequeue | OperatorDrop | OperatorRewind):
        return event.topic
    if isinstance(event, RulesChanged | Tick | DeliveriesSent | DeliveryFailed | MembersActive):
        return agent_record_key(event.agent)
    if isinstance(event, SubscriberJoined | SubscriberLeft):
        return split_share(event.topic_filter)[
            1
        ]  # a topic's partition, or every one for a wildcard
    if isinstance(event, NodeStarted | NodeStopped | NodeSyncStarted | NodeSyncCompleted):
        return agent_record_key("sessions")  # one per partition, named explicitly
    return event.client_id


def message_index(topic: str) -> str:
    """The zset of a topic's stored message ids, in log order."""
    return f"{MESSAGES_PREFIX}{topic}"


def message_body(message_id: str) -> str:
    """The hash of one stored message."""
    return f"{MESSAGES_PREFIX}{message_id}"


def retained(topic: str) -> str:
    """The zset with a topic's retained message id."""
    return f"{RETAINED_PREFIX}{topic}"


def subscriptions(client_id: str) -> str:
    """The hash of what the database subscribes a client to."""
    return f"mqtt:sub:{client_id}"


def read_offset(subscriber: str, topic: str) -> str:
    """The last message id of a subscriber's read offset."""
    return f"{OFFSETS_PREFIX}{subscriber}:{topic}"


def presence(client_id: str) -> str:
    """The hash that says whether a client is online."""
    return f"{PRESENCE_PREFIX}{client_id}"


def node(name: str) -> str:
    """The hash of the clients that are online at a broker node."""
    return f"{NODES_PREFIX}{name}"


def receipt(message_id: str) -> str:
    """The hash of who got and who acknowledged a message."""
    return f"{RECEIPTS_PREFIX}{message_id}"


def _private(partition: Partition, name: str) -> str:
    app, agent, number = partition
    return f"{PRIVATE_PREFIX}{{{app}:{agent}:{number}}}:{name}"


def private_prefix(app: str, agent: AgentName) -> str:
    """What the private keys of all partitions of an agent begin with."""
    return f"{PRIVATE_PREFIX}{{{app}:{agent}:"


def replay_marker(app: str, agent: AgentName) -> str:
    """What a replay has put of an agent's log into a database; see `pipeline/replay/target.py`."""
    return f"{PRIVATE_PREFIX}{{{app}:{agent}}}:replay"


def rebuild_marker(app: str, agent: AgentName) -> str:
    """What a rebuild of an agent has not done yet; see `pipeline/rebuild/rebuild.py`."""
    return f"{PRIVATE_PREFIX}{{{app}:{agent}}}:rebuild"


def applied(partition: Partition) -> str:
    """The fence of a partition's state."""
    return _private(partition, "applied")


def journal(partition: Partition) -> str:
    """What a partition must still produce."""
    return _private(partition, "journal")


def removal_field(sequence: int) -> str:
    """The field of the journal, on a Redis Cluster, with what a transaction still removes after its fence."""
    return f"remove:{sequence}"


def rules(partition: Partition) -> str:
    """The rules in force in a partition."""
    return _private(partition, "rules")


def seen(partition: Partition, generation: int) -> str:
    """One of the two generations of seen message ids (0 or 1)."""
    return _private(partition, f"seen:{generation & 1}")


RETAINED_INDEX: Final = "retained"  # the topics that retain a message, by name


def index(partition: Partition, name: str) -> str:
    """One of an agent's own indexes of a partition."""
    return _private(partition, name)


def table(partition: Partition, name: str) -> str:
    """One of the tables of packed states that a partition has."""
    return _private(partition, name)


def due(partition: Partition) -> str:
    """What falls due in a partition, and when."""
    return _private(partition, "due")
