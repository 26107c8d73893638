"""Settings and rules: defaults, then the configuration file, then the environment.

- Later sources override earlier ones, setting by setting.
- The rules are in the configuration file itself, or in the file that `rules_file` names.
- A relative path in a file is relative to the directory of that file; one in the environment, to the working directory.
- Workers, bridges and tools share one table of Kafka settings.
- A secret is a file name here. Millpond reads the file when it connects. So no setting, log line or command line
  holds a secret.

docs/reference/settings.md explains each setting to users.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct, field

from millpond.pipeline.text_files import read_secret_line, read_text
from millpond.schemas import keys
from millpond.schemas.errors import ConfigError
from millpond.schemas.rules import Pool, Rules, default_rules
from millpond.schemas.rules.build import DraftTable
from millpond.schemas.rules.conf import parse_conf
from millpond.schemas.rules.faults import Faults, hint
from millpond.schemas.rules.pool import REDIS_PORT
from millpond.schemas.rules.toml import parse_document, parse_toml
from millpond.schemas.rules.toml_lines import TomlLines

ENVIRONMENT_PREFIX: Final = "MILLPOND_"
READY_FILE: Final = "MILLPOND_READY_FILE"  # names the file that a process touches when it is ready
STACK_FILE: Final = "stack.toml"  # in the directory of --data: the settings of a stack, as `millpond up` writes them
VARIABLE_LIKENESS_MIN: Final = (
    0.75  # of 1: KAFKA_PARTITION is like KAFKA_PARTITIONS, VERSION is like none
)
PORT_MAX: Final = 65_535
Port = Annotated[int, Meta(ge=0, le=PORT_MAX)]  # 0: any free port
HostPort = Annotated[str, Meta(pattern=r"^.+:[0-9]{1,5}\Z")]
Count = Annotated[int, Meta(ge=1)]
TOPIC_NAME_LENGTH_MAX: Final = 249  # Kafka's
TopicPrefix = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9._-]*\Z",  # what Kafka allows in a topic's name
        max_length=TOPIC_NAME_LENGTH_MAX - max(map(len, keys.TOPICS)),
    ),
]


class KafkaSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The connection to Kafka, and the configuration of Millpond's Kafka topics.

    `partitions` is for life: it decides which partition holds a topic or client. `retention_hours` limits how far
    back the log can rebuild Redis. `message_bytes_max` limits one record, and so one MQTT payload.

    `topic_prefix` precedes the names of Millpond's topics in Kafka, so that several installations can share one Kafka.
    Everywhere else the topics have the names of `schemas/keys.py`: see `topic_name`.
    """

    bootstrap_servers: tuple[HostPort, ...] = ("127.0.0.1:9092",)
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "PLAIN"
    username: str | None = None
    password_file: str | None = None
    ca_file: str | None = None
    certificate_file: str | None = None
    key_file: str | None = None
    topic_prefix: TopicPrefix = ""
    partitions: Count = 24
    replication_factor: Count = 1
    min_insync_replicas: Count = 1
    retention_hours: Count = 168
    message_bytes_max: Count = 4 * 1024 * 1024

    def topic_name(self, topic: str) -> str:
        """Return the name that one of Millpond's topics has in Kafka.

        Only modules that talk to Kafka call this. No event, header, key or file holds such a name.
        """
        return self.topic_prefix + topic

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
    exhook_listen: HostPort = "127.0.0.1:9000"
    certificate_file: str | None = None
    key_file: str | None = None
    client_ca_file: str | None = None
    rest_url: Annotated[str, Meta(pattern=r"^https?://[^@]+\Z")] = "http://127.0.0.1:18083"
    rest_ca_file: str | None = None
    api_key_file: str | None = None
    mountpoint: Annotated[str, Meta(pattern=r"^[^$+#]+/\$\{clientid\}/\Z")] | None = None
    spool_directory: str = ".millpond/spool"
    spool_bytes_max: Annotated[int, Meta(ge=1024 * 1024)] = 4 * 1024 * 1024 * 1024


class TelemetrySettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Metrics, health and traces of a process.

    `listen` is [HOST:]PORT of metrics and health, on loopback without a host. The process sends traces to
    `otlp_endpoint`, if it is set. `trace_ratio` is the share of publishes that get a trace.
    """

    listen: Annotated[str, Meta(pattern=r"^(.+:)?[0-9]{1,5}\Z")] | None = None
    otlp_endpoint: Annotated[str, Meta(pattern=r"^https?://[^@]+\Z")] | None = None
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
        Annotated[str, Meta(pattern=r"^wss?://[\w.-]+(:[0-9]{1,5})?(/[\w./~-]*)?\Z")] | None
    ) = None


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings except the rules.

    `app` is a part of the names of consumer groups and private Redis keys. `rules_file` holds the rules, if the
    configuration file has none. `redis` overrides the address of every pool.
    """

    app: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z")] = "millpond"
    rules_file: str | None = None
    redis: str | None = None
    kafka: KafkaSettings = field(default_factory=KafkaSettings)
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    stack: StackSettings = field(default_factory=StackSettings)
    bridge: BridgeSettings = field(default_factory=BridgeSettings)
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)
    log: LogSettings = field(default_factory=LogSettings)
    web: WebSettings = field(default_factory=WebSettings)


def _say_nothing(_: str) -> None:
    pass


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


def load(
    path: Path | None,
    environment: Mapping[str, str] = os.environ,
    warn: Callable[[str], None] = _say_nothing,
) -> tuple[Settings, Rules]:
    """Read settings and rules from a `millpond.toml` or an `emqx_backend_redis.conf`. None means the defaults.

    `warn` gets one sentence for each thing that the user wrote and that has no effect.

    Raises:
        ConfigError: Files or environment variables are invalid. Each fault has its file and line, if they are known.
    """
    faults = Faults()
    tables, rules = ({}, None) if path is None else _load_file(path, faults, warn)
    _apply_environment(tables, environment, faults, warn)
    rules_file = tables.get("rules_file")
    if rules is None and isinstance(rules_file, str):
        rules = _load_rules_file(Path(rules_file), path, faults, warn)
    faults.raise_any()
    # Each value has been checked with the types of its source. The environment's are text.
    settings = msgspec.convert(tables, Settings, strict=False)
    if settings.worker.session_timeout_s <= settings.worker.release_timeout_s:
        raise ConfigError("[worker] session_timeout_s must be longer than release_timeout_s")
    rules = default_rules() if rules is None else rules
    return settings, rules if settings.redis is None else _with_redis(rules, settings.redis)


def _load_rules_file(
    path: Path, named_by: Path | None, faults: Faults, warn: Callable[[str], None]
) -> Rules | None:
    """Return the rules of a file that `rules_file` names. Its settings have no effect."""
    with faults.collect():
        tables, rules = _load_file(path, faults, warn)
        if rules is None and "rules_file" in tables:
            reason = f"has no rules and no pools, and its rules_file is not read: name that in {named_by or 'MILLPOND_RULES_FILE'}"
            raise ConfigError(reason, file=str(path))
        return rules
    return None


def _load_file(
    path: Path, faults: Faults, warn: Callable[[str], None]
) -> tuple[dict[str, Any], Rules | None]:
    """Return the settings of a file as tables, and its rules, None if it has none. Both may be incomplete by faults.

    Paths in them are absolute.

    Raises:
        ConfigError: The file cannot be read, or is not TOML.
    """
    file, text, directory = str(path), _read(path), path.absolute().parent
    if _is_conf(path, text):
        with faults.collect():
            return {}, _anchored(parse_conf(text, file, warn), directory)
        return {}, None
    tables = parse_document(text, file)
    rules = None
    if "rule" in tables or "pool" in tables:
        with faults.collect():
            rules = _anchored(parse_toml(text, file), directory)
    lines = TomlLines(text)
    draft = DraftTable(tables, lambda key: lines.of(*filter(None, [key])), file)
    settings = _checked_settings(draft, lines, faults)
    anchor(settings, directory)
    return settings, rules


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


def anchor(tables: dict[str, Any], directory: Path) -> None:
    """Make each path in `tables` absolute. A relative one is relative to `directory`."""
    for name, value in tables.items():
        if isinstance(value, dict):
            anchor(value, directory)
        elif name.endswith(("_file", "_directory")) and value is not None:
            tables[name] = str(directory / value)


def _anchored(rules: Rules, directory: Path) -> Rules:
    """Return the rules with absolute paths in their pools."""
    return Rules(rules.rules, tuple(_anchored_pool(pool, directory) for pool in rules.pools))


def _anchored_pool(pool: Pool, directory: Path) -> Pool:
    values = msgspec.structs.asdict(pool)
    files = {name: value for name, value in values.items() if name.endswith("_file")}
    anchor(files, directory)
    return msgspec.structs.replace(pool, **files)


