"""`make bench`: one table from one run, as ratios. Progress goes to stderr, the table to stdout."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

from redis import Redis

from millpond.schemas import codec, keys
from tests.benchmarks import (
    clients,
    delivery,
    exhook,
    latency,
    limit,
    memory,
    race,
    replays,
    rule_events,
    scene,
    spool,
    venvs,
)
from tests.benchmarks.clients import SESSIONS
from tests.benchmarks.events import PARTITIONS, TOPICS, event, fill, publishes
from tests.benchmarks.latency import Latency
from tests.benchmarks.neighbours import CORES_MAX, TRIES_MAX, undisturbed
from tests.benchmarks.race import (
    FASTSTREAM,
    FAUST,
    MILLPOND,
    QUIXSTREAMS,
    SCRIPTS,
    TWO,
    Contestant,
    Result,
)
from tests.benchmarks.table import Row, least_row, most_row, progress, ratio_row, show, thousands

LIMIT, LATENCY, MEMORY, PRESENCE, REGISTRY = "limit", "latency", "memory", "presence", "registry"
RULES = "rule-events"
SPOOL = "spool"
QUEUE, HAND_OUT, BACKLOG, PUBSUB, IDLE = "queue", "queue-latency", "backlog", "pubsub", "idle"
GAP: Final = "gap"
REPLAY: Final = "replay"
HOOKS, HOOK_LATENCY = "hooks", "hook-latency"
RACERS: Final = (*SCRIPTS, TWO)
PARTS: Final = (
    LIMIT, *(each.name for each in RACERS), LATENCY, MEMORY, PRESENCE, REGISTRY,
    RULES, QUEUE, HAND_OUT, BACKLOG, PUBSUB, GAP, IDLE, SPOOL, HOOKS, HOOK_LATENCY, REPLAY,
)  # fmt: skip


def main() -> None:
    """Measure what is asked for, and show it."""
    arguments = _arguments()
    logging.disable()  # of clients that ask whether a server is up yet
    asked: list[str] = arguments.only or list(PARTS)
    rows: list[Row] = []
    notes: list[str] = []
    races = [each for each in RACERS if each.name in asked]
    if LIMIT in asked:
        limit.program()
    for each in races:
        if each in SCRIPTS:
            venvs.python(SCRIPTS[each][0])
    if races or LIMIT in asked:
        rates, disturbances = _races(races, LIMIT in asked, arguments.rounds, arguments.events)
        rows += _race_rows(rates)
        notes += _race_notes(arguments.events, arguments.rounds, disturbances)
    if LATENCY in asked:
        rows += _latency_rows(arguments.seconds)
    if MEMORY in asked:
        rows += _memory_rows(arguments.memory_events)
    if PRESENCE in asked:
        rows += _presence_rows(arguments.rounds)
    if REGISTRY in asked:
        rows += _registry_rows()
    if RULES in asked:
        rate = thousands(median(rule_events.rate() for _ in range(arguments.rounds)))
        rows.append(Row("EMQX's rule events made canonical by one bridge", "", rate, "", None))
    rows += _delivery_rows(asked, arguments)
    if SPOOL in asked:
        rows += _spool_rows(arguments.spool_events)
    if REPLAY in asked:
        rows += replays.rows()
    show(rows, notes)


def _delivery_rows(asked: Sequence[str], arguments: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    if QUEUE in asked:
        rows += delivery.queue_rows(arguments.rounds)
    if HAND_OUT in asked:
        rows += delivery.latency_rows(arguments.seconds)
    if BACKLOG in asked:
        rows += delivery.backlog_rows()
    if PUBSUB in asked:
        rows += delivery.pubsub_rows(arguments.rounds)
    if GAP in asked:
        rows += delivery.gap_rows()
    if IDLE in asked:
        rows += delivery.idle_rows()
    if HOOKS in asked:
        rows += exhook.rate_rows(arguments.rounds)
    if HOOK_LATENCY in asked:
        rows += exhook.latency_rows(arguments.seconds)
    return rows


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all races")
    parser.add_argument("--events", type=int, default=300_000, help="events of a race")
    parser.add_argument("--seconds", type=float, default=30, help="how long latency is measured")
    parser.add_argument("--memory-events", type=int, default=10_000_000)
    parser.add_argument("--spool-events", type=int, default=1_000_000)
    parser.add_argument("--only", action="append", choices=PARTS, help="may be repeated")
    return parser.parse_args()


def _races(
    races: Sequence[Contestant], with_limit: bool, rounds: int, events: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Rates by name, one for each round, within which everybody runs once, our worker first; cores that others used."""
    rates: dict[str, list[float]] = defaultdict(list)
    disturbances: list[float] = []
    with (
        tempfile.TemporaryDirectory() as name,
        scene.kafka(Path(name) / "kafka") as settings,
    ):
        # More than one worker or peer stores: nobody's last batch waits to fill.
        waiting = int(events * TWO.share)
        progress(f"writing {waiting:,} events into Kafka")
        asyncio.run(fill(settings.bootstrap_servers[0], keys.MESSAGES_TOPIC, publishes(waiting)))
        for number in range(1, rounds + 1):
            for contestant in (MILLPOND, *races):
                race_of = partial(race.run, contestant, settings, events)
                result, others = undisturbed(race_of, partial(_tell_race, number, contestant))
                rates[contestant.name].append(result.rate)
                disturbances.append(others)
                if contestant is MILLPOND and with_limit:
                    entries = max(1, round(events / result.zadds))
                    limit_of = partial(limit.run, events, entries)
                    rate, others = undisturbed(limit_of, partial(_tell_limit, number, entries))
                    rates[LIMIT].append(rate)
                    disturbances.append(others)
    return rates, disturbances


