"""The processes of a stack: which they are, their order, and how each shows that it is ready.

They start one after the other, each when the one before it is ready: Kafka, Redis, the bridge, the workers, the web
page. Kafka and Redis are ready when they answer a request. Our own processes touch a file. A Kafka or a Redis of the
user's is neither started nor stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from msgspec import Struct
from redis.asyncio import Redis
from redis.exceptions import RedisError

from millpond.agents.registry import AGENT_NAMES
from millpond.pipeline.kafka import topics
from millpond.pipeline.process.child import MILLPOND
from millpond.pipeline.process.readiness import READY_FILE
from millpond.pipeline.process.signals import asked_to_end
from millpond.pipeline.settings import (
    ENVIRONMENT_PREFIX,
    BridgeSettings,
    KafkaSettings,
    Settings,
    load,
)
from millpond.pipeline.stack.directory import ChildState, DataDirectory, StackState
from millpond.pipeline.stack.kafka import KafkaServer
from millpond.pipeline.stack.ports import HOST, claim, free_port
from millpond.pipeline.stack.processes import identify
from millpond.pipeline.stack.redis import redis_command
from millpond.pipeline.stack.supervisor import STOP_TIMEOUT_S, Child, Supervisor
from millpond.schemas.errors import ConfigError
from millpond.schemas.rules import default_rules

EMBEDDED = "embedded"
LISTEN = f"{ENVIRONMENT_PREFIX}TELEMETRY_LISTEN"  # the variable of the setting telemetry.listen


class Options(Struct, frozen=True, kw_only=True):
    """The options of `millpond up`. None takes the value from the settings."""

    config: Path | None = None
    kafka: str | None = None  # HOST:PORT of the user's Kafka
    redis: str | None = None  # a URL, or EMBEDDED
    mqtt_port: int | None = None
    websocket_port: int | None = None
    kafka_port: int | None = None
    redis_port: int | None = None
    web_port: int | None = None


class Stack:
    """One run of `millpond up`."""

    def __init__(
        self, directory: DataDirectory, options: Options, say: Callable[[str], None]
    ) -> None:
        """Claim the ports. `run` starts the processes. `say` prints a line.

        Raises:
            ConfigError: a setting is wrong, a port is in use, or a stack already runs here.
        """
        self._directory, self._say = directory, say
        before = directory.read_state()
        if before is not None and before.supervisor.running() is not None:
            raise ConfigError(
                f"a stack already runs in {directory.root}: `millpond status`, `millpond down`,"
                " or another --data"
            )
        if before is not None:
            stop_children(before)  # their supervisor was killed, and they still have our ports
        settings, rules = load(options.config, warn=lambda line: say(f"warning: {line}"))
        self._own_kafka = options.kafka is None and _same_kafka(settings.kafka, KafkaSettings())
        self._own_redis = options.redis == EMBEDDED or (
            options.redis is None and settings.redis is None and rules == default_rules()
        )
        self.settings = self._resolve(settings, options)
        self.supervisor = Supervisor(say, self._write_state)
        self._ready = False
        self._process = identify(os.getpid())

    def _resolve(self, settings: Settings, options: Options) -> Settings:
        """The settings of all processes: with the options, claimed ports and addresses filled in."""
        stack = settings.stack

        def port(asked: int | None, configured: int, option: str) -> int:
            return claim(configured if asked is None else asked, option)

        replace = msgspec.structs.replace
        kafka, redis, bridge = settings.kafka, settings.redis, settings.bridge
        if bridge.kind == "embedded":
            mqtt_port = port(options.mqtt_port, stack.mqtt_port, "--mqtt-port")
            websocket_port = port(options.websocket_port, stack.websocket_port, "--websocket-port")
            bridge = replace(bridge, host=HOST, mqtt_port=mqtt_port, websocket_port=websocket_port)
        elif bridge.spool_directory == BridgeSettings().spool_directory:
            bridge = replace(
                bridge, spool_directory=str((self._directory.root / "spool").absolute())
            )
        if self._own_kafka:
            kafka_port = port(options.kafka_port, stack.kafka_port, "--kafka-port")
            kafka = replace(kafka, bootstrap_servers=(f"{HOST}:{kafka_port}",))
        elif options.kafka is not None:
            kafka = replace(kafka, bootstrap_servers=tuple(options.kafka.split(",")))
        if self._own_redis:
            redis_port = port(options.redis_port, stack.redis_port, "--redis-port")
            redis = f"redis://{HOST}:{redis_port}"
        elif options.redis is not None:
            redis = options.redis
        web_port = port(options.web_port, stack.web_port, "--web-port")
        rules_file = settings.rules_file
        if options.config is not None:
            rules_file = str((Path(rules_file) if rules_file else options.config).absolute())
        return replace(
            settings,
            kafka=kafka,
            redis=redis,
            rules_file=rules_file,
            bridge=bridge,
            web=replace(settings.web, host=HOST, port=web_port),
        )

    @property
    def addresses(self) -> dict[str, str]:
        """The address of each server, by name."""
        bridge = self.settings.bridge
        _, rules = load(self._directory.configuration)
        servers = (f"{host}:{port}" for host, port in rules.pool("messages").servers)
        broker = {
            "MQTT": f"{bridge.host}:{bridge.mqtt_port}",
            "MQTT over WebSocket": f"ws://{bridge.host}:{bridge.websocket_port}",
        }
        if bridge.kind == "emqx":
            broker = {"ExHook": bridge.exhook_listen, "EMQX's REST API": bridge.rest_url}
        return {
            **broker,
            "Kafka": ", ".join(self.settings.kafka.bootstrap_servers),
            "Redis": ", ".join(servers),
            "Web page": f"http://{HOST}:{self.settings.web.port}/",
        }

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Start all processes, and keep them running until SIGTERM or SIGINT. Then stop them.

        Raises:
            MillpondError: a process did not start. Those that had started are stopped.
        """
        stop = asked_to_end()
        self._directory.create()
        self._directory.write_configuration(self.settings)
        starting = asyncio.create_task(self._start())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                await starting
                self._ready = True
                self._write_state()
                on_ready()
                await stopping
        finally:
            starting.cancel()
            self._say("stopping")
            await self.supervisor.stop()
            self._directory.forget_state()

    async def _start(self) -> None:
        if self._own_kafka:
            await self._start_kafka()
        await topics.create(self.settings.kafka)
        if self._own_redis:
            await self._start_redis()
        await self._start_part(f"bridge {self.settings.bridge.kind}")
        for agent in AGENT_NAMES:
            await self._start_part(f"worker {agent}")
        await self._start_part("web", measured=False)

    async def _start_kafka(self) -> None:
        port = int(self.settings.kafka.bootstrap_servers[0].rpartition(":")[2])
        server = KafkaServer(self._directory.root / "kafka", port, free_port())
        command = await asyncio.to_thread(server.prepare)
        await self._child("kafka", command, lambda: kafka_answers(self.settings.kafka))

    async def _start_redis(self) -> None:
        url = self.settings.redis or ""
        port = int(url.rpartition(":")[2])
        command = redis_command(self._directory.root / "redis", port)
        await self._child("redis", command, lambda: redis_answers(url))

    async def _start_part(self, name: str, *, measured: bool = True) -> None:
        """Start one of our own processes. A `measured` one listens for requests of metrics and health."""
        ready_file = self._directory.ready_file(name)
        command = [
            *MILLPOND,
            *name.split(),
            "--config",
            str(self._directory.configuration),
        ]

        async def ready() -> bool:
            return ready_file.exists()

        child = self._new_child(name, command, ready)
        child.environment = {READY_FILE: str(ready_file)}
        if measured:
            child.environment[LISTEN] = listen = f"{HOST}:{free_port()}"
            child.telemetry = f"http://{listen}"
        child.before = lambda: ready_file.unlink(missing_ok=True)
        await self._run_child(child)

    async def _child(
        self, name: str, command: list[str], ready: Callable[[], Awaitable[bool]]
    ) -> None:
        await self._run_child(self._new_child(name, command, ready))

    def _new_child(
        self, name: str, command: list[str], ready: Callable[[], Awaitable[bool]]
    ) -> Child:
        return Child(name, command, self._directory.log(name), ready)

    async def _run_child(self, child: Child) -> None:
        self._say(f"starting {child.name}")
        await self.supervisor.start(child)

    def _write_state(self) -> None:
        children = [
            ChildState(child.name, child.process, child.is_ready, child.restarts, child.telemetry)
            for child in self.supervisor.children
        ]
        self._directory.write_state(
            StackState(self._process, self.addresses, children, self._ready)
        )


