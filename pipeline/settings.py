"""Settings: defaults, then the file, then the environment; the rules come along from the same file.

One table of Kafka settings serves workers, bridges and tools alike. Secrets are named by file and read when a
connection is made: they are never in a setting, a log line or a command line.
"""

from __future__ import annotations

import os
import re
import ssl
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct, field

from millpond.schemas.errors import ConfigError
from millpond.schemas.rules import Pool, Rules, default_rules
from millpond.schemas.rules.conf import parse_conf
from millpond.schemas.rules.pool import REDIS_PORT
from millpond.schemas.rules.toml import parse_toml
from millpond.schemas.rules.toml_lines import TomlLines

ENVIRONMENT_PREFIX: Final = "MILLPOND_"
PORT_MAX: Final = 65_535
Port = Annotated[int, Meta(ge=0, le=PORT_MAX)]  # 0: any free one
Count = Annotated[int, Meta(ge=1)]


class KafkaSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to reach Kafka, and how its topics are made.

    `partitions` is for life: which partition a topic's records are in depends on it. `retention_hours` is how long
    the log can rebuild Redis; `message_bytes_max` bounds one record, and with it one MQTT payload.
    """

    bootstrap_servers: tuple[str, ...] = ("127.0.0.1:9092",)
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "PLAIN"
    username: str | None = None
    password_file: str | None = None
    ca_file: str | None = None
    certificate_file: str | None = None
    key_file: str | None = None
    partitions: Count = 24
    replication_factor: Count = 1
    min_insync_replicas: Count = 1
    retention_hours: Count = 168
    message_bytes_max: Count = 4 * 1024 * 1024

    def client_options(self) -> dict[str, Any]:
        """The connection arguments of every aiokafka client.

        Raises:
            ConfigError: a file that is named cannot be read.
        """
        options: dict[str, Any] = {
            "bootstrap_servers": list(self.bootstrap_servers),
            "security_protocol": self.security_protocol,
        }
        if self.security_protocol.endswith("SSL"):
            options["ssl_context"] = self._ssl_context()
        if self.security_protocol.startswith("SASL"):
            options["sasl_mechanism"] = self.sasl_mechanism
            options["sasl_plain_username"] = self.username
            options["sasl_plain_password"] = self._password()
        return options

    def _ssl_context(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
            if self.certificate_file is not None:
                context.load_cert_chain(self.certificate_file, self.key_file)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"[kafka] ca_file, certificate_file, key_file: {error}") from error
        return context

    def _password(self) -> str:
        if self.username is None or self.password_file is None:
            raise ConfigError(
                f"[kafka] {self.security_protocol} needs a username and a password_file"
            )
        return read_secret(self.password_file, "[kafka] password_file")


class WorkerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much a worker takes at once, and how soon its partitions move when it dies.

    A batch never waits to fill. `release_timeout_s` is how long a worker that is asked to stop, or loses a
    partition, may take to finish the batch in hand; `session_timeout_s` must be longer: Kafka takes 6 s or more,
    Faust no more than the 90 s it waits for an answer.
    """

    batch_records_max: Count = 2_000
    batch_bytes_max: Count = 4 * 1024 * 1024
    session_timeout_s: Annotated[float, Meta(ge=6, le=90)] = 12.0
    commit_interval_s: Annotated[float, Meta(gt=0)] = 1.0
    release_timeout_s: Annotated[float, Meta(gt=0)] = 5.0


class StackSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The ports of `millpond up`, all on 127.0.0.1."""

    mqtt_port: Port = 1883
    websocket_port: Port = 8083
    kafka_port: Port = 9092
    redis_port: Port = 6379
    web_port: Port = 8080


class BridgeSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which broker the bridge is for: its own, which listens at `host` and the ports, or an EMQX.

    Every `sync_interval_s` all that is connected and subscribed is told anew: what an event missed is right by then.
    `exhook_listen` (host:port) is what EMQX's ExHook calls; with `certificate_file` and `key_file` over TLS, with
    `client_ca_file` from clients with a certificate of that CA only. `api_key_file` holds one line `key:secret` of
    EMQX's REST API at `rest_url`. With `mountpoint`, that of a listener of EMQX, Millpond delivers. What Kafka does not
    take is kept under `spool_directory`, up to `spool_bytes_max` for each process.
    """

    kind: Literal["embedded", "emqx"] = "embedded"
    host: str = "127.0.0.1"
    mqtt_port: Port = 1883
    websocket_port: Port = 8083
    websocket_origins: tuple[str, ...] | None = None
    node: str = "embedded@127.0.0.1"
    sync_interval_s: Annotated[float, Meta(ge=1)] = 300.0
    exhook_listen: Annotated[str, Meta(pattern=r"^.+:[0-9]{1,5}$")] = "127.0.0.1:9000"
    certificate_file: str | None = None
    key_file: str | None = None
    client_ca_file: str | None = None
    rest_url: Annotated[str, Meta(pattern=r"^https?://[^@]+$")] = "http://127.0.0.1:18083"
    rest_ca_file: str | None = None
    api_key_file: str | None = None
    mountpoint: Annotated[str, Meta(pattern=r"^[^$+#]+/\$\{clientid\}/$")] | None = None
    spool_directory: str = ".millpond/spool"
    spool_bytes_max: Annotated[int, Meta(ge=1024 * 1024)] = 4 * 1024 * 1024 * 1024


class TelemetrySettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a process tells of itself, and where: `listen` is [HOST:]PORT, on loopback without a host.

    With `otlp_endpoint`, traces go there, of so many publishes as `trace_ratio` says.
    """

    listen: Annotated[str, Meta(pattern=r"^(.+:)?[0-9]{1,5}$")] | None = None
    otlp_endpoint: Annotated[str, Meta(pattern=r"^https?://[^@]+$")] | None = None
    trace_ratio: Annotated[float, Meta(ge=0, le=1)] = 0.01


class LogSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a process that runs for long writes its log, on stderr."""

    format: Literal["console", "json"] = "console"
    level: Literal["debug", "info", "warning", "error"] = "info"


class WebSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where `millpond web` shows its page. Who has the token in `token_file` may requeue and drop; without it nobody may.

    The page's console connects to `mqtt_url`, MQTT over WebSocket; without one to the embedded broker.
    """

    host: str = "127.0.0.1"
    port: Port = 8080
    token_file: str | None = None
    mqtt_url: (
        Annotated[str, Meta(pattern=r"^wss?://[\w.-]+(:[0-9]{1,5})?(/[\w./~-]*)?$")] | None
    ) = None


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything but the rules. `app` names consumer groups and private keys.

    `rules_file` holds the rules if this file does not; `redis` overrides the address of every pool.
    """

    app: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "millpond"
    rules_file: str | None = None
    redis: str | None = None
    kafka: KafkaSettings = field(default_factory=KafkaSettings)
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    stack: StackSettings = field(default_factory=StackSettings)
    bridge: BridgeSettings = field(default_factory=BridgeSettings)
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)
    log: LogSettings = field(default_factory=LogSettings)
    web: WebSettings = field(default_factory=WebSettings)


def read_secret(path: str, what: str) -> str:
    """The first line of a file that holds a secret.

    Raises:
        ConfigError: it cannot be read; `what` names the setting.
    """
    try:
        return Path(path).read_text().splitlines()[0]
    except (OSError, IndexError) as error:
        raise ConfigError(f"{what}: cannot read {path}: {error}") from error


