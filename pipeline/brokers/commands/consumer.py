"""The consumer of `mqtt.deliveries`: it hands commands to a broker, and commits those that are finished."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NoReturn, Protocol

from millpond.pipeline.brokers.commands.deliveries import Deliveries
from millpond.pipeline.brokers.commands.pending import PendingCommand
from millpond.pipeline.clock import now_ms
from millpond.pipeline.kafka.consumer import GroupConsumer, RecordClaim, after_calls
from millpond.pipeline.kafka.dead_letters import DeadLetters
from millpond.pipeline.kafka.persistent_sender import PersistentSender
from millpond.pipeline.kafka.producer import Producer
from millpond.pipeline.settings import Settings
from millpond.pipeline.telemetry.histogram import SHORT_S, Histogram
from millpond.pipeline.telemetry.tracing import BridgeTracing
from millpond.schemas import codec, keys
from millpond.schemas.commands import Command, Deliver, Subscribe
from millpond.schemas.errors import DecodeError
from millpond.schemas.leases import LeaseName, parse_lease
from millpond.schemas.topics import topic_name_error

READER: Final = "bridge"  # in the headers of dead letters


class CommandHandler(Protocol):
    """The part of a broker's bridge that carries out commands."""

    async def take(self, pending: PendingCommand, command: Command) -> None:
        """Queue a command behind the earlier ones of its client.

        The handler finishes it later: it reports the result to `Deliveries`, or calls `pending.done`. Before it carries a
        command out it asks `Deliveries.drop_if_over`.
        """

    async def settle(self) -> None:
        """Wait until no command is under way. Those that only wait were revoked."""

    def filter_refusal(self, topic_filter: str) -> str | None:
        """Explain why this broker cannot serve a filter, and so subscribes no client to it. None if it can."""


class CommandConsumer:
    """One per bridge. Commands finish in any order; the group consumer commits up to the first unfinished one."""

    def __init__(
        self,
        settings: Settings,
        broker: CommandHandler,
        deliveries: Deliveries,
        producer: Producer,
        tracing: BridgeTracing | None = None,
    ) -> None:
        self._tracing = tracing
        self._broker, self._deliveries = broker, deliveries
        self._sender = PersistentSender(producer)
        self.dead_letters = DeadLetters(self._sender, READER, keys.DELIVERIES_TOPIC)
        self._settings = settings
        group_id = keys.bridge_group_id(settings.app)
        self._source = GroupConsumer(
            settings,
            group_id,
            [settings.kafka.topic_name(keys.DELIVERIES_TOPIC)],
            self._carry_out,
            self._settle,
        )
        # Commands read, by type; "unreadable" for dead letters
        self.taken: Counter[str] = Counter()
        self.seconds = Histogram(SHORT_S)  # from a command's log time until it is finished

    @property
    def unfinished(self) -> int:
        """The number of commands that were read and whose results are not stored yet."""
        return self._source.unfinished

    async def run(self) -> NoReturn:
        """Connect, and carry out commands until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._source.run())
            tasks.create_task(self._sender.run())
        raise AssertionError("the tasks run until they are cancelled")

    # -- commands

    async def _settle(self) -> None:
        await self._broker.settle()
        await self._deliveries.reports.settle()

    async def _carry_out(self, record: Any, claim: RecordClaim) -> None:
        done: Callable[[], None] = partial(self._finish, claim, record.timestamp)
        try:
            command = codec.decode_command(record.value)
            done = self._traced(record, command, done)
            pending = self._pending(command, record.timestamp, done, claim)
        except DecodeError as error:
            # Only agents write commands. So a newer agent wrote this record, or a foreign producer did.
            await self.dead_letters.send(record, "unreadable", str(error), done)
            self.taken["unreadable"] += 1
            return
        self.taken[str(command.__struct_config__.tag)] += 1
        if self._deliveries.drop_if_over(pending):
            return
        if isinstance(command, Deliver) and topic_name_error(command.topic) is not None:
            self._deliveries.fail(pending, "bridge")
            return
        reason = self._refusal(command)
        if reason is not None:
            # The command is finished when the rest of it is, and the log has the dead letter.
            done = after_calls(2, pending.done)
            pending = pending._replace(done=done)
            await self.dead_letters.send(record, "not_served", reason, done)
        await self._broker.take(pending, command)

    def _refusal(self, command: Command) -> str | None:
        """Return the reason why some filters of a command cannot be served. None if all can."""
        if not isinstance(command, Subscribe):
            return None
        refusals = [(name, self._broker.filter_refusal(name)) for name, _ in command.topic_filters]
        refused = [f"{name!r} ({reason})" for name, reason in refusals if reason is not None]
        if not refused:
            return None
        return f"{command.client_id!r} cannot be subscribed to {', '.join(refused)}"

    def _traced(
        self, record: Any, command: Command, done: Callable[[], None]
    ) -> Callable[[], None]:
        """Wrap `done` so that it also ends the command's span, if the command belongs to a trace."""
        if self._tracing is None:
            return done
        span = self._tracing.deliver(record.headers, command)
        if span is None:
            return done

        def finish() -> None:
            span.end()
            done()

        return finish

    def _finish(self, claim: RecordClaim, log_ms: int) -> None:
        self.seconds.add(max(now_ms() - log_ms, 0) / 1000)
        claim.finish()

    def _pending(
        self, command: Command, log_ms: int, done: Callable[[], None], claim: RecordClaim
    ) -> PendingCommand:
        """Make the unfinished command.

        Raises:
            DecodeError: the lease name is invalid, or names a partition that does not exist.
        """
        valid_until_ms = log_ms + command.valid_for_s * 1000
        if not isinstance(command, Deliver):
            return PendingCommand(
                command.client_id, None, 0, "", valid_until_ms, done, claim.is_revoked
            )
        for end_ms in (command.valid_until, command.expires_at):
            if end_ms is not None:
                valid_until_ms = min(valid_until_ms, end_ms)
        return PendingCommand(
            command.client_id, self._lease(command.lease), command.epoch, command.message_id,
            valid_until_ms, done, claim.is_revoked,
        )  # fmt: skip

    def _lease(self, name: str) -> LeaseName | None:
        if not name:
            return None
        lease = parse_lease(name)
        if lease.partition >= self._settings.kafka.partitions:
            raise DecodeError(
                f"the lease {name!r} names a partition that does not exist:"
                f" [kafka] partitions is {self._settings.kafka.partitions}"
            )
        return lease