def _checked_settings(document: DraftTable, lines: TomlLines, faults: Faults) -> dict[str, Any]:
    """Return the settings of a file without those that are unknown or invalid, which become faults."""
    tables: dict[str, Any] = {}
    for name, value in document.values.items():
        if name in ("rule", "pool"):
            continue
        kind = _TYPES.get(name)
        if name not in _TYPES:
            faults.add(document.fault(_unknown(name), name))
        elif not _is_table(kind):
            single = document._replace(values={name: value})
            tables |= single.converted(_TYPES, faults)
        elif not isinstance(value, dict):
            faults.add(document.fault(f"{name} is written as a table, [{name}]", name))
        else:
            line = partial(_line_in, lines, name)
            draft = DraftTable(value, line, document.file)
            tables[name] = draft.converted(_types(kind), faults)
    return tables


def _line_in(lines: TomlLines, table: str, key: str | None) -> int:
    return lines.of(*filter(None, (table, key)))


def _unknown(name: str) -> str:
    """Say what is wrong with a name at the top of a file: a setting of a table, or a name that nothing has."""
    homes = [table for table, kind in _TYPES.items() if _is_table(kind) and name in _types(kind)]
    if homes:
        tables = " or ".join(f"[{table}]" for table in homes)
        return f"{name} is a setting of {tables}: write it below that line"
    return f"unknown key {name!r}: {hint(name, (*_TYPES, 'pool', 'rule'))}"


def _apply_environment(
    tables: dict[str, Any],
    environment: Mapping[str, str],
    faults: Faults,
    warn: Callable[[str], None],
) -> None:
    """Override settings in `tables`: `MILLPOND_APP`, `MILLPOND_KAFKA_PARTITIONS`, and so on.

    The items of a list, as in `MILLPOND_KAFKA_BOOTSTRAP_SERVERS`, are separated by commas.
    """
    known = _variables()
    for variable, text in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or _is_service_link(variable, text):
            continue
        if variable not in known:
            _unknown_variable(variable, known, faults, warn)
            continue
        path, kind = known[variable]
        value = [item.strip() for item in text.split(",")] if "tuple" in str(kind) else text
        try:
            msgspec.convert(value, kind, strict=False)
        except msgspec.ValidationError as error:
            reason = str(error).replace("Expected", "expected")
            faults.add(ConfigError(f"environment variable {variable}: {reason}"))
            continue
        *table, name = path
        (tables.setdefault(table[0], {}) if table else tables)[name] = value


def _variables() -> dict[str, tuple[tuple[str, ...], Any]]:
    """Return the environment variable of each setting, with the setting's path and type."""
    paths: dict[tuple[str, ...], Any] = {}
    for name, kind in _TYPES.items():
        if _is_table(kind):
            paths |= {(name, setting): each for setting, each in _types(kind).items()}
        else:
            paths[name,] = kind
    return {
        f"{ENVIRONMENT_PREFIX}{'_'.join(path)}".upper(): (path, kind)
        for path, kind in paths.items()
    }


def _unknown_variable(
    variable: str, known: Iterable[str], faults: Faults, warn: Callable[[str], None]
) -> None:
    """A near miss of a variable is a mistake. Another name may belong to another program, such as a deployment tool."""
    if variable == READY_FILE:
        return
    names = [each.removeprefix(ENVIRONMENT_PREFIX) for each in (*known, READY_FILE)]
    wrong = variable.removeprefix(ENVIRONMENT_PREFIX)
    close = get_close_matches(wrong, names, n=1, cutoff=VARIABLE_LIKENESS_MIN)
    if close:
        meant = f"did you mean {ENVIRONMENT_PREFIX}{close[0]}?"
        faults.add(ConfigError(f"unknown environment variable {variable}: {meant}"))
    else:
        warn(f"the environment variable {variable} has no effect: no setting has this name")


def _is_service_link(variable: str, text: str) -> bool:
    """True if Kubernetes set the variable, for a Service whose name begins with `millpond`."""
    links = ("_SERVICE_HOST", "_SERVICE_PORT")
    return any(link in variable for link in links) or _SERVICE_ADDRESS.match(text) is not None


def _types(kind: Any) -> dict[str, Any]:
    return {each.name: each.type for each in msgspec.structs.fields(kind)}


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Struct)


_TYPES: Final = _types(Settings)
# tcp://10.0.0.1:8080: the value of MILLPOND_WEB_PORT in a pod beside a Service `millpond-web`.
_SERVICE_ADDRESS: Final = re.compile(r"(?:tcp|udp|sctp)://")


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
