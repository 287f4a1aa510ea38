"""`vllm-batch engine`: the servers that are up, who uses them and who waits, and how to stop them."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from resources.engine.hosts import Hosts, HostStatus
from resources.engine.vllm_server import log_name
from resources.errors import InputRefused
from resources.settings import settings
from vllm_batch_pipelines.cli import common
from vllm_batch_pipelines.cli.batches import AsJson
from vllm_batch_pipelines.cli.common import Exit

STOP_SECONDS = 60

Model = Annotated[str | None, typer.Argument(help="A model of the catalog. Left out: all of them.")]


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="The servers that are kept warm between runs.", no_args_is_help=True)
    group.command("status")(status)
    group.command("stop")(stop)
    group.command("logs")(logs)
    app.add_typer(group, name="engine")


def status(as_json: AsJson = False) -> None:
    """Show the servers that are up: model, devices, who uses them, who waits, and when an idle one stops.

    Example:

        vllm-batch engine status
    """
    with common.errors_for_people():
        hosts = Hosts(settings().runtime_root)
        running, waiting = hosts.status(), hosts.waiting()
        if as_json:
            common.print_json({"servers": [host.as_dict() for host in running], "waiting": waiting})
            return
        if not running and not waiting:
            common.stdout.print("No server is up, and no run waits for one.")
            return
        table = Table("model", "devices", "state", "pid", "up for", "used by", box=None, header_style="bold")
        for host in running:
            since = common.duration(time.time() - host.since)
            table.add_row(host.model, ", ".join(host.devices), _state(host), str(host.pid or ""), since, _users(host))
        common.stdout.print(table)
        for ticket in waiting:
            common.stdout.print(escape(_waiting(ticket)), soft_wrap=True)


def stop(
    model: Model = None,
    force: Annotated[bool, typer.Option(help="Also a server that runs use; they start another one.")] = False,
) -> None:
    """Stop servers that no run uses, and wait until they are gone. Exits 1 where one is left in use.

    Examples:

        vllm-batch engine stop

        vllm-batch engine stop qwen3-8b --force
    """
    with common.errors_for_people():
        hosts = Hosts(settings().runtime_root)
        chosen = _chosen(hosts, model)
        used = [host for host in chosen if host.leases and not force]
        stopping = [host for host in chosen if host not in used]
        hosts.stop([host.id for host in stopping], now=force)
        deadline = time.monotonic() + STOP_SECONDS
        ids = {host.id for host in stopping}
        while left := [host for host in hosts.status() if host.id in ids and not host.leases]:
            if time.monotonic() > deadline:
                raise InputRefused(f"{left[0].model} does not end; its host is process {left[0].pid}.")
            time.sleep(0.1)
        for host in stopping:
            common.stderr.print(f"Stopped {host.model}.")
        for host in used:
            common.stderr.print(f"{host.model} is in use by {_users(host)}; --force stops it all the same.")
        if not chosen:
            common.stderr.print("No server is up.")
    raise typer.Exit(Exit.WITH_ERRORS if used else Exit.OK)


def logs(
    model: Annotated[str | None, typer.Argument(help="A model. Left out: the server that was started last.")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of the last lines.")] = 50,
) -> None:
    """Print the end of a server's log, and on stderr where it is.

    Example:

        vllm-batch engine logs smollm2-135m -n 100
    """
    with common.errors_for_people():
        folder = settings().data_root / "logs" / "engines"
        running = [host for host in Hosts(settings().runtime_root).status() if model in (None, host.model)]
        files = sorted(folder.glob(f"{log_name(model) if model else '*'}.log"), key=lambda path: path.stat().st_mtime)
        file = Path(running[-1].log) if running else files[-1] if files else None
        if file is None or not file.is_file():
            raise InputRefused(f"No log of {model or 'a server'} in {folder}.")
        common.stderr.print(str(file), soft_wrap=True)
        text = file.read_text("utf-8", "replace").splitlines()[-lines:]
        common.stdout.print("\n".join(text), markup=False, soft_wrap=True)


def _chosen(hosts: Hosts, model: str | None) -> list[HostStatus]:
    running = hosts.status()
    if model is None:
        return running
    name = common.open_catalog().resolve(model) or model
    found = [host for host in running if host.model == name]
    if not found:
        raise InputRefused(f"No server of `{model}` is up; `vllm-batch engine status` shows those that are.")
    return found


def _state(host: HostStatus) -> str:
    if host.idle_for is None or host.state not in ("ready", "asleep"):
        return host.state
    return f"{'idle' if host.state == 'ready' else host.state}, stops in {common.duration(host.stops_in or 0)}"


def _users(host: HostStatus) -> str:
    return ", ".join(f"{lease.get('who')}{' (alone)' * bool(lease.get('alone'))}" for lease in host.leases)


def _waiting(ticket: dict[str, Any]) -> str:
    since = common.duration(time.time() - ticket.get("since", time.time()))
    return f"{ticket.get('who')} waits {since} for {ticket.get('model')}: {ticket.get('why')}"
