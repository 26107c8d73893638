"""Settings from a file and the environment, and the errors that they can have."""

from __future__ import annotations

from pathlib import Path

import pytest

from millpond.pipeline.settings import KafkaSettings, Settings, load
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
        '[pool.store]\nserver = "127.0.0.1:7000"\npassword_file = "password"\n',
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
    password_file = rules.pool("messages").password_file
    assert password_file is not None
    assert Path(password_file).resolve() == tmp_path / "rules" / "password"
    assert (
        settings.web.token_file == "token"
    )  # a variable's path is relative to the working directory


def test_a_file_that_names_itself_as_its_rules_file_does_not_loop(tmp_path: Path) -> None:
    path = written(tmp_path, 'rules_file = "millpond.toml"\n')
    assert load(path, {})[1] == default_rules()


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
        ("kafak = 1\n", 1, "unknown field `kafak`"),
        ('app = "x"\n\n[kafka]\nparts = 2\n', 4, "unknown field `parts`"),
        ('[kafka]\n# how many\npartitions = "24"\n', 3, "Expected `int`, got `str`"),
        ("[kafka]\npartitions = 0\n", 2, "Expected `int` >= 1"),
        ("[worker]\nsession_timeout_s = 91\n", 2, "Expected `float` <= 90"),
        ("[stack]\nmqtt_port = 65536\n", 2, "Expected `int` <= 65535"),
        ("[kafka]\nbootstrap_servers = [1]\n", 2, "Expected `str`, got `int`"),
        ('app = "a b"\n', 1, "matching regex"),
        ('[kafka]\nsasl_mechanism = "GSSAPI"\n', 2, "Invalid enum value 'GSSAPI'"),
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


def test_a_password_in_a_url_is_not_repeated_in_the_error() -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, {"MILLPOND_REDIS": "redis://:hunter2@cache"})
    assert "hunter2" not in str(caught.value)


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
