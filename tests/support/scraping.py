"""Asks a process of ours what it tells: its metrics, as Prometheus reads them, and its health."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from prometheus_client.parser import text_string_to_metric_families

# To be put into the configuration of a world, beside its rules.
LISTEN = '[telemetry]\nlisten = "0"\n'


def address(log: Path) -> str:
    """Where the process listens that writes this log; the last one, if there were several."""
    found: list[str] = re.findall(r"metrics and health: (http://[0-9.:]+)", log.read_text())
    return found[-1]


def get(url: str) -> tuple[int, str]:
    """Status and body."""
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def health(log: Path, path: str) -> tuple[int, Any]:
    """Status, and what the JSON says."""
    status, body = get(address(log) + path)
    return status, json.loads(body)


class Scrape:
    """All samples of a process."""

    def __init__(self, log: Path) -> None:
        status, body = get(address(log) + "/metrics")
        assert status == 200, body
        self.samples = [
            sample for family in text_string_to_metric_families(body) for sample in family.samples
        ]

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels, among others."""
        return sum(
            sample.value for sample in self.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )  # fmt: skip
