"""`millpond up`, `millpond down` and `millpond status`: the stack on this machine."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from aiokafka.errors import KafkaError
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from millpond.agents.registry import AGENT_NAMES
from millpond.pipeline.cli.common import (
    DEFAULT_DATA,
    ConfigOption,
    DataOption,
    JsonOption,
    console,
    errors,
    print_json,
)
from millpond.pipeline.operate.lag import LagReader
from millpond.pipeline.process.child import MILLPOND, USAGE_EXIT_CODE
from millpond.pipeline.process.extras import extra
from millpond.pipeline.process.signals import run
from millpond.pipeline.settings import PORT_MAX, Settings, load
from millpond.pipeline.stores.redis.inspection import ReadFence
from millpond.pipeline.stores.redis.reader import StoreReader
from millpond.schemas.errors import ConfigError, MillpondError
from millpond.schemas.events import AgentName
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules
from millpond.schemas.rules.pool import Pool

KAFKA_SIZE = "about 60 MB"
DETACHED_READY_TIMEOUT_S = 600.0  # long enough for a first start, which downloads Kafka


def up(
    data: DataOption = DEFAULT_DATA,
    config: ConfigOption = None,
    detach: Annotated[
        bool,
        typer.Option("--detach", help="Run in the background; return when everything is ready."),
    ] = False,
    kafka: Annotated[str | None, typer.Option(help="HOST:PORT of a Kafka to use instead.")] = None,
    redis: Annotated[
        str | None, typer.Option(help="URL of a Redis to use instead, or `embedded`.")
    ] = None,
    mqtt_port: Annotated[
        int | None, typer.Option(min=0, max=PORT_MAX, help="MQTT port; 0 picks a free port.")
    ] = None,
    websocket_port: Annotated[
        int | None,
        typer.Option(min=0, max=PORT_MAX, help="Port of MQTT over WebSocket; 0 picks a free port."),
    ] = None,
    kafka_port: Annotated[
        int | None, typer.Option(min=0, max=PORT_MAX, help="Kafka port; 0 picks a free port.")
    ] = None,
    redis_port: Annotated[
        int | None, typer.Option(min=0, max=PORT_MAX, help="Redis port; 0 picks a free port.")
    ] = None,
    web_port: Annotated[
        int | None,
        typer.Option(min=0, max=PORT_MAX, help="Port of the web page; 0 picks a free port."),
    ] = None,
) -> None:
    """Start Kafka, Redis, an MQTT broker, the agents and the web page, and keep them running until Ctrl-C."""
    with extra("local", "`millpond up`"):
        from millpond.pipeline.stack.directory import DataDirectory  # noqa: PLC0415
        from millpond.pipeline.stack.stack import Options, Stack  # noqa: PLC0415

    directory = DataDirectory(data)
    options = Options(
        config=config,
        kafka=kafka,
        redis=redis,
        mqtt_port=mqtt_port,
        websocket_port=websocket_port,
        kafka_port=kafka_port,
        redis_port=redis_port,
        web_port=web_port,
    )

    def say(line: str) -> None:
        if not detach:
            console.print(line, markup=False, soft_wrap=True)

    # With --detach the child makes it again, and says the same. Made here, its errors come before a download.
    stack = Stack(directory, options, say)
    if stack.own_kafka:
        _fetch_kafka()
    if detach:
        _detach(directory, [part for part in sys.argv[1:] if part != "--detach"])
        return
    asyncio.run(stack.run(lambda: _print_ready(stack.addresses, data)))


def _fetch_kafka() -> None:
    """Download Kafka's jars behind a progress display, unless the cache has them."""
    from millpond.pipeline.stack import kafka  # noqa: PLC0415  only after the check for the extra [local]

    if kafka.fetched_jars() is not None:
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console.print(f"downloading Apache Kafka {kafka.KAFKA_VERSION} ({KAFKA_SIZE}, only once)")
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task("downloading")
        kafka.fetch_jars()


def _print_ready(addresses: dict[str, str], data: Path) -> None:
    table = Table(show_header=False, box=None)
    for name, address in addresses.items():
        table.add_row(name, address)
    console.print(table)
    millpond, where = _command_name(), "" if data == DEFAULT_DATA else f" --data {data}"
    console.print("Try, in another terminal:", markup=False)
    for command in (
        f"pub{where} -q 1 -t sensors/kitchen -m 21.5",
        f"redis{where} ZRANGE mqtt:msg:sensors/kitchen 0 -1 WITHSCORES",
        f"status{where}",
    ):
        console.print(f"  {millpond} {command}", markup=False, soft_wrap=True)
    console.print("millpond is ready")


def _command_name() -> str:
    """What to type for this command: `millpond` if the PATH leads to this installation, else its path."""
    own = Path(sys.executable).with_name("millpond")
    on_path = shutil.which("millpond")
    if on_path is not None and Path(on_path).samefile(own):
        return "millpond"
    return str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own)


