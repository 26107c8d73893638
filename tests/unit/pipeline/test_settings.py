"""Settings from a file and the environment, and the errors that they can have."""

from __future__ import annotations

from pathlib import Path

import pytest

from millpond.pipeline.settings import KafkaSettings, Settings, load
from millpond.schemas import keys
from millpond.schemas.errors import ConfigError
from millpond.schemas.rules import default_rules

FILE = """\
app = "farm"

[kafka]
bootstrap_servers = ["one:9092", "two:9092"]
partitions = 6

[worker]
batch_records_max = 100

[stack]
mqtt_port = 0

[pool.store]
server = "127.0.0.1:7000"
"""


def written(directory: Path, text: str, name: str = "millpond.toml") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def test_without_a_file_the_defaults_and_the_documented_rules_apply() -> None:
    assert load(None, {}) == (Settings(), default_rules())


def test_a_file_gives_settings_and_rules(tmp_path: Path) -> None:
    settings, rules = load(written(tmp_path, FILE), {})
    assert settings.app == "farm"
    assert settings.kafka.bootstrap_servers == ("one:9092", "two:9092")
    assert (settings.kafka.partitions, settings.worker.batch_records_max) == (6, 100)
    assert settings.stack.mqtt_port == 0
    assert rules.pool("messages").servers == (("127.0.0.1", 7000),)


def test_the_environment_outranks_the_file(tmp_path: Path) -> None:
    environment = {
        "MILLPOND_APP": "mill",
        "MILLPOND_KAFKA_BOOTSTRAP_SERVERS": "three:9092,four:9092",
        "MILLPOND_WORKER_BATCH_RECORDS_MAX": "7",
        "MILLPOND_BRIDGE_WEBSOCKET_ORIGINS": "https://one.example,https://two.example",
    }
    settings, _ = load(written(tmp_path, FILE), environment)
    assert settings.app == "mill"
    assert settings.kafka.bootstrap_servers == ("three:9092", "four:9092")
    assert settings.bridge.websocket_origins == ("https://one.example", "https://two.example")
    assert (settings.kafka.partitions, settings.worker.batch_records_max) == (6, 7)


@pytest.mark.parametrize("name", ["emqx_backend_redis.conf", "rules.txt"])
def test_a_file_of_the_old_backend_has_rules_and_no_settings(tmp_path: Path, name: str) -> None:
    text = (
        "backend.redis.pool1.server = 127.0.0.1:7001\n"
        'backend.redis.hook.message.publish.1 = {"topic": "#", "action": '
        '{"function": "on_message_publish"}, "pool": "pool1"}\n'
    )
    settings, rules = load(written(tmp_path, text, name), {})
    assert settings == Settings()
    assert [rule.action for rule in rules.rules] == ["on_message_publish"]


def test_rules_may_have_a_file_of_their_own(tmp_path: Path) -> None:
    rules_file = written(tmp_path, FILE, "rules.toml")
    _, rules = load(written(tmp_path, f'rules_file = "{rules_file}"\n'), {})
    assert rules.pool("messages").name == "store"


def test_a_path_in_a_file_is_relative_to_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rules").mkdir()
    (tmp_path / "elsewhere").mkdir()
    written(
        tmp_path / "rules",
        '[pool.store]\nserver = "127.0.0.1:7000"\nsentinel = "primary"\n'
        'password_file = "password"\nsentinel_password_file = "asked"\n',
        "rules.toml",
    )
    written(
        tmp_path,
        'rules_file = "rules/rules.toml"\n[kafka]\nca_file = "/etc/ca.pem"\nkey_file = "key"\n'
        '[bridge]\nspool_directory = "spool"\n',
    )
    monkeypatch.chdir(tmp_path / "elsewhere")
    settings, rules = load(Path("../millpond.toml"), {"MILLPOND_WEB_TOKEN_FILE": "token"})
    assert Path(str(settings.kafka.key_file)).resolve() == tmp_path / "key"
    assert Path(settings.bridge.spool_directory).resolve() == tmp_path / "spool"
    assert settings.kafka.ca_file == "/etc/ca.pem"
    pool = rules.pool("messages")
    assert Path(str(pool.password_file)).resolve() == tmp_path / "rules" / "password"
    assert Path(str(pool.sentinel_password_file)).resolve() == tmp_path / "rules" / "asked"
    assert (
        settings.web.token_file == "token"
    )  # a variable's path is relative to the working directory


