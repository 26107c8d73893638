"""Millpond keeps the stream of an MQTT broker: events flow through Kafka, and agents fold them into Redis.

`millpond.schemas` says what is true, `millpond.agents` decides, and `millpond.pipeline` acts.
Imports point one way: the pipeline imports agents and schemas, and agents import schemas.

The three packages are at the top of the repository. The links beside this file make them parts of this package.
"""

from __future__ import annotations

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("millpond")
