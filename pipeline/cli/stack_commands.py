"""`millpond up`, `down`, `status`."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import orjson
import typer
from aiokafka.errors import KafkaError
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from millpond.agents.registry import AGENT_NAMES
from millpond.pipeline.cli.common import DEFAULT_DATA, ConfigOption, DataOption, console, errors
from millpond.pipeline.operate.lag import LagReader
from millpond.pipeline.process.child import MILLPOND
from millpond.pipeline.process.extras import extra
from millpond.pipeline.settings import load
from millpond.schemas.errors import MillpondError

KAFKA_SIZE = "about 60 MB"
DETACHED_READY_TIMEOUT_S = 600.0  # a first start fetches Kafka


def up(
    data: DataOption = DEFAULT_DATA,
    config: ConfigOption = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return when all is ready.")] = False,
    kafka: Annotated[str | None, typer.Option(help="HOST:PORT of a Kafka to use.")] = None,
    redis: Annotated[str | None, typer.Option(help="URL of a Redis to use, or `embedded`.")] = None,
    mqtt_port: Annotated[int | None, typer.Option(help="MQTT; 0 picks a free port.")] = None,
    websocket_port: Annotated[
        int | None, typer.Option(help="MQTT over WebSocket; 0: a free one.")
    ] = None,
    kafka_port: Annotated[int | None, typer.Option(help="Kafka; 0 picks a free port.")] = None,
    redis_port: Annotated[int | None, typer.Option(help="Redis; 0 picks a free port.")] = None,
    web_port: Annotated[int | None, typer.Option(help="The web page; 0: a free one.")] = None,
) -> None:
    """Start Kafka, Redis, an MQTT broker and the agents here, and keep them running until Ctrl-C."""
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
    _fetch_kafka(kafka)
    if detach:
        _detach(directory, [part for part in sys.argv[1:] if part != "--detach"])
        return
    stack = Stack(
        directory, options, lambda line: console.print(line, markup=False, soft_wrap=True)
    )
    asyncio.run(stack.run(lambda: _say_ready(stack.addresses, data)))


def _fetch_kafka(external: str | None) -> None:
    """Fetch the jars with something to look at; the second start finds them."""
    from millpond.pipeline.stack import kafka  # noqa: PLC0415  up to here the extra [local] was there

    if external is not None or kafka.fetched_jars() is not None:
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console.print(f"fetching Apache Kafka {kafka.KAFKA_VERSION} ({KAFKA_SIZE}, this once)")
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task("fetching")
        kafka.fetch_jars()


def _say_ready(addresses: dict[str, str], data: Path) -> None:
    table = Table(show_header=False, box=None)
    for name, address in addresses.items():
        table.add_row(name, address)
    console.print(table)
    millpond, where = _as_typed(), "" if data == DEFAULT_DATA else f" --data {data}"
    console.print("Try, in another terminal:", markup=False)
    for command in (
        f"pub{where} -q 1 -t sensors/kitchen -m 21.5",
        f"redis{where} ZRANGE mqtt:msg:sensors/kitchen 0 -1 WITHSCORES",
        f"status{where}",
    ):
        console.print(f"  {millpond} {command}", markup=False, soft_wrap=True)
    console.print("millpond is ready")


def _as_typed() -> str:
    """How this command is called from here: by its name if that leads to it, else by its path."""
    own = Path(sys.executable).with_name("millpond")
    on_path = shutil.which("millpond")
    if on_path is not None and Path(on_path).samefile(own):
        return "millpond"
    return str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own)


def _detach(directory: Any, arguments: list[str]) -> None:
    """The same command in the background; returns when it is ready, or says why it is not."""
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
    while running.poll() is None and time.monotonic() < deadline:
        state = directory.read_state()
        if state is not None and state.supervisor.pid == running.pid and state.ready:
            break
        time.sleep(0.1)
    said = log.read_text(errors="replace")
    if running.poll() is not None:
        raise MillpondError(said.strip().removeprefix("millpond: ") or "`millpond up` ended")
    _wait_for_last_line(log)
    console.print(log.read_text(errors="replace").rstrip(), markup=False, soft_wrap=True)


def _wait_for_last_line(log: Path) -> None:
    deadline = time.monotonic() + 5
    while (
        "millpond is ready" not in log.read_text(errors="replace") and time.monotonic() < deadline
    ):
        time.sleep(0.05)


def down(data: DataOption = DEFAULT_DATA) -> None:
    """Stop exactly what `millpond up` started in this directory."""
    with extra("local", "`millpond down`"):
        from millpond.pipeline.stack.directory import DataDirectory  # noqa: PLC0415
        from millpond.pipeline.stack.stack import down as stop  # noqa: PLC0415

    stopped = stop(DataDirectory(data))
    console.print("stopped" if stopped else f"nothing runs in {data}")


def status(
    data: DataOption = DEFAULT_DATA,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    pid_of: Annotated[
        str | None, typer.Option("--pid", metavar="NAME", help="Only the pid of one process.")
    ] = None,
) -> None:
    """Addresses, processes, readiness, and how many records each agent is behind."""
    found = _status(data)
    if pid_of is not None:
        console.print(_pid(found, pid_of))
    elif as_json:
        sys.stdout.buffer.write(orjson.dumps(found, option=orjson.OPT_INDENT_2) + b"\n")
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
        return {"running": False, "ready": False, "addresses": {}, "processes": [], "lag": {}}
    settings, _ = load(directory.configuration)

    async def lags() -> dict[str, int | None]:
        try:
            async with LagReader(settings.kafka, settings.app) as offsets:
                return {each.agent: each.uncommitted for each in await offsets.of(AGENT_NAMES)}
        except (KafkaError, MillpondError) as error:
            errors.print(f"millpond: Kafka does not answer: {error}", markup=False)
            return dict.fromkeys(AGENT_NAMES)

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
        "ready": state.ready and all(process["ready"] for process in processes),
        "addresses": state.addresses,
        "processes": processes,
        "lag": asyncio.run(lags()),
        "supervisor": msgspec.to_builtins(state.supervisor),
    }


def _pid(found: dict[str, Any], name: str) -> int:
    pids = {
        process["name"]: int(process["pid"]) for process in found["processes"] if process["pid"]
    }
    if name not in pids:
        raise MillpondError(f"no process {name!r} runs here: there are {', '.join(pids) or 'none'}")
    return pids[name]


def _print_status(found: dict[str, Any]) -> None:
    if not found["running"]:
        console.print("nothing runs here")
        return
    addresses = Table(show_header=False, box=None)
    for name, address in found["addresses"].items():
        addresses.add_row(name, address)
    processes = Table("process", "pid", "ready", "restarts", "records behind", box=None)
    for process in found["processes"]:
        agent = process["name"].removeprefix("worker ")
        behind = found["lag"].get(agent)
        processes.add_row(
            process["name"],
            str(process["pid"] or ""),
            "yes" if process["ready"] else "no",
            str(process["restarts"]),
            "" if behind is None else str(behind),
        )
    console.print(addresses)
    console.print(processes)