def _same_kafka(one: KafkaSettings, other: KafkaSettings) -> bool:
    """True if both lead to the same Kafka. Settings of its topics may differ."""
    return one.client_options() == other.client_options()


def stop_children(state: StackState) -> None:
    """Stop the children of a supervisor, the last one first."""
    for child in reversed(state.children):
        if child.process is not None:
            child.process.stop(STOP_TIMEOUT_S)


def down(directory: DataDirectory) -> bool:
    """Stop the stack of this directory. True if there was one."""
    state = directory.read_state()
    if state is None:
        return False
    running = state.supervisor.running()
    if running is not None:
        # The supervisor stops its children one after the other, each within STOP_TIMEOUT_S.
        state.supervisor.stop(STOP_TIMEOUT_S * (len(state.children) + 1))
    stop_children(state)
    directory.forget_state()
    return True


async def kafka_answers(settings: KafkaSettings) -> bool:
    """True if Kafka answers a metadata request."""
    admin = AIOKafkaAdminClient(**settings.client_options(), request_timeout_ms=2_000)
    try:
        await admin.start()
        await admin.describe_cluster()
    except (KafkaError, OSError):
        return False
    finally:
        with contextlib.suppress(KafkaError, OSError):
            await admin.close()
    return True


async def redis_answers(url: str) -> bool:
    """True if Redis answers PING."""
    client: Redis = Redis.from_url(url)
    try:
        return bool(await client.ping())
    except (RedisError, OSError):
        return False
    finally:
        await client.aclose()