def test_one_address_can_replace_the_addresses_of_all_pools(tmp_path: Path) -> None:
    environment = {"MILLPOND_REDIS": "rediss://user@cache:7002/3"}
    _, rules = load(written(tmp_path, FILE), environment)
    pool = rules.pool("messages")
    assert (pool.servers, pool.database) == ((("cache", 7002),), 3)
    assert (pool.username, pool.tls, pool.name) == ("user", True, "store")


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("[kafka\n", 1, "not TOML"),
        ("kafak = 1\n", 1, "unknown key 'kafak': did you mean 'kafka'?"),
        ('app = "x"\n\n[kafka]\nparts = 2\n', 4, "unknown key 'parts': did you mean 'partitions'?"),
        ('[[rules]]\nhook = "message.publish"\n', 1, "did you mean 'rule'?"),
        ("partitions = 6\n", 1, "partitions is a setting of [kafka]: write it below that line"),
        ("mqtt_port = 6\n", 1, "a setting of [stack] or [bridge]"),
        ("\nkafka = 6\n", 2, "kafka is written as a table, [kafka]"),
        ('[kafka]\n# how many\npartitions = "24"\n', 3, "partitions: expected `int`, got `str`"),
        ("[kafka]\npartitions = 0\n", 2, "expected `int` >= 1"),
        ("[worker]\nsession_timeout_s = 91\n", 2, "expected `float` <= 90"),
        ("[stack]\nmqtt_port = 65536\n", 2, "expected `int` <= 65535"),
        ("[kafka]\nbootstrap_servers = [1]\n", 2, "expected `str`, got `int`"),
        ('app = "a b"\n', 1, "matching regex"),
        ('[kafka]\nsasl_mechanism = "GSSAPI"\n', 2, "unknown sasl_mechanism 'GSSAPI': known are"),
        ('[log]\nlevel = "warn"\n', 2, "did you mean 'warning'?"),
    ],
)
def test_an_error_in_a_file_names_the_line(
    tmp_path: Path, text: str, line: int, reason: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    assert reason in caught.value.reason
    assert (caught.value.file, caught.value.line) == (str(path), line)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"MILLPOND_KAFKA_PARTITIONS": "many"}, "environment variable MILLPOND_KAFKA_PARTITIONS"),
        ({"MILLPOND_REDIS": "cache:6379"}, "is not redis://"),
        ({"MILLPOND_REDIS": "redis://:word@cache"}, "password_file"),
        ({"MILLPOND_REDIS": "redis://cache/first"}, "is not a number"),
        ({"MILLPOND_WORKER_RELEASE_TIMEOUT_S": "30"}, "must be longer than release_timeout_s"),
        ({"MILLPOND_RULES_FILE": "/nowhere.toml"}, "/nowhere.toml: cannot be read"),
    ],
)
def test_an_error_in_the_environment_names_the_variable_or_setting(
    environment: dict[str, str], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        load(None, environment)


def test_all_mistakes_of_settings_rules_and_environment_are_reported_in_one_run(
    tmp_path: Path,
) -> None:
    rules = written(tmp_path, "hello\nbackend.redis.p.sever = h\n", "old.conf")
    text = f"""rules_file = "{rules}"
[kafak]
partitions = 2
[worker]
batch_records = 5
session_timeout_s = "x"
"""
    path = written(tmp_path, text)
    environment = {"MILLPOND_KAFKA_PARTITION": "7", "MILLPOND_LOG_LEVEL": "loud"}
    with pytest.raises(ConfigError) as caught:
        load(path, environment)
    found = [(fault.file, fault.line) for fault in caught.value.faults]
    assert found == [
        (str(path), 2), (str(path), 5), (str(path), 6), (None, None), (None, None),
        (str(rules), 1), (str(rules), 2), (str(rules), 2),
    ]  # fmt: skip
    shown = str(caught.value)
    for meant in ("'kafka'", "'batch_records_max'", "MILLPOND_KAFKA_PARTITIONS", "'server'"):
        assert f"did you mean {meant}?" in shown


def test_faults_of_rules_and_settings_of_one_file_are_in_the_order_of_its_lines(
    tmp_path: Path,
) -> None:
    path = written(tmp_path, "[pool.a]\nx = 1\n[kafka]\ny = 1\n[[rule]]\nz = 1\n")
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    assert [fault.line for fault in caught.value.faults] == [1, 2, 4, 5, 6]


def test_an_unknown_variable_that_resembles_no_setting_is_a_warning() -> None:
    said: list[str] = []
    load(None, {"MILLPOND_VERSION": "1", "MILLPOND_READY_FILE": "/x", "OTHER": "1"}, said.append)
    (line,) = said
    assert "MILLPOND_VERSION" in line


def test_the_variables_that_kubernetes_sets_for_services_are_ignored() -> None:
    said: list[str] = []
    of_services = {
        "MILLPOND_WEB_PORT": "tcp://10.0.0.1:8080",
        "MILLPOND_WEB_PORT_8080_TCP": "tcp://10.0.0.1:8080",
        "MILLPOND_WEB_SERVICE_HOST": "10.0.0.1",
        "MILLPOND_WEB_SERVICE_PORT": "8080",
        "MILLPOND_WEB_SERVICE_PORT_HTTP": "8080",
    }
    assert load(None, of_services, said.append)[0] == Settings()
    assert said == []


def test_a_rules_file_that_names_itself_or_another_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "millpond.toml"
    path.write_text(f'rules_file = "{path}"\n')
    with pytest.raises(ConfigError, match="its rules_file is not read"):
        load(path, {})


def test_a_password_in_a_url_is_not_repeated_in_the_error() -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, {"MILLPOND_REDIS": "redis://:hunter2@cache"})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["", "plant1.", "a_B-9.", "x" * 232])
def test_a_topic_prefix_is_what_kafka_allows(prefix: str) -> None:
    settings, _ = load(None, {"MILLPOND_KAFKA_TOPIC_PREFIX": prefix})
    longest = max(map(settings.kafka.topic_name, keys.TOPICS), key=len)
    assert longest == f"{prefix}mqtt.dead-letters"
    assert len(longest) <= 249  # Kafka's limit


