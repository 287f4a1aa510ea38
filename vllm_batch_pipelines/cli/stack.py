"""`vllm-batch up` and `down`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

from resources.errors import BatchError, SettingsError
from resources.settings import load_settings


def up(
    port: Annotated[
        int | None, typer.Option(help="Port of the web UI on 127.0.0.1; 0 takes a free one. Default: VLLM_BATCH_PORT.")
    ] = None,
    enable_webhooks: Annotated[
        bool, typer.Option("--enable-webhooks", help="Send events; an error where no webhook is defined.")
    ] = False,
    workspace: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A workspace file of your own, with further locations."),
    ] = None,
) -> None:
    """Start PostgreSQL (or use yours), the web UI and the daemon, and keep them running until Ctrl-C.

    Ctrl-C interrupts runs in progress, which keep what is finished, and stops every process; pressed twice, at once.

    Example: vllm-batch up --port 3001
    """
    from vllm_batch_pipelines.stack import Stack

    if enable_webhooks:
        os.environ["VLLM_BATCH_ENABLE_WEBHOOKS"] = "true"  # for the web server, the daemon and every run
    with _errors_for_people():
        settings = load_settings()
        if port is not None:
            settings = settings.model_copy(update={"port": port})
        Stack(settings, workspace, _say).run()


def down() -> None:
    """Stop the running `vllm-batch up` of this data root, or what a killed one has left.

    Example: vllm-batch down
    """
    from vllm_batch_pipelines.stack import stop_stack

    with _errors_for_people():
        settings = load_settings()
        was_running = stop_stack(settings, _say)
        _say("Stopped." if was_running else f"Nothing runs for {settings.data_root}.")


def _say(text: str) -> None:
    # A closed terminal must not keep the stack from stopping.
    with suppress(OSError):
        typer.echo(text, err=True)


@contextmanager
def _errors_for_people() -> Iterator[None]:
    try:
        yield
    except BatchError as error:
        _say(f"Error: {error}")
        raise typer.Exit(2 if isinstance(error, SettingsError) else 1) from None


def register(app: typer.Typer) -> None:
    """Add the commands, and `start` and `stop` as other names for them."""
    app.command("up")(up)
    app.command("down")(down)
    app.command("start", hidden=True)(up)
    app.command("stop", hidden=True)(down)
