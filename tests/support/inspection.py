"""Helpers for the tests of `millpond explain`, `topics` and `lag`. The workers are real; the test plays the bridge."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import Any

from millpond.pipeline.explain import message as messages
from millpond.pipeline.explain import topic as topics
from millpond.pipeline.explain.results import MessageFacts, MessageState, TopicFacts
from millpond.pipeline.settings import load
from millpond.schemas import codec, keys
from millpond.schemas.errors import MillpondError
from millpond.schemas.events import DeliveriesSent, Event, Sent
from tests.support import given
from tests.support.bridge_commands import partition_of
from tests.support.workers import Pipeline, until
from tests.support.world import World

AT: dict[str, Any] = {"at": 0, "node": "n"}
RULES = (
    given.queue("queue/#", max_inflight=1, ack_timeout_s=3_600),
    given.queue("short/#", expired_time=1),
    given.queue("poison/#", ack_timeout_s=1, max_deliveries=1),
    given.pubsub("pubsub/#", max_inflight=2, ack_timeout_s=3_600),
    given.pubsub("brief/#", max_inflight=1, ack_timeout_s=1, max_deliveries=1),
    given.a_rule(
        hook="message.publish", topic="kept/#", action="on_message_publish", expired_time=3_600
    ),
    given.retain("retained/#"),
    given.receipt(topic="kept/#"),
)


async def start(pipeline: Pipeline, *agents: str) -> None:
    await asyncio.gather(*(pipeline.worker(agent) for agent in agents))


async def explain(pipeline: Pipeline, message_id: str, **options: Any) -> MessageFacts:
    settings, rules = load(pipeline.directory / "millpond.toml", {})
    return await messages.explain(settings, rules, message_id, **options)


async def topic_of(pipeline: Pipeline, topic: str, client: str | None = None) -> TopicFacts:
    settings, rules = load(pipeline.directory / "millpond.toml", {})
    return await topics.explain(settings, rules, topic, client)


async def until_state(
    pipeline: Pipeline, message_id: str, state: str, subscriber: str | None = None, **fields: Any
) -> MessageState:
    """Wait until a message is in a state, as a whole or for one subscriber."""

    async def in_state() -> MessageState | None:
        try:
            found = await explain(pipeline, message_id)
        except MillpondError:
            return None
        for each in found.states:
            if each.subscriber == subscriber and each.state == state:
                actual = {name: getattr(each, name) for name in fields}
                return each if actual == fields else None
        return None

    answer = await until(in_state, f"{message_id} to be {state} for {subscriber}")
    assert isinstance(answer, MessageState)
    return answer


async def sent(pipeline: Pipeline, topic: str, *message_ids: str, alias: str | None = None) -> None:
    """Report these copies as sent, as the bridge does, for all clients that have them."""
    wanted = set(message_ids)

    async def all_leased() -> list[Any]:
        try:
            leases = (await topic_of(pipeline, topic)).leases
        except MillpondError:
            return []  # its agent has not read it yet
        return leases if wanted <= {each.message_id for each in leases} else []

    leases = await until(all_leased, f"{message_ids} to be leased")
    agent = (await topic_of(pipeline, topic)).agent
    number = partition_of(topic)
    report = DeliveriesSent(
        **AT, agent=agent,
        sent=tuple(
            Sent(f"{agent}/{number}/{each.number}", each.client_id, each.message_id, alias)
            for each in leases if each.message_id in wanted and not each.sent
        ),
    )  # fmt: skip
    key = keys.record_key(report).encode()
    await pipeline.producer.send_and_wait(
        keys.MESSAGES_TOPIC, key=key, value=codec.encode(report), partition=number
    )


async def write(pipeline: Pipeline, *events: Event) -> None:
    await pipeline.publish(events)


def command(pipeline: Pipeline | World, *arguments: str) -> list[str]:
    """`millpond …` with the pipeline's configuration."""
    option = ["--config", str(pipeline.directory / "millpond.toml")]
    return [sys.executable, "-m", "millpond", arguments[0], *option, *arguments[1:]]


async def run(pipeline: Pipeline, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One `millpond …`, without a terminal."""

    def call() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(pipeline, *arguments), stdin=subprocess.DEVNULL, capture_output=True,
            text=True, check=False, env={**os.environ, "COLUMNS": "120"},
        )  # fmt: skip

    return await asyncio.to_thread(call)


async def refused(pipeline: Pipeline, *arguments: str) -> str:
    """The one line that a command prints on stderr before it ends with 1."""
    done = await run(pipeline, *arguments)
    assert (done.returncode, done.stdout) == (1, ""), done.stdout
    (line,) = done.stderr.splitlines()
    return line


def kinds(found: MessageFacts) -> list[str]:
    """The kinds of the events of a message, in the order of the log."""
    return [each.kind for each in found.events]
