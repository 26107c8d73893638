"""The files in `compose/` match the code: commands, settings, metrics. No container is started."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from millpond.pipeline import settings
from millpond.pipeline.cli.main import app
from millpond.pipeline.settings import Settings
from millpond.pipeline.stack.kafka import KAFKA_VERSION
from millpond.pipeline.stack.redis import REDIS_SETTINGS
from millpond.schemas.rules import default_rules
from tests.unit.pipeline.telemetry.test_telemetry import LABELS, every_family

COMPOSE = Path(__file__).parents[2] / "compose"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())[
    "services"
]
OWN = [name for name, service in SERVICES.items() if "build" in service]
EMQX = (COMPOSE / "emqx.conf").read_text()
PROMETHEUS: dict[str, Any] = yaml.safe_load((COMPOSE / "prometheus/prometheus.yml").read_text())
ALERTS: dict[str, Any] = yaml.safe_load((COMPOSE / "prometheus/alerts.yml").read_text())
GRAFANA = COMPOSE / "grafana"
BOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards/millpond.json").read_text())
# Labels that Grafana and Prometheus add.
FOREIGN_LABELS = {"instance", "job", "le", "service"}


@pytest.fixture
def loaded() -> Settings:
    loaded, rules = settings.load(COMPOSE / "millpond.toml", {})
    assert rules.pool("queue").servers == (("redis", 6379),)
    assert {rule.action for rule in rules.rules} == {rule.action for rule in default_rules().rules}
    return loaded


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_has_a_health_check(name: str) -> None:
    health = SERVICES[name]["healthcheck"]
    assert "test" in health or name == "topics"
    # The file of MILLPOND_READY_FILE stays when a process is not ready any more: a check has to ask.
    assert name not in OWN or name == "topics" or "urlopen('http://127.0.0.1:" in health["test"][-1]


@pytest.mark.parametrize("name", OWN)
def test_the_commands_of_our_services_exist(name: str) -> None:
    command = SERVICES[name]["command"]
    assert command[-2:] == ["--config", "/etc/millpond/millpond.toml"]
    assert f"./millpond.toml:{command[-1]}:ro" in SERVICES[name]["volumes"]
    shown = CliRunner().invoke(app, [*command[:1], *command[1:-2], "--help"])
    assert shown.exit_code == 0, shown.output


def test_all_agents_the_bridge_and_the_page_are_started() -> None:
    commands = {" ".join(SERVICES[name]["command"][:2]) for name in OWN}
    agents = {f"worker {agent}" for agent in ("sessions", "messages", "queue", "pubsub")}
    assert commands == {"kafka init", "bridge emqx", "web --config", *agents}


def test_the_bridge_and_emqx_are_configured_for_each_other(loaded: Settings) -> None:
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


def test_published_ports_are_on_loopback_and_have_a_listener() -> None:
    listening = set(re.findall(r'bind = "0\.0\.0\.0:(\d+)"', EMQX))
    listening |= {
        "18083",
        "6379",
        "9090",
        "3000",
        "8080",
    }  # of EMQX's dashboard, Redis, Prometheus, Grafana, the web page
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert ports
    for port in ports:
        host, outside, inside = port.split(":")
        assert (host, outside) == ("127.0.0.1", inside)
        assert inside in listening


def test_kafka_and_redis_are_those_of_up() -> None:
    assert SERVICES["kafka"]["image"] == f"apache/kafka:{KAFKA_VERSION}"
    command = SERVICES["redis"]["command"][1:]
    assert dict(zip(command[::2], command[1::2], strict=True)) == {
        f"--{name}": value for name, value in REDIS_SETTINGS.items()
    }


def test_the_name_of_emqx_is_where_its_start_script_looks() -> None:
    host = SERVICES["emqx"]["environment"]["EMQX_NODE_NAME"].partition("@")[2]
    assert host == "127.0.0.1"  # the same in each new container
    assert 'name = "emqx@' not in EMQX


def test_the_console_of_the_page_reaches_emqx(loaded: Settings) -> None:
    assert loaded.web.mqtt_url == "ws://127.0.0.1:8083/mqtt"
    assert 'listeners.ws.default.bind = "0.0.0.0:8083"' in EMQX
    assert "127.0.0.1:8083:8083" in SERVICES["emqx"]["ports"]
    assert f"127.0.0.1:{loaded.web.port}:8080" in SERVICES["web"]["ports"]


def test_kafka_advertises_the_address_in_the_settings(loaded: Settings) -> None:
    (server,) = loaded.kafka.bootstrap_servers
    assert SERVICES["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"] == f"PLAINTEXT://{server}"


# -- Prometheus and Grafana -----------------------------------------------------------------------------


def test_prometheus_scrapes_every_process_of_ours(loaded: Settings) -> None:
    (job,) = PROMETHEUS["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert set(found["names"]) == set(OWN) - {"topics", "web"}
    assert loaded.telemetry.listen == f"0.0.0.0:{found['port']}"
    assert job["job_name"] == "millpond"
    assert PROMETHEUS["rule_files"] == ["alerts.yml"]
    assert "./prometheus:/etc/prometheus:ro" in SERVICES["prometheus"]["volumes"]


def test_the_alert_about_a_process_that_is_gone_names_every_scraped_service() -> None:
    (job,) = PROMETHEUS["scrape_configs"]
    (label,) = job["relabel_configs"]
    assert (label["source_labels"], label["target_label"]) == (["__meta_dns_name"], "service")
    (down,) = [rule for rule in RULES if rule["alert"] == "MillpondProcessDown"]
    absent = re.findall(r'absent\(up\{job="millpond",service="(\w+)"\}\)', down["expr"])
    assert absent == job["dns_sd_configs"][0]["names"]


def test_grafana_finds_its_dashboard_and_its_data_source() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/millpond.yml").read_text())[
        "providers"
    ]
    volumes = SERVICES["grafana"]["volumes"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in volumes
    assert "./grafana/provisioning:/etc/grafana/provisioning:ro" in volumes
    assert source["url"] == "http://prometheus:9090"
    uids = {target["datasource"]["uid"] for panel in PANELS for target in panel["targets"]}
    assert uids == {source["uid"]}


PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
QUERIES = [
    *((panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]),
    *((rule["alert"], rule["expr"]) for rule in RULES),
]


def names() -> set[str]:
    """The names that a query may use."""
    suffixes = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",), "gauge": ("",)}
    return {
        family.name + suffix
        for family in every_family()
        for suffix in suffixes.get(family.type, ("",))
    }


@pytest.mark.parametrize(("where", "query"), QUERIES, ids=[where for where, _ in QUERIES])
def test_a_query_names_metrics_and_labels_that_exist(where: str, query: str) -> None:
    found = set(re.findall(r"\b(?:millpond|process|python)_[a-z_]+\b", query))
    assert found <= names()
    assert found or query.startswith("up{")
    for labels in re.findall(r"by \(([a-z, ]+)\)|\{([^}]*)\}", query):
        for label in re.findall(r"[a-z]+(?==|\b)", re.sub('"[^"]*"', "", " ".join(labels))):
            assert label in LABELS | FOREIGN_LABELS
    assert query.count("(") == query.count(")")


def test_the_dashboard_shows_every_metric_of_ours() -> None:
    shown = " ".join(query for _, query in QUERIES)
    ours = {each.name for each in every_family() if each.name.startswith("millpond")}
    unseen = {name for name in ours if name not in shown}
    assert unseen == {
        "millpond_build_info",  # for joins with other metrics
        "millpond_outputs", "millpond_seen_ids",  # only for finding faults in Millpond
        "millpond_bridge_commands_unfinished", "millpond_bridge_events_unacknowledged",
    }  # fmt: skip


def test_panels_do_not_overlap_and_have_legends() -> None:
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken
        taken |= cells
        assert all(target["legendFormat"] for target in panel["targets"])


def test_every_alert_has_a_name_of_its_own_and_a_summary() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    assert all(rule["annotations"]["summary"] for rule in RULES)
