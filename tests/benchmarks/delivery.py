"""The rows of the delivery agents."""

from __future__ import annotations

from functools import partial
from typing import Final

from millpond.schemas.events import AgentName
from tests.benchmarks import gaps, limit, pubsubs, queue_backlog, queue_latency, queues
from tests.benchmarks.latency import Latency
from tests.benchmarks.neighbours import undisturbed
from tests.benchmarks.table import Row, least_row, most_row, progress, ratio_row, thousands

MESSAGES: Final = 200_000
LEAST: Final = 15_000  # messages, or deliveries with their acks, per second of one worker
SUBSCRIBERS: Final = (1, 10, 100)
FEW, MANY = 100, 100_000  # idle subscribers
EVENTS_BESIDE_IDLE: Final = 200_000
SHORT, LONG = 1_000, 1_000_000  # messages of a backlog
GAPS: Final = (1_000, 10_000)  # messages that are acknowledged ahead of a held one
MESSAGES_BEHIND_A_GAP: Final = 30_000


def queue_rows(rounds: int) -> list[Row]:
    """Whole lives of messages, and the same commands through redis-benchmark."""
    limit.program()
    ours, theirs = [], []
    for number in range(1, rounds + 1):
        lives, others = undisturbed(partial(queues.run, MESSAGES), _tell_lives)
        ours.append(lives.rate)
        rate, _ = undisturbed(partial(queues.redis_limit, MESSAGES), _tell)
        theirs.append(rate)
        progress(f"round {number}: others used {others:.1f} cores")
    what = "queue: publish, store, command, sent, ack, delete"
    return [
        least_row(f"{what}, one worker", ours, LEAST),
        ratio_row(f"{what} : redis-benchmark", ours, theirs, None),
    ]


def latency_rows(seconds: float) -> list[Row]:
    """From a publish event to its command."""
    found, _ = undisturbed(partial(queue_latency.run, seconds), _tell_latency)
    what = f"queue: publish event to command, {queue_latency.RATE}/s"
    of = f"of {found.messages:,} messages"
    return [
        most_row(f"{what}, p50", of, found.p50, 10, "ms"),
        most_row(f"{what}, p99", of, found.p99, 40, "ms"),
    ]


def backlog_rows() -> list[Row]:
    """A consumer comes to a million messages."""
    short, long = queue_backlog.run(SHORT), queue_backlog.run(LONG)
    progress(f"backlog: {short} {long}")
    what = f"queue: {LONG:,} messages wait"
    figures = f"{long.rss:.0f} MiB : {short.rss:.0f} MiB"
    return [
        most_row(f"{what}, join to first command", "", long.seconds, 1, "s"),
        most_row(f"{what} : {SHORT:,}, RSS", figures, long.rss / short.rss, 1.2, "x"),
    ]


def pubsub_rows(rounds: int) -> list[Row]:
    """Deliveries with their acks."""
    rows = []
    for subscribers in SUBSCRIBERS:
        rates = []
        for _ in range(rounds):
            rate, _ = undisturbed(partial(pubsubs.run, MESSAGES, subscribers), _tell)
            rates.append(rate)
        what = f"pubsub: delivery and ack, {subscribers} subscriber{'s'[: subscribers > 1]} a topic"
        rows.append(least_row(what, rates, LEAST))
    return rows


def gap_rows() -> list[Row]:
    """What an event costs behind messages that were acknowledged ahead of a held one."""
    rows = []
    agents: tuple[AgentName, ...] = ("queue", "pubsub")
    for agent in agents:
        none = gaps.cost(agent, 0, MESSAGES_BEHIND_A_GAP)
        for gap in GAPS:
            found = gaps.cost(agent, gap, MESSAGES_BEHIND_A_GAP)
            progress(f"{agent}: {found:.1f} µs with a gap of {gap:,}, {none:.1f} µs without")
            what = f"{agent}: {gap:,} acknowledged ahead of a held message : 0, cost of an event"
            figures = f"{found:.0f} µs : {none:.0f} µs"
            rows.append(most_row(what, figures, found / none, 1.2, "x"))
    return rows


def idle_rows() -> list[Row]:
    """What subscribers cost that have nothing to do: those that are away, and those that are online."""
    rows = []
    for kind, topics, online in (
        (f"{MANY:,} away from one topic : {FEW}", 1, False),
        (f"{MANY:,} topics with one away each : {FEW}", 0, False),
        (f"{MANY:,} online at one topic : {FEW}", 1, True),
        (f"{MANY:,} topics with one online each : {FEW}", 0, True),
    ):
        few = pubsubs.idle(FEW, topics or FEW, EVENTS_BESIDE_IDLE, online=online)
        many = pubsubs.idle(MANY, topics or MANY, EVENTS_BESIDE_IDLE, online=online)
        progress(f"{kind}: {few} {many}")
        costs = f"{many.cost:.0f} µs : {few.cost:.0f} µs"
        memory = f"{many.rss:.0f} MiB : {few.rss:.0f} MiB"
        rows.append(
            most_row(f"pubsub: {kind}, cost of an event", costs, many.cost / few.cost, 1.5, "x")
        )
        rows.append(most_row(f"pubsub: {kind}, RSS", memory, many.rss / few.rss, 1.5, "x"))
    return rows


def _tell(rate: float, others: float) -> None:
    progress(f"{thousands(rate)}; others used {others:.1f} cores")


def _tell_lives(lives: queues.Lives, others: float) -> None:
    figures = f"{lives.commands:.1f} commands and {lives.redis_us:.1f} µs of Redis each"
    progress(f"queue: {thousands(lives.rate)}, {figures}; others used {others:.1f} cores")


def _tell_latency(found: Latency, others: float) -> None:
    figures = f"p50 {found.p50:.1f} ms, p99 {found.p99:.1f} ms"
    progress(f"queue latency: {figures}; others used {others:.1f} cores")
