"""Where a message is: in Kafka, in Redis, and for each subscriber of its topic.

1. Find the topic: from the caller, else from the message's body or dead letter in Redis.
2. Read what Redis has of the message, and search the log for records about it. The topic gives the one partition to
   search. Without a topic all partitions are searched.
3. If the id is one that the broker gave to a copy, start again with the id of the message.
4. Read Redis once more. A record that the search found is then either applied, or after the applied offset.
5. Compute the states from both (`message_states.py`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from msgspec import Struct, structs

from millpond.agents.delivery.dead_messages import DeadMessage
from millpond.agents.delivery.dead_messages import unpack as unpack_dead
from millpond.agents.ports import Applied
from millpond.agents.pubsub.state import TopicLog, unpack_log
from millpond.agents.queue.state import QueueWindow
from millpond.agents.queue.state import unpack as unpack_queue
from millpond.agents.reads import ReadBody, ReadEntry, ReadStates
from millpond.agents.topics import storage
from millpond.agents.topics.plans import TopicPlans, make_plan
from millpond.pipeline.clock import now_ms
from millpond.pipeline.explain import log_search, message_states, sentences
from millpond.pipeline.explain.agent_states import (
    OWNERS,
    clients_by_subscriber,
    members_of,
    subscribers_of,
)
from millpond.pipeline.explain.log_search import Progress, SearchResult, WantedMessage
from millpond.pipeline.explain.message_states import Known
from millpond.pipeline.explain.results import (
    MessageFacts,
    MessageState,
    StoredMessageFacts,
)
from millpond.pipeline.kafka.log_reader import LogReader, Searched
from millpond.pipeline.kafka.partitioning import partition_of
from millpond.pipeline.operate.dead_letters import AGENTS as DELIVERY_AGENTS
from millpond.pipeline.operate.dead_letters import is_utf8, stored_message
from millpond.pipeline.settings import Settings
from millpond.pipeline.stores.redis.inspection import (
    CountBefore,
    ReadFence,
    ReadLifetime,
    ReadReceipt,
    ReadRules,
)
from millpond.pipeline.stores.redis.reader import StoreReader
from millpond.schemas.errors import ConfigError, MillpondError
from millpond.schemas.events import AgentName
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules
from millpond.schemas.rules.pool import Pool
from millpond.schemas.topics import topic_name_error

RECORDS_MAX: Final = 1_000_000  # records to search, without --search: takes some ten seconds


async def explain(
    settings: Settings,
    rules: Rules,
    message_id: str,
    *,
    topic: str | None = None,
    client: str | None = None,
    records_max: int = RECORDS_MAX,
    progress: Progress = lambda done, total: None,
) -> MessageFacts:
    """Read all that is known of a message. `client` selects one subscriber. Without `topic`, Redis or Kafka gives it.

    Raises:
        ConfigError: the topic name is invalid.
        MillpondError: no such message is known, or it is of another topic, or Kafka cannot be reached.
        StoreDown, StoreRefused: Redis does not answer, or refuses.
    """
    if not is_utf8("".join(filter(None, (message_id, topic, client)))):
        raise MillpondError(
            f"{message_id!r}, or its --topic or --client, is no UTF-8: nothing has such a name"
        )
    invalid = None if topic is None else topic_name_error(topic)
    if invalid is not None:
        raise ConfigError(f"{topic!r}: {invalid}")
    notes: list[str] = []
    where = topic or await _topic_in_stores(settings, rules, message_id)
    if where is None:
        notes.append("Redis does not have it: its topic was searched for in the log")
    async with LogReader(settings.kafka) as log:
        view = None if where is None else await _read_store(settings, rules, message_id, where)
        if view is not None and view.other_topic is not None:
            raise MillpondError(
                f"{message_id!r} is a message of topic {view.other_topic!r}, not of {where!r}"
            )
        numbers = range(settings.kafka.partitions)
        if where is not None:
            numbers = range((at := partition_of(where, settings.kafka.partitions)), at + 1)
        wanted = WantedMessage(message_id, where, () if view is None else view.aliases)
        since = None if view is None or view.score is None else view.score // 1000
        found = await log_search.search(log, wanted, numbers, since, records_max, progress)
    if wanted.copy_of not in (None, message_id):
        assert wanted.copy_of is not None, "it is not in the tuple above"
        facts = await explain(
            settings, rules, wanted.copy_of,
            topic=topic, client=client, records_max=records_max, progress=progress,
        )  # fmt: skip
        note = f"{message_id!r} is the id that the broker gave to a copy of it"
        return structs.replace(facts, notes=[note, *facts.notes])
    where = where or next((each.topic for each in found.events if each.topic is not None), None)
    if where is None:
        raise _unknown(message_id, topic, found)
    # The agent went on while the log was searched. This read is later than all records that were found.
    view = await _read_store(settings, rules, message_id, where)
    if not found.events and view.blank():
        raise _unknown(message_id, topic, found)
    return await _facts(rules, view, found, client, notes)


def _unknown(message_id: str, topic: str | None, found: SearchResult) -> MillpondError:
    searched: dict[str, list[Searched]] = {}
    for each in found.searched:
        searched.setdefault(each.kafka_topic, []).append(each)
    places = [
        sentences.searched(parts[0]) if len(parts) == 1 else _all_of(kafka_topic, parts)
        for kafka_topic, parts in searched.items()
    ]
    more = "" if all(each.whole for each in found.searched) else "; --search N searches more"
    of = "" if topic is None else f" of topic {topic!r}"
    return MillpondError(
        f"no message {message_id!r}{of} is known: neither in Redis, nor in {', nor in '.join(places)}{more}"
    )


def _all_of(kafka_topic: str, parts: Sequence[Searched]) -> str:
    searched = sum(each.stop - each.first for each in parts)
    total = sum(each.end - each.start for each in parts)
    newest = f"the newest {searched} of {total} records"
    which = f"the {total} records" if searched == total else newest
    return f"{which} in the {len(parts)} partitions of {kafka_topic}"


# -- Redis -------------------------------------------------------------------------------------------------------------


class _StoreView(Struct, frozen=True, kw_only=True):
    """What Redis has of a message of a topic, and its agent's state, from one round trip.

    `rules` are the rules in force in the partition. `before` counts the index entries before the message. `window` is
    read for a queue, `log` for a pubsub topic. `foreign` has a sentence for each public key of another type.
    """

    message_id: str
    topic: str
    agent: AgentName
    partition: Partition
    applied: Applied | None
    rules: Rules
    score: int | None
    before: int | None
    body: dict[str, bytes]
    body_lifetime: int | None
    receipts: dict[str, int]
    retained: storage.RetainedState | None
    dead: DeadMessage | None
    window: QueueWindow | None
    log: TopicLog | None
    foreign: list[str]

    def blank(self) -> bool:
        """True if Redis has nothing of the message."""
        lease = self.window is not None and self.message_id in self.window.leases
        stored = stored_message(self.message_id, self.body) is not None
        return self.score is None and not (
            stored or self.is_retained or lease or self.receipts or self.dead
        )

    @property
    def is_retained(self) -> bool:
        """True if it is the retained message of its topic."""
        return self.retained is not None and self.retained.message_id == self.message_id

    @property
    def other_topic(self) -> str | None:
        """The topic in its body, if it is not `topic`."""
        if stored_message(self.message_id, self.body) is None:
            return None
        named = self.body.get("topic", b"").decode("utf-8", "replace")
        return None if named == self.topic else named

    @property
    def aliases(self) -> list[str]:
        """The ids that the broker gave to copies of a message that is queued or dead."""
        known = {} if self.window is None else self.window.aliases
        dead = () if self.dead is None else self.dead.holders
        return [
            *(alias for alias, own in known.items() if own == self.message_id),
            *(alias for _, alias, _ in dead if alias is not None),
        ]


async def _topic_in_stores(settings: Settings, rules: Rules, message_id: str) -> str | None:
    """Find the topic of a message that has a body or is a dead letter."""
    asked: dict[Pool, None] = {}  # agents may share a pool, and bodies belong to no partition
    for agent in OWNERS:
        pool = rules.pool(agent)
        async with StoreReader(pool) as reader:
            if pool not in asked:
                asked[pool] = None
                partition = Partition(settings.app, agent, 0)
                (body,) = await reader.read(partition, [ReadBody(message_id)])
                if stored_message(message_id, body) is not None and "topic" in body:
                    return str(body["topic"].decode("utf-8", "replace"))
            if agent not in DELIVERY_AGENTS:
                continue
            for number in range(settings.kafka.partitions):
                partition = Partition(settings.app, agent, number)
                (found,) = await reader.read(partition, [ReadStates((message_id,), "dead")])
                dead = unpack_dead(found[message_id])
                if dead is not None:
                    return dead.topic
    return None


async def _read_store(settings: Settings, rules: Rules, message_id: str, topic: str) -> _StoreView:
    agent = rules.owner(topic)
    number = partition_of(topic, settings.kafka.partitions)
    partition = Partition(settings.app, agent, number)
    reads: list[Any] = [
        ReadFence(),
        ReadRules(),
        ReadEntry(topic, message_id),
        CountBefore(topic, message_id),
        ReadBody(message_id),
        ReadLifetime(message_id),
        ReadReceipt(message_id),
        ReadStates((topic,)),
        ReadStates((message_id,), "dead"),
        ReadStates((topic,), "windows"),
        ReadStates((topic,), "logs"),
    ]
    async with StoreReader(rules.pool(agent)) as reader:
        (
            applied, in_force, score, before, body, lifetime, receipts, kept, dead, windows, logs,
        ) = await reader.read(partition, reads)  # fmt: skip
        foreign = list(reader.foreign_keys.values())
    return _StoreView(
        foreign=foreign,
        message_id=message_id,
        topic=topic,
        agent=agent,
        partition=partition,
        applied=applied,
        rules=rules if in_force is None else Rules.from_canonical(in_force),
        score=score,
        before=before,
        body=body,
        body_lifetime=lifetime,
        receipts=receipts,
        retained=storage.unpack(kept[topic]),
        dead=unpack_dead(dead[message_id]),
        window=unpack_queue(windows[topic]) if agent == "queue" else None,
        log=unpack_log(logs[topic]) if agent == "pubsub" else None,
    )


# -- the answer --------------------------------------------------------------------------------------------------------


async def _facts(
    rules: Rules,
    view: _StoreView,
    found: SearchResult,
    client: str | None,
    notes: list[str],
) -> MessageFacts:
    plan, now = make_plan(view.rules, view.topic), now_ms()
    retained = view.retained if view.is_retained else None
    known = Known(
        message_id=view.message_id,
        plan=plan,
        score=view.score,
        applied=-1 if view.applied is None else view.applied.offset,
        now_ms=now,
        events=found.events,
        dead=view.dead if view.dead is not None and view.dead.topic == view.topic else None,
        retained=view.is_retained,
        before=view.before,
    )
    if view.rules.owner(view.topic) != view.agent:
        notes.append(
            f"this configuration gives its topic to {view.agent}, but the rules in force in {view.partition} do not"
        )
    notes += view.foreign
    if view.applied is None:
        notes.append(f"Redis has no state of {view.partition}: the agent has not run there")
    notes += [
        f"only a part of the log was searched ({sentences.searched(each)}): --search N searches more"
        for each in found.searched
        if not each.whole and (found.published is None or each.stop < each.end)
    ]
    message = stored_message(view.message_id, view.body)
    lifetime = view.body_lifetime
    return MessageFacts(
        message_id=view.message_id,
        topic=view.topic,
        agent=view.agent,
        partition=view.partition.number,
        applied=None if view.applied is None else view.applied.offset,
        states=[
            structs.replace(state, words=sentences.in_words(state, now))
            async for state in _states(rules, view, known, client)
        ],
        stored=StoredMessageFacts(
            message=message,
            body_expires_at=None if message is None or lifetime is None else now + lifetime,
            index_score=view.score,
            expires_at=None if view.score is None else _index_end(view.score, plan, message),
            retained=view.is_retained,
            retained_until=None if retained is None else retained.expires_at,
            receipts=view.receipts,
        ),
        events=found.events,
        searched=found.searched,
        notes=notes,
    )


def _index_end(score: int, plan: Any, message: Any) -> int | None:
    own = None if message is None else message.expires_at
    return storage.earliest(score // 1000, plan.index_lifetime_ms, own)


async def _states(
    rules: Rules, view: _StoreView, known: Known, client: str | None
) -> AsyncIterator[MessageState]:
    """The state of the message as a whole, then that for each subscriber of a pubsub topic."""
    if view.agent == "messages":
        yield message_states.of_message(known)
        return
    async with StoreReader(rules.pool(view.agent)) as reader:
        members = [
            each
            async for _, each in members_of(
                reader, view.partition, [view.topic], TopicPlans(view.rules)
            )
        ]
        if view.window is not None:
            names = {each.reach.name for each in members}
            yield message_states.of_queue(known, view.window, len(names))
            return
        assert view.log is not None, "it is read for pubsub, the other delivery agent"
        yield message_states.of_log(known, view.log)
        online = clients_by_subscriber(members)
        dead_for = () if view.dead is None else view.dead.subscribers
        async for views in subscribers_of(
            reader, view.partition, view.topic, online, client, dead_for
        ):
            for each in views:
                state = message_states.of_pubsub(known, view.topic, view.log, each)
                if state is not None:
                    yield state