def _detach(directory: Any, arguments: list[str]) -> None:
    """Run the same command in the background, and return when it is ready.

    Raises:
        ConfigError: the command ended, because a setting is wrong. The message is its last line.
        MillpondError: the command ended, or the stack is not ready in time.
    """
    directory.create()
    log = directory.log("up")
    with log.open("wb") as output:
        running = subprocess.Popen(
            [*MILLPOND, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    deadline = time.monotonic() + DETACHED_READY_TIMEOUT_S
    ready = False
    while not ready and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
        state = directory.read_state()
        ready = state is not None and state.supervisor.pid == running.pid and state.ready
    code = running.poll()
    if code is not None:
        lines = log.read_text("utf-8", "replace").splitlines() or ["`millpond up` ended"]
        for line in lines[:-1]:
            errors.print(line, markup=False, soft_wrap=True)
        kind = ConfigError if code == USAGE_EXIT_CODE else MillpondError
        raise kind(lines[-1].removeprefix("millpond: "))
    if not ready:
        raise MillpondError(
            f"not ready after {DETACHED_READY_TIMEOUT_S:g} s; it is still starting: see {log}, `millpond status` and"
            " `millpond down`"
        )
    _wait_for_last_line(log)
    console.print(log.read_text("utf-8", "replace").rstrip(), markup=False, soft_wrap=True)


def _wait_for_last_line(log: Path) -> None:
    # The state says ready a moment before the last line is in the log.
    deadline = time.monotonic() + 5
    while (
        "millpond is ready" not in log.read_text("utf-8", "replace") and time.monotonic() < deadline
    ):
        time.sleep(0.05)


def down(data: DataOption = DEFAULT_DATA) -> None:
    """Stop what `millpond up` started in this directory, and nothing else."""
    with extra("local", "`millpond down`"):
        from millpond.pipeline.stack.directory import DataDirectory  # noqa: PLC0415
        from millpond.pipeline.stack.stack import down as stop  # noqa: PLC0415

    stopped = stop(DataDirectory(data))
    console.print("stopped" if stopped else f"nothing runs in {data}")


def status(
    data: DataOption = DEFAULT_DATA,
    as_json: JsonOption = False,
    pid_of: Annotated[
        str | None,
        typer.Option("--pid", metavar="NAME", help="Print only the pid of this process."),
    ] = None,
) -> None:
    """Show addresses, processes, readiness, and how many records each agent has not committed."""
    found = _status(data)
    if pid_of is not None:
        console.print(_pid(found, pid_of))
    elif as_json:
        print_json(found, indent=True)
    else:
        _print_status(found)
    if not found["ready"]:
        raise typer.Exit(1)


def _status(data: Path) -> dict[str, Any]:
    with extra("local", "`millpond status`"):
        from millpond.pipeline.stack.directory import DataDirectory  # noqa: PLC0415

    directory = DataDirectory(data)
    state = directory.read_state()
    if state is None or state.supervisor.running() is None:
        return {
            "running": False,
            "ready": False,
            "addresses": {},
            "processes": [],
            "uncommitted": {},
        }
    settings, rules = load(directory.configuration)

    uncommitted, complaints = run(_ask_servers(settings, rules))
    for complaint in complaints:
        errors.print(f"millpond: {complaint}", markup=False, soft_wrap=True)
    processes = [
        {
            "name": child.name,
            "pid": child.process.pid if child.process else None,
            "ready": child.ready and child.process is not None and bool(child.process.running()),
            "restarts": child.restarts,
            "telemetry": child.telemetry,
        }
        for child in state.children
    ]
    return {
        "running": True,
        # What was ready once may hang now with the server that does not answer.
        "ready": state.ready and not complaints and all(each["ready"] for each in processes),
        "addresses": state.addresses,
        "processes": processes,
        "uncommitted": uncommitted,
        "supervisor": msgspec.to_builtins(state.supervisor),
    }


async def _ask_servers(
    settings: Settings, rules: Rules
) -> tuple[dict[AgentName, int | None], list[str]]:
    """The records that each agent has not committed, None if that is unknown; and which server does not answer."""
    uncommitted: dict[AgentName, int | None] = dict.fromkeys(AGENT_NAMES)
    complaints: list[str] = []

    async def ask_kafka() -> None:
        try:
            async with LagReader(settings.kafka, settings.app) as offsets:
                uncommitted.update(
                    {each.agent: each.uncommitted for each in await offsets.of(AGENT_NAMES)}
                )
        except (KafkaError, MillpondError) as error:
            complaints.append(f"the lag is unknown: {error}")

    async def ask_redis(pool: Pool) -> None:
        try:
            async with StoreReader(pool) as reader:
                await reader.read(Partition(settings.app, "sessions", 0), [ReadFence()])
        except MillpondError as error:
            complaints.append(str(error))

    await asyncio.gather(ask_kafka(), *map(ask_redis, rules.pools))
    return uncommitted, complaints


def _pid(found: dict[str, Any], name: str) -> int:
    pids = {
        process["name"]: int(process["pid"]) for process in found["processes"] if process["pid"]
    }
    if name not in pids:
        raise MillpondError(
            f"no process {name!r} runs here; running are: {', '.join(pids) or 'none'}"
        )
    return pids[name]


def _print_status(found: dict[str, Any]) -> None:
    if not found["running"]:
        console.print("nothing runs here")
        return
    addresses = Table(show_header=False, box=None)
    for name, address in found["addresses"].items():
        addresses.add_row(name, address)
    processes = Table("process", "pid", "ready", "restarts", "uncommitted", box=None)
    for process in found["processes"]:
        agent = process["name"].removeprefix("worker ")
        uncommitted = found["uncommitted"].get(agent)
        processes.add_row(
            process["name"],
            str(process["pid"] or ""),
            "yes" if process["ready"] else "no",
            str(process["restarts"]),
            "" if uncommitted is None else str(uncommitted),
        )
    console.print(addresses)
    console.print(processes)
