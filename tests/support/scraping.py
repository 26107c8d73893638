"""Requests the metrics and the health of a process."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from prometheus_client.parser import text_string_to_metric_families

# A part of a configuration: the process listens on a free port.
LISTEN = '[telemetry]\nlisten = "0"\n'


def address(log: Path) -> str:
    """The address in this log of a process; the last one, if it has several."""
    found: list[str] = re.findall(r"metrics and health: (http://[0-9.:]+)", log.read_text())
    return found[-1]


def get(url: str) -> tuple[int, str]:
    """The status and body of a response."""
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def health(log: Path, path: str) -> tuple[int, Any]:
    """The status and the JSON object of a health response."""
    status, body = get(address(log) + path)
    return status, json.loads(body)


class Scrape:
    """All metrics of a process, as Prometheus reads them."""

    def __init__(self, log: Path) -> None:
        status, body = get(address(log) + "/metrics")
        assert status == 200, body
        self.samples = [
            sample for family in text_string_to_metric_families(body) for sample in family.samples
        ]

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples with at least these labels."""
        return sum(
            sample.value for sample in self.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )  # fmt: skip
