"""What `compose/` mounts and starts is what the code understands. Nothing here starts a container."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pipeline import settings
from pipeline.cli.main import app
from pipeline.ready import READY_FILE
from pipeline.settings import Settings
from schemas.rules import default_rules

COMPOSE = Path(__file__).parents[2] / "compose"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())[
    "services"
]
OWN = [name for name, service in SERVICES.items() if "build" in service]
EMQX = (COMPOSE / "emqx.conf").read_text()


@pytest.fixture
def loaded() -> Settings:
    loaded, rules = settings.load(COMPOSE / "millpond.toml", {})
    assert rules.pool("queue").servers == (("redis", 6379),)
    assert {rule.action for rule in rules.rules} == {rule.action for rule in default_rules().rules}
    return loaded


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_says_when_it_is_well(name: str) -> None:
    health = SERVICES[name]["healthcheck"]
    assert "test" in health or name == "topics"
    assert name not in OWN or SERVICES[name]["environment"].keys() == {READY_FILE}


@pytest.mark.parametrize("name", OWN)
def test_the_commands_are_millponds(name: str) -> None:
    command = SERVICES[name]["command"]
    assert command[-2:] == ["--config", "/etc/millpond/millpond.toml"]
    assert f"./millpond.toml:{command[-1]}:ro" in SERVICES[name]["volumes"]
    shown = CliRunner().invoke(app, [*command[:1], *command[1:-2], "--help"])
    assert shown.exit_code == 0, shown.output


def test_all_agents_and_the_bridge_run() -> None:
    commands = {" ".join(SERVICES[name]["command"][:2]) for name in OWN}
    agents = {f"worker {agent}" for agent in ("sessions", "messages", "queue", "pubsub")}
    assert commands == {"kafka init", "bridge emqx", *agents}


def test_bridge_and_emqx_know_each_other(loaded: Settings) -> None:
    bridge = loaded.bridge
    port = bridge.exhook_listen.rpartition(":")[2]
    assert f'url = "http://bridge:{port}"' in EMQX
    assert f'mountpoint = "{bridge.mountpoint}"' in EMQX
    assert bridge.rest_url == "http://emqx:18083"
    assert f'api_key.bootstrap_file = "{bridge.api_key_file}"' in EMQX
    for name in ("bridge", "emqx"):
        assert SERVICES[name]["secrets"] == ["api_key"]
    spools = [each for each in SERVICES["bridge"]["volumes"] if each.startswith("spool:")]
    assert spools == [f"spool:{bridge.spool_directory}"]


def test_what_is_published_to_the_host_is_on_loopback_and_listened_to() -> None:
    listening = set(re.findall(r'bind = "0\.0\.0\.0:(\d+)"', EMQX)) | {"18083", "6379"}
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert ports
    for port in ports:
        host, outside, inside = port.split(":")
        assert (host, outside) == ("127.0.0.1", inside)
        assert inside in listening


def test_kafka_is_where_the_settings_say(loaded: Settings) -> None:
    (server,) = loaded.kafka.bootstrap_servers
    assert SERVICES["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"] == f"PLAINTEXT://{server}"
