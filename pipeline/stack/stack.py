"""The processes of a stack: which they are, their order, and how each shows that it is ready.

Kafka and Redis start first, then the topics are created, then all our own processes start at once. Kafka and Redis are
ready when they answer a request. Our own processes touch a file. A Kafka or a Redis of the user's is neither started nor
stopped: it must answer before anything starts.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct

from millpond.agents.registry import AGENT_NAMES
from millpond.pipeline.kafka import topics
from millpond.pipeline.process.child import MILLPOND
from millpond.pipeline.process.signals import stop_event
from millpond.pipeline.settings import (
    ENVIRONMENT_PREFIX,
    READY_FILE,
    BridgeSettings,
    HostPort,
    KafkaSettings,
    Settings,
    StackSettings,
    load,
    pool_at,
)
from millpond.pipeline.stack.directory import ChildState, DataDirectory, StackState
from millpond.pipeline.stack.kafka import KafkaServer
from millpond.pipeline.stack.ports import HOST, PortClaims, free_port, is_free
from millpond.pipeline.stack.processes import identify
from millpond.pipeline.stack.reachability import check_kafka, check_redis, source_of
from millpond.pipeline.stack.redis import redis_command
from millpond.pipeline.stack.servers import kafka_answers, redis_answers
from millpond.pipeline.stack.supervisor import STOP_TIMEOUT_S, Child, Supervisor
from millpond.schemas.errors import ConfigError
from millpond.schemas.rules import Rules, default_rules

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
        self._options = options
        self.own_kafka = options.kafka is None and _same_kafka(settings.kafka, KafkaSettings())
        self._own_redis = options.redis == EMBEDDED or (
            options.redis is None and settings.redis is None and rules == default_rules()
        )
        self.settings = self._resolve(settings, options)
        url = self.settings.redis
        pools = rules.pools if url is None else tuple(pool_at(pool, url) for pool in rules.pools)
        self._rules = Rules(rules.rules, pools)
        self.supervisor = Supervisor(say, self._write_state)
        self._ready = False
        self._process = identify(os.getpid())

    def _resolve(self, settings: Settings, options: Options) -> Settings:
        """The settings of all processes: with the options, claimed ports and addresses filled in."""
        replace, defaults = msgspec.structs.replace, StackSettings()
        before, claims, ports = self._directory.ports_before(), PortClaims(), settings.stack

        def port(name: str) -> int:
            """Claim a port. Without a wish of the user's it is that of the last run here: clients know it."""
            nonlocal ports
            asked: int | None = getattr(options, name)
            wanted: int = getattr(ports, name) if asked is None else asked
            last: int = 0 if before is None else getattr(before, name)
            default = asked is None and wanted == getattr(defaults, name)
            if last and (wanted == 0 or default) and is_free(last):
                wanted = last
            port = claims.claim(wanted, f"--{name.replace('_', '-')}")
            ports = replace(ports, **{name: port})
            return port

        kafka, redis, bridge = settings.kafka, settings.redis, settings.bridge
        if bridge.kind == "embedded":
            bridge = replace(
                bridge,
                host=HOST,
                mqtt_port=port("mqtt_port"),
                websocket_port=port("websocket_port"),
            )
        elif bridge.spool_directory == BridgeSettings().spool_directory:
            bridge = replace(
                bridge, spool_directory=str((self._directory.root / "spool").absolute())
            )
        if self.own_kafka:
            kafka = replace(kafka, bootstrap_servers=(f"{HOST}:{port('kafka_port')}",))
        elif options.kafka is not None:
            kafka = replace(kafka, bootstrap_servers=_servers(options.kafka))
        if self._own_redis:
            redis = f"redis://{HOST}:{port('redis_port')}"
        elif options.redis is not None:
            redis = options.redis
        web = replace(settings.web, host=HOST, port=port("web_port"))
        claims.check()
        rules_file = settings.rules_file
        if options.config is not None:
            rules_file = str((Path(rules_file) if rules_file else options.config).absolute())
        return replace(
            settings,
            kafka=kafka,
            redis=redis,
            rules_file=rules_file,
            stack=ports,
            bridge=bridge,
            web=web,
        )

    @property
    def addresses(self) -> dict[str, str]:
        """The address of each server, by name."""
        bridge = self.settings.bridge
        servers = (f"{host}:{port}" for host, port in self._rules.pool("messages").servers)
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
        stop = stop_event()
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
            if self.supervisor.children:
                self._say("stopping")
            await self.supervisor.stop()
            self._directory.forget_state()

    async def _start(self) -> None:
        await self._check_servers()
        self._directory.create()
        self._directory.write_configuration(self.settings)
        servers = []
        if self.own_kafka:
            servers.append(await asyncio.to_thread(self._kafka))
        if self._own_redis:
            servers.append(self._redis())
        await self._run(*servers)
        await topics.create(self.settings.kafka)
        await self._run(
            self._part(f"bridge {self.settings.bridge.kind}"),
            *(self._part(f"worker {agent}") for agent in AGENT_NAMES),
            self._part("web", measured=False),
        )

    async def _check_servers(self) -> None:
        """Return if the Kafka and the Redis of the user answer. A failure later would be one of six processes'."""
        config, options = self._options.config, self._options
        if not self.own_kafka:
            source = source_of(config, "--kafka", options.kafka, "kafka", "bootstrap_servers")
            await check_kafka(self.settings.kafka, source)
        if not self._own_redis:
            of_all = (
                None
                if self.settings.redis is None
                else source_of(config, "--redis", options.redis, "redis")
            )
            rules_file = self.settings.rules_file
            await check_redis(self._rules, of_all, Path(rules_file) if rules_file else None)

    def _kafka(self) -> Child:
        port = int(self.settings.kafka.bootstrap_servers[0].rpartition(":")[2])
        command = KafkaServer(self._directory.root / "kafka", port, free_port()).prepare()
        log = self._directory.log("kafka")
        return Child("kafka", command, log, lambda: kafka_answers(self.settings.kafka))

    def _redis(self) -> Child:
        url = self.settings.redis or ""
        command = redis_command(self._directory.root / "redis", int(url.rpartition(":")[2]))
        return Child("redis", command, self._directory.log("redis"), lambda: redis_answers(url))

    def _part(self, name: str, *, measured: bool = True) -> Child:
        """Return one of our own processes. A `measured` one listens for requests of metrics and health."""
        ready_file = self._directory.ready_file(name)
        command = [*MILLPOND, *name.split(), "--config", str(self._directory.configuration)]

        async def ready() -> bool:
            return ready_file.exists()

        child = Child(name, command, self._directory.log(name), ready)
        child.environment = {READY_FILE: str(ready_file)}
        if measured:
            child.environment[LISTEN] = listen = f"{HOST}:{free_port()}"
            child.telemetry = f"http://{listen}"
        child.before = lambda: ready_file.unlink(missing_ok=True)
        return child

    async def _run(self, *children: Child) -> None:
        for child in children:
            self._say(f"starting {child.name}")
        await self.supervisor.start(*children)

    def _write_state(self) -> None:
        children = [
            ChildState(child.name, child.process, child.is_ready, child.restarts, child.telemetry)
            for child in self.supervisor.children
        ]
        self._directory.write_state(
            StackState(self._process, self.addresses, children, self._ready)
        )


def _servers(text: str) -> tuple[str, ...]:
    try:
        return msgspec.convert(text.split(","), tuple[HostPort, ...])
    except msgspec.ValidationError as error:
        raise ConfigError(f"--kafka: {text!r} is not HOST:PORT[,HOST:PORT…]") from error


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