@pytest.mark.parametrize("prefix", ["plant 1.", "plant/", "ü.", "a\n", "x" * 233])
def test_a_topic_prefix_that_kafka_would_refuse_is_a_config_error(prefix: str) -> None:
    with pytest.raises(ConfigError, match="MILLPOND_KAFKA_TOPIC_PREFIX"):
        load(None, {"MILLPOND_KAFKA_TOPIC_PREFIX": prefix})


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("MILLPOND_APP", "mill"),
        ("MILLPOND_BRIDGE_EXHOOK_LISTEN", "h:1"),
        ("MILLPOND_TELEMETRY_LISTEN", "h:1"),
        ("MILLPOND_WEB_MQTT_URL", "ws://h:1/mqtt"),
    ],
)
def test_a_line_break_behind_a_value_is_no_part_of_a_name(variable: str, text: str) -> None:
    load(None, {variable: text})
    # The items of a list are stripped.
    if "SERVERS" not in variable:
        with pytest.raises(ConfigError, match=variable):
            load(None, {variable: f"{text}\n"})


def test_plain_kafka_needs_an_address_only() -> None:
    assert KafkaSettings().client_options() == {
        "bootstrap_servers": ["127.0.0.1:9092"],
        "security_protocol": "PLAINTEXT",
    }


def test_kafka_secrets_are_read_from_their_files_when_a_client_is_made(tmp_path: Path) -> None:
    password_file = written(tmp_path, "hunter2\n", "password")
    settings = KafkaSettings(
        security_protocol="SASL_PLAINTEXT",
        sasl_mechanism="SCRAM-SHA-512",
        username="mill",
        password_file=str(password_file),
    )
    assert settings.client_options() == {
        "bootstrap_servers": ["127.0.0.1:9092"],
        "security_protocol": "SASL_PLAINTEXT",
        "sasl_mechanism": "SCRAM-SHA-512",
        "sasl_plain_username": "mill",
        "sasl_plain_password": "hunter2",
    }
    assert "hunter2" not in repr(settings)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (KafkaSettings(security_protocol="SASL_PLAINTEXT"), "needs a username and a password_file"),
        (
            KafkaSettings(
                security_protocol="SASL_SSL", username="mill", password_file="/nowhere/password"
            ),
            "password_file: cannot read /nowhere/password",
        ),
        (KafkaSettings(security_protocol="SSL", ca_file="/nowhere/ca.pem"), "ca_file"),
    ],
)
def test_a_missing_kafka_secret_is_a_config_error(settings: KafkaSettings, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        settings.client_options()
