"""`millpond web`: serve the web page."""

from __future__ import annotations

from typing import Annotated

import typer
from msgspec import structs

from millpond.pipeline.cli.common import DEFAULT_DATA, ConfigOption, DataOption, load_settings
from millpond.pipeline.process.logs import log_to_stderr


def web(
    port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="The page's port; 0 picks a free port.")
    ] = None,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Serve the web page until SIGTERM. `millpond up` serves it, too."""
    from millpond.pipeline.web.server import run_web  # noqa: PLC0415  aiohttp is slow to import

    settings, rules = load_settings(config, data)
    if port is not None:
        settings = structs.replace(settings, web=structs.replace(settings.web, port=port))
    log_to_stderr(settings.log, "web")
    run_web(settings, rules)