def load(path: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[Settings, Rules]:
    """Settings and rules of a `millpond.toml` or an `emqx_backend_redis.conf`; of None, the defaults.

    Raises:
        ConfigError: with file and line where there are any.
    """
    text = "" if path is None else _read(path)
    tables: dict[str, Any] = {}
    if path is not None and not _is_conf(path, text):
        tables = _toml(text, str(path))
    rules = _rules(path, text, tables)
    _checked(tables, str(path), text)
    _override(tables, environment)
    settings = _convert(tables)
    if rules is None and settings.rules_file is not None:
        rules = load(Path(settings.rules_file), {})[1]
    rules = default_rules() if rules is None else rules
    if settings.worker.session_timeout_s <= settings.worker.release_timeout_s:
        raise ConfigError("[worker] session_timeout_s must be longer than release_timeout_s")
    return settings, rules if settings.redis is None else _at(rules, settings.redis)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", file=str(path)) from error


def _is_conf(path: Path, text: str) -> bool:
    """An old broker backend's file, by its name or by what it says."""
    lines = (line.strip() for line in text.splitlines())
    return path.suffix == ".conf" or any(line.startswith("backend.redis.") for line in lines)


def _toml(text: str, file: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        parse_toml(text, file)  # says it with its line
        raise


def _rules(path: Path | None, text: str, tables: dict[str, Any]) -> Rules | None:
    """The rules in this very file, taken out of `tables`; None if it has none."""
    if path is None:
        return None
    if _is_conf(path, text):
        return parse_conf(text, str(path))
    own = [tables.pop(name, None) for name in ("rule", "pool")]
    return parse_toml(text, str(path)) if any(own) else None


def _override(tables: dict[str, Any], environment: Mapping[str, str]) -> None:
    """`MILLPOND_APP`, `MILLPOND_KAFKA_BOOTSTRAP_SERVERS` (comma separated), and so on for every setting."""
    for info in msgspec.structs.fields(Settings):
        name = f"{ENVIRONMENT_PREFIX}{info.name}".upper()
        if not (isinstance(info.type, type) and issubclass(info.type, Struct)):
            if name in environment:
                tables[info.name] = environment[name]
            continue
        for setting in msgspec.structs.fields(info.type):
            value: Any = environment.get(f"{name}_{setting.name}".upper())
            if value is not None:
                listed = setting.name == "bootstrap_servers"
                tables.setdefault(info.name, {})[setting.name] = (
                    value.split(",") if listed else value
                )


def _checked(tables: dict[str, Any], file: str, text: str) -> None:
    """What the file says, before the environment speaks: a number is a number there, not text."""
    try:
        msgspec.convert(tables, Settings)
    except msgspec.ValidationError as error:
        line = TomlLines(text).of(*_path(str(error)))
        raise ConfigError(str(error), file=file, line=line) from error


def _convert(tables: dict[str, Any]) -> Settings:
    """The settings of a file that was right by itself: what is wrong now comes from the environment."""
    try:
        return msgspec.convert(tables, Settings, strict=False)
    except msgspec.ValidationError as error:
        variable = "_".join((ENVIRONMENT_PREFIX[:-1], *_path(str(error)))).upper()
        raise ConfigError(f"the environment's {variable}: {error}") from error


def _path(reason: str) -> tuple[str, ...]:
    """Which key a validation error is about: "Expected `int`, got `str` - at `$.kafka.partitions`"."""
    at, unknown = re.search(r"at `\$\.([^`\[]+)", reason), re.search(r"field `([^`]+)`", reason)
    table = tuple(at[1].split(".")) if at else ()
    return (*table, unknown[1]) if unknown else table


def _at(rules: Rules, url: str) -> Rules:
    """The rules with every pool at one address."""
    return Rules(rules.rules, tuple(pool_at(pool, url) for pool in rules.pools))


def pool_at(pool: Pool, url: str, what: str = "redis") -> Pool:
    """A pool, moved to `redis://[user@]host[:port][/database]`.

    Raises:
        ConfigError: it is no such URL; `what` names the setting.
    """
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{what}: the port of {url!r} is not a number") from error
    if parts.scheme not in ("redis", "rediss") or not parts.hostname:
        raise ConfigError(f"{what}: {url!r} is not redis://[user@]host[:port][/database]")
    if parts.password is not None:
        raise ConfigError(f"{what}: a URL shows its password to everyone: use a password_file")
    database = parts.path.strip("/")
    if database and not database.isdigit():
        raise ConfigError(f"{what}: the database of {url!r} is not a number")
    return msgspec.structs.replace(
        pool,
        type="single",
        servers=((parts.hostname, port or REDIS_PORT),),
        database=int(database or 0),
        username=parts.username or pool.username,
        tls=parts.scheme == "rediss",
    )