def _tell_race(number: int, contestant: Contestant, result: Result, others: float) -> None:
    _tell(f"round {number}: {contestant.title}", result.rate, others)


def _tell_limit(number: int, entries: int, rate: float, others: float) -> None:
    _tell(f"round {number}: redis-benchmark, {entries} a ZADD", rate, others)


def _tell(what: str, rate: float, others: float) -> None:
    progress(f"{what}: {thousands(rate)}; others used {others:.1f} cores")


def _race_rows(rates: dict[str, list[float]]) -> list[Row]:
    ours = rates[MILLPOND.name]
    rows = []
    if LIMIT in rates:
        what = "one worker : the same commands through redis-benchmark"
        rows.append(ratio_row(what, ours, rates[LIMIT], 0.5))
    for peer in SCRIPTS:
        if peer.name in rates:
            least = 8 if peer is FAUST else None
            rows.append(ratio_row(f"one worker : {peer.title}", ours, rates[peer.name], least))
    batching = [rates[peer.name] for peer in (QUIXSTREAMS, FASTSTREAM) if peer.name in rates]
    if batching:
        better = max(batching, key=median)
        rows.append(
            ratio_row("one worker : the better of quixstreams and faststream", ours, better, 2.5)
        )
    if TWO.name in rates:
        rows.append(ratio_row("two workers : one", rates[TWO.name], ours, None))
    return rows


def _latency_rows(seconds: float) -> list[Row]:
    progress(f"latency: {latency.RATE} messages/s for {seconds:.0f} s")
    found, _ = undisturbed(partial(latency.run, seconds), _tell_latency)
    what = f"MQTT publish to stored, {latency.RATE}/s"
    of = f"of {found.messages:,} messages"
    return [
        most_row(f"{what}, p50", of, found.p50, 15, "ms"),
        most_row(f"{what}, p99", of, found.p99, 60, "ms"),
    ]


def _tell_latency(found: Latency, others: float) -> None:
    figures = f"p50 {found.p50:.1f} ms, p99 {found.p99:.1f} ms"
    progress(f"latency: {figures}; others used {others:.1f} cores")


