"""Settings and rules: defaults, then the configuration file, then the environment.

- Later sources override earlier ones, setting by setting.
- The rules are in the configuration file itself, or in the file that `rules_file` names.
- Workers, bridges and tools share one table of Kafka settings.
- A secret is a file name here. Millpond reads the file when it connects. So no setting, log line or command line
  holds a secret.

docs/reference/settings.md explains each setting to users.
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

from millpond.pipeline.text_files import read_secret_line, read_text
from millpond.schemas.errors import ConfigError
from millpond.schemas.rules import Pool, Rules, default_rules
from millpond.schemas.rules.conf import parse_conf
from millpond.schemas.rules.pool import REDIS_PORT
from millpond.schemas.rules.toml import parse_toml
from millpond.schemas.rules.toml_lines import TomlLines

ENVIRONMENT_PREFIX: Final = "MILLPOND_"
PORT_MAX: Final = 65_535
Port = Annotated[int, Meta(ge=0, le=PORT_MAX)]  # 0: any free port
Count = Annotated[int, Meta(ge=1)]


class KafkaSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The connection to Kafka, and the configuration of Millpond's Kafka topics.

    `partitions` is for life: it decides which partition holds a topic or client. `retention_hours` limits how far
    back the log can rebuild Redis. `message_bytes_max` limits one record, and so one MQTT payload.
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
        """Return the connection arguments of every aiokafka client, secrets included.

        Raises:
            ConfigError: A certificate, key or password file is missing or cannot be used.
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
    """The size of a worker's batches, and how soon its partitions move when it dies.

    The batch limits are upper bounds: a batch never waits to fill. `release_timeout_s` bounds the last batch of a
    worker that is asked to stop or loses a partition. `session_timeout_s` must be longer.
    """

    batch_records_max: Count = 2_000
    batch_bytes_max: Count = 4 * 1024 * 1024
    # Kafka's default configuration refuses less than 6 s. Faust waits 90 s for an answer, so more has no use.
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
    """The broker of a bridge: the embedded one, which listens at `host` and the ports, or an EMQX.

    Every `sync_interval_s` the bridge takes a snapshot, which corrects missed events.

    EMQX calls the bridge's ExHook server at `exhook_listen` (host:port). With `certificate_file` and `key_file` the
    server uses TLS. With `client_ca_file` it accepts only clients with a certificate of that CA.
    `api_key_file` holds one line, `key:secret`, for EMQX's REST API at `rest_url`.
    With `mountpoint`, which must equal the one of EMQX's listener, Millpond delivers messages to clients.
    The spool under `spool_directory` keeps events while Kafka does not answer, up to `spool_bytes_max` per process.
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
    """Metrics, health and traces of a process.

    `listen` is [HOST:]PORT of metrics and health, on loopback without a host. The process sends traces to
    `otlp_endpoint`, if it is set. `trace_ratio` is the share of publishes that get a trace.
    """

    listen: Annotated[str, Meta(pattern=r"^(.+:)?[0-9]{1,5}$")] | None = None
    otlp_endpoint: Annotated[str, Meta(pattern=r"^https?://[^@]+$")] | None = None
    trace_ratio: Annotated[float, Meta(ge=0, le=1)] = 0.01


class LogSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The log of a long-running process, on stderr."""

    format: Literal["console", "json"] = "console"
    level: Literal["debug", "info", "warning", "error"] = "info"


class WebSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The page of `millpond web`.

    Requeue and drop need the token in `token_file`. Without `token_file` the page only reads.
    The page's console connects to `mqtt_url`, MQTT over WebSocket. The default is the embedded broker.
    """

    host: str = "127.0.0.1"
    port: Port = 8080
    token_file: str | None = None
    mqtt_url: (
        Annotated[str, Meta(pattern=r"^wss?://[\w.-]+(:[0-9]{1,5})?(/[\w./~-]*)?$")] | None
    ) = None


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings except the rules.

    `app` is a part of the names of consumer groups and private Redis keys. `rules_file` holds the rules, if the
    configuration file has none. `redis` overrides the address of every pool.
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
    """Return the first line of a file that holds a secret.

    Raises:
        ConfigError: The file is empty or cannot be read. The message begins with `what`, the setting's name.
    """
    try:
        return read_secret_line(Path(path))
    except OSError as error:
        raise ConfigError(f"{what}: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{what}: {path}: {error}") from error


def load(path: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[Settings, Rules]:
    """Read settings and rules from a `millpond.toml` or an `emqx_backend_redis.conf`. None means the defaults.

    Raises:
        ConfigError: A file or an environment variable is invalid. It has the file and the line, if they are known.
    """
    text = "" if path is None else _read(path)
    tables: dict[str, Any] = {}
    if path is not None and not _is_conf(path, text):
        tables = _toml(text, str(path))
    rules = _rules(path, text, tables)
    _check_file(tables, str(path), text)
    _apply_environment(tables, environment)
    settings = _convert(tables)
    if rules is None and settings.rules_file is not None:
        rules = load(Path(settings.rules_file), {})[1]
    rules = default_rules() if rules is None else rules
    if settings.worker.session_timeout_s <= settings.worker.release_timeout_s:
        raise ConfigError("[worker] session_timeout_s must be longer than release_timeout_s")
    return settings, rules if settings.redis is None else _with_redis(rules, settings.redis)


def _read(path: Path) -> str:
    try:
        return read_text(path)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(path)) from error
    except ValueError as error:
        raise ConfigError(str(error), file=str(path)) from error


def _is_conf(path: Path, text: str) -> bool:
    """True if the file is an `emqx_backend_redis.conf`, by its suffix or by its content."""
    lines = (line.strip() for line in text.splitlines())
    return path.suffix == ".conf" or any(line.startswith("backend.redis.") for line in lines)


def _toml(text: str, file: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        # Raises the same error as a ConfigError, with file and line.
        parse_toml(text, file)
        raise


def _rules(path: Path | None, text: str, tables: dict[str, Any]) -> Rules | None:
    """Return the rules of this file, or None if it has none. Removes the rules from `tables`."""
    if path is None:
        return None
    if _is_conf(path, text):
        return parse_conf(text, str(path))
    own = [tables.pop(name, None) for name in ("rule", "pool")]
    return parse_toml(text, str(path)) if any(own) else None


def _apply_environment(tables: dict[str, Any], environment: Mapping[str, str]) -> None:
    """Override settings in `tables`: `MILLPOND_APP`, `MILLPOND_KAFKA_PARTITIONS`, and so on.

    The items of a list, as in `MILLPOND_KAFKA_BOOTSTRAP_SERVERS`, are separated by commas.
    """
    for info in msgspec.structs.fields(Settings):
        name = f"{ENVIRONMENT_PREFIX}{info.name}".upper()
        if not (isinstance(info.type, type) and issubclass(info.type, Struct)):
            if name in environment:
                tables[info.name] = environment[name]
            continue
        for setting in msgspec.structs.fields(info.type):
            value: Any = environment.get(f"{name}_{setting.name}".upper())
            if value is not None:
                listed = "tuple" in str(setting.type)
                tables.setdefault(info.name, {})[setting.name] = (
                    value.split(",") if listed else value
                )


def _check_file(tables: dict[str, Any], file: str, text: str) -> None:
    """Check the file alone, before the environment overrides it, with strict types.

    In a file a number must be a number. In the environment every value is text, so `_convert` accepts text.

    Raises:
        ConfigError: A setting is unknown or invalid. It has the file and the line.
    """
    try:
        msgspec.convert(tables, Settings)
    except msgspec.ValidationError as error:
        line = TomlLines(text).of(*_setting_path(str(error)))
        raise ConfigError(str(error), file=file, line=line) from error


def _convert(tables: dict[str, Any]) -> Settings:
    """Convert the tables to settings.

    Raises:
        ConfigError: An environment variable is invalid. `_check_file` has already accepted the file.
    """
    try:
        return msgspec.convert(tables, Settings, strict=False)
    except msgspec.ValidationError as error:
        variable = "_".join((ENVIRONMENT_PREFIX[:-1], *_setting_path(str(error)))).upper()
        raise ConfigError(f"environment variable {variable}: {error}") from error


def _setting_path(reason: str) -> tuple[str, ...]:
    """Return the key that a validation error names.

    "Expected `int`, got `str` - at `$.kafka.partitions`" gives ("kafka", "partitions").
    """
    at, unknown = re.search(r"at `\$\.([^`\[]+)", reason), re.search(r"field `([^`]+)`", reason)
    table = tuple(at[1].split(".")) if at else ()
    return (*table, unknown[1]) if unknown else table


def _with_redis(rules: Rules, url: str) -> Rules:
    """Return the rules with every pool at one address."""
    return Rules(rules.rules, tuple(pool_at(pool, url) for pool in rules.pools))


def pool_at(pool: Pool, url: str, what: str = "redis") -> Pool:
    """Return the pool with the address `redis://[user@]host[:port][/database]`.

    Raises:
        ConfigError: The URL is invalid or contains a password. The message begins with `what`, the setting's name.
    """
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{what}: the port of {url!r} is not a number") from error
    if parts.scheme not in ("redis", "rediss") or not parts.hostname:
        raise ConfigError(f"{what}: {url!r} is not redis://[user@]host[:port][/database]")
    if parts.password is not None:
        raise ConfigError(f"{what}: the URL contains a password; name a password_file instead")
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
