"""Every part of Millpond can use a SASL_SSL listener of Kafka, with one table of settings and secrets only in files."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from millpond.pipeline.kafka import topics
from millpond.pipeline.settings import KafkaSettings, load
from millpond.pipeline.stack.kafka import KafkaServer
from millpond.pipeline.stack.ports import HOST, free_port
from millpond.pipeline.stack.servers import kafka_answers
from millpond.schemas import keys
from millpond.schemas.errors import ConfigError
from tests.support.servers import KAFKA_HEAP_MIB, Server
from tests.support.tls import Certificate, certificate
from tests.support.workers import Worker

USER, PASSWORD = "mill", "grain-and-water"
MECHANISMS: tuple[Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"], ...] = (
    "PLAIN",
    "SCRAM-SHA-256",
    "SCRAM-SHA-512",
)
CLUSTER_ID = "mOmx8tJ7RfmU1nuVsxiQ4w"
MODULES = "org.apache.kafka.common.security"


class SecureKafka(NamedTuple):
    """The address of the SASL_SSL listener, and the CA of its certificate."""

    address: str
    ca_file: Path
    plain: str = ""  # the address of the broker's own plain listener


def overrides(port: int, secure: int, controller: int, files: Certificate) -> dict[str, str]:
    """Configure a plain listener for the broker itself, and one for the tests with TLS and a password."""
    keystore = files.key.with_name("keystore.pem")
    keystore.write_bytes(files.key.read_bytes() + files.certificate.read_bytes())
    listeners = f"PLAINTEXT://{HOST}:{port},SASL_SSL://{HOST}:{secure}"
    scram = {
        f"listener.name.sasl_ssl.{mechanism.lower()}.sasl.jaas.config": (
            f"{MODULES}.scram.ScramLoginModule required;"
        )
        for mechanism in MECHANISMS[1:]
    }
    return {
        "listeners": f"{listeners},CONTROLLER://{HOST}:{controller}",
        "advertised.listeners": listeners,
        "listener.security.protocol.map": (
            "PLAINTEXT:PLAINTEXT,SASL_SSL:SASL_SSL,CONTROLLER:PLAINTEXT"
        ),
        "sasl.enabled.mechanisms": ",".join(MECHANISMS),
        "listener.name.sasl_ssl.plain.sasl.jaas.config": (
            f'{MODULES}.plain.PlainLoginModule required user_{USER}="{PASSWORD}";'
        ),
        **scram,
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(keystore),
    }


def format_with_users(server: KafkaServer) -> list[str]:
    """Prepare the server, and format its storage with the SCRAM users."""
    command = server.prepare()
    shutil.rmtree(server.directory / "data")
    java, configuration = command[:-2], command[-1]
    users = [
        argument
        for mechanism in MECHANISMS[1:]
        for argument in ("--add-scram", f"{mechanism}=[name={USER},password={PASSWORD}]")
    ]
    tool = ["kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", configuration, *users]
    subprocess.run([*java, *tool], check=True, capture_output=True)
    return command


@pytest.fixture(scope="module")
def secure_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureKafka]:
    """A Kafka whose second listener is SASL_SSL."""
    directory = tmp_path_factory.mktemp("secure-kafka")
    files = certificate(directory)
    port, secure, controller = free_port(), free_port(), free_port()
    broker = KafkaServer(
        directory / "kafka",
        port,
        controller,
        overrides(port, secure, controller, files),
        KAFKA_HEAP_MIB,
    )
    plain = KafkaSettings(bootstrap_servers=(f"{HOST}:{port}",))
    command = format_with_users(broker)
    server = Server(
        f"{HOST}:{port}", broker.directory, lambda: command, lambda: kafka_answers(plain)
    )
    server.start()
    try:
        yield SecureKafka(f"{HOST}:{secure}", files.certificate, f"{HOST}:{port}")
    finally:
        server.kill()


def configured(
    kafka: SecureKafka, directory: Path, mechanism: str = "PLAIN", password: str = PASSWORD
) -> Path:
    """Write a `millpond.toml`."""
    secret = directory / "password"
    secret.write_text(password + "\n")
    config = directory / "millpond.toml"
    config.write_text(f"""\
[kafka]
bootstrap_servers = ["{kafka.address}"]
security_protocol = "SASL_SSL"
sasl_mechanism = "{mechanism}"
username = "{USER}"
password_file = "{secret}"
ca_file = "{kafka.ca_file}"
partitions = 2
""")
    return config


@pytest.mark.parametrize("mechanism", MECHANISMS)
async def test_a_record_is_produced_and_consumed_over_tls_with_a_password(
    secure_kafka: SecureKafka, tmp_path: Path, mechanism: str
) -> None:
    settings, _ = load(configured(secure_kafka, tmp_path, mechanism), {})
    await topics.create(settings.kafka)
    assert await topics.check(settings.kafka, settings.app) == []
    options = settings.kafka.client_options()
    async with AIOKafkaProducer(**options) as producer:
        sent = await producer.send_and_wait(keys.DEAD_LETTERS_TOPIC, mechanism.encode())
    async with AIOKafkaConsumer(
        keys.DEAD_LETTERS_TOPIC, auto_offset_reset="earliest", **options
    ) as consumer:
        while True:
            record = await asyncio.wait_for(consumer.getone(), 30)
            if (record.partition, record.offset) == (sent.partition, sent.offset):
                break
    assert record.value == mechanism.encode()


@pytest.mark.parametrize("mechanism", MECHANISMS)
async def test_the_error_of_a_wrong_password_names_authentication(
    secure_kafka: SecureKafka, tmp_path: Path, mechanism: str
) -> None:
    settings, _ = load(configured(secure_kafka, tmp_path, mechanism, "chaff"), {})
    with pytest.raises(ConfigError, match=r"(?i)authentication") as caught:
        await topics.create(settings.kafka)
    assert "chaff" not in str(caught.value)


async def test_the_error_of_an_unknown_authority_names_the_certificate(
    secure_kafka: SecureKafka, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = SecureKafka(secure_kafka.address, certificate(tmp_path / "other").certificate)
    settings, _ = load(configured(other, tmp_path), {})
    with pytest.raises(ConfigError, match=r"(?i)certificate"):
        await topics.create(settings.kafka)


def test_a_command_with_a_wrong_password_ends_with_one_line(
    secure_kafka: SecureKafka, tmp_path: Path
) -> None:
    config = configured(secure_kafka, tmp_path, password="chaff")
    done = subprocess.run(
        [sys.executable, "-m", "millpond", "kafka", "check", "--config", str(config)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "authentication" in done.stderr.lower()
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("mechanism", MECHANISMS)
async def test_a_worker_reads_over_tls_and_its_command_line_has_no_secret(
    secure_kafka: SecureKafka, redis_server: str, app_name: str, tmp_path: Path, mechanism: str
) -> None:
    config = configured(secure_kafka, tmp_path, mechanism)
    address = redis_server.removeprefix("redis://")
    config.write_text(
        f'app = "{app_name}"\n{config.read_text()}\n[pool.pool1]\nserver = "{address}"\n'
    )
    settings, _ = load(config, {})
    await topics.create(settings.kafka)
    worker = Worker(config, tmp_path / "worker.log")
    try:
        await worker.until_ready()
        process = psutil.Process(worker.process.pid)
        shown = " ".join(process.cmdline()) + str(process.environ()) + worker.log.read_text()
        assert PASSWORD not in shown
    finally:
        worker.process.kill()
        await worker.ended()