def _memory_rows(events: int) -> list[Row]:
    first = events // 10
    what = f"RSS after {events / 1e6:g} million events : after {first / 1e6:g}"
    reason = memory.room(Path(tempfile.gettempdir()), events)
    if reason is not None:
        return [Row(what, reason, "not run", "at most 1.2 x", met=False)]
    found = memory.run(first, events)
    progress(f"memory: {found.first:.0f}, {found.last:.0f} MiB; {thousands(found.rate)}")
    figures = f"{found.last:.0f} MiB : {found.first:.0f} MiB"
    return [most_row(what, figures, found.last / found.first, 1.2, "x")]


def _spool_rows(events: int) -> list[Row]:
    what = f"bridge, {events / 1e6:g} million events in an outage"
    reason = spool.room(Path(tempfile.gettempdir()), events)
    if reason is not None:
        return [Row(what, reason, "not run", "at most 1.2 x", met=False)]
    found = spool.run(events)
    figures = f"{found.rss_most:.0f} MiB : {found.rss_first:.0f} MiB"
    return [
        least_row("bridge, events straight into Kafka", [found.direct], 3_000),
        least_row(f"{what}, into the spool", [found.spooled], 3_000),
        least_row(f"{what}, out of it into Kafka", [found.drained], 3_000),
        most_row(
            f"{what}, RSS at most : after a tenth",
            figures,
            found.rss_most / found.rss_first,
            1.2,
            "x",
        ),
    ]


def _presence_rows(rounds: int) -> list[Row]:
    """Connects and disconnects, and the same commands through redis-benchmark."""
    limit.program()
    ours, theirs = [], []
    for number in range(1, rounds + 1):
        rate, others = undisturbed(clients.presence, partial(_tell, f"round {number}: presence"))
        ours.append(rate)
        progress(f"others used {others:.1f} cores")
        theirs.append(undisturbed(clients.presence_limit, partial(_tell, "redis-benchmark"))[0])
    what = "clients that connect and disconnect : redis-benchmark"
    return [ratio_row(what, ours, theirs, None)]


def _registry_rows() -> list[Row]:
    found = clients.registry()
    what = f"RSS with {SESSIONS:,} sessions : {SESSIONS // 10:,}"
    figures = f"{found.last:.0f} MiB : {found.first:.0f} MiB"
    per_session = f"{found.redis_bytes:.0f} bytes"
    return [
        most_row(what, figures, found.last / found.first, 1.2, "x"),
        Row(f"Redis, for each of {SESSIONS:,} sessions", "", per_session, "", None),
    ]


def _race_notes(events: int, rounds: int, disturbances: Sequence[float]) -> list[str]:
    record = len(codec.encode(event(0)))
    with tempfile.TemporaryDirectory() as name, scene.redis(Path(name) / "redis") as client:
        server = _server_version(client)
    return [
        "",
        (
            f"Rates: {events:,} messages over {TOPICS:,} topics, waiting in {PARTITIONS} partitions of Kafka "
            f"({record} bytes each as canonical JSON), stored as a hash of seven fields and an index entry; "
            f"from {race.START_SHARE:.0%} to all of them stored. "
            f"Faust stores {FAUST.share:g} of the events, two workers {TWO.share:g} times as many."
        ),
        (
            f"Ratios: medians of {rounds} rounds (lowest–highest). Within a round everybody runs once, into a Redis "
            f"of its own, up to {TRIES_MAX} times if others used more than {CORES_MAX} of {os.cpu_count()} cores: "
            f"the least disturbed counts. Others used {median(disturbances):.1f} cores, at worst {max(disturbances):.1f}."
        ),
        (
            f"redis-benchmark: {limit.CLIENTS} clients, {limit.PIPELINE} commands a pipeline; the time of all HSET "
            "plus that of all ZADD, with as many entries each as the worker's had. No MULTI, fence, Kafka or JSON."
        ),
        (
            f"Redis: {server}, append-only file fsynced every second. "
            f"Peers: redis-py {venvs.version('faust', 'redis')}, one pipeline a batch."
        ),
    ]


def _server_version(client: Redis) -> str:
    info = client.info("server")
    name = info.get("server_name", "redis")
    return f"{name} {info.get(f'{name}_version', info['redis_version'])}"


if __name__ == "__main__":
    main()
