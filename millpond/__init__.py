"""Millpond: keeps what an MQTT broker forgets.

`millpond.schemas` says what is true, `millpond.agents` decides, `millpond.pipeline` acts; imports point from right to
left. The three packages lie at the top of the repository; here are links to them.
"""

from __future__ import annotations

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("millpond")
