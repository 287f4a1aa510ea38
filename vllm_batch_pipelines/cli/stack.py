"""`vllm-batch up` and `down`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

from resources.errors import BatchError, SettingsError
from resources.label_studio import local_server
from resources.settings import Settings, load_settings


def up(
    port: Annotated[
        int | None, typer.Option(help="Port of the web UI on 127.0.0.1; 0 takes a free one. Default: VLLM_BATCH_PORT.")
    ] = None,
    enable_webhooks: Annotated[
        bool, typer.Option("--enable-webhooks", help="Send events; an error where no webhook is defined.")
    ] = False,
    enable_curation: Annotated[
        bool, typer.Option("--enable-curation", help="Review results; an error where no Label Studio is set.")
    ] = False,
    with_curation: Annotated[
        bool, typer.Option("--with-curation", help="Start a local Label Studio too, and review results there.")
    ] = False,
    enable_monitoring: Annotated[
        bool, typer.Option("--enable-monitoring", help="Note disk, servers, runs and what waits every five minutes.")
    ] = False,
    workspace: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A workspace file of your own, with further locations."),
    ] = None,
) -> None:
    """Start PostgreSQL (or use yours), the web UI and the daemon, and keep them running until Ctrl-C.

    Ctrl-C interrupts runs in progress, which keep what is finished, and stops every process; pressed twice, at once.

    Examples:

        vllm-batch up --port 3001

        vllm-batch up --with-curation
    """
    from vllm_batch_pipelines.stack import Stack

    flags = {"WEBHOOKS": enable_webhooks, "CURATION": enable_curation or with_curation, "MONITORING": enable_monitoring}
    for name in (name for name, is_on in flags.items() if is_on):
        os.environ[f"VLLM_BATCH_ENABLE_{name}"] = "true"  # for the web server, the daemon and every run
    with _errors_for_people():
        if with_curation:
            _set_local_label_studio(load_settings())
        settings = load_settings()
        if port is not None:
            settings = settings.model_copy(update={"port": port})
        Stack(settings, workspace, _say, with_label_studio=with_curation).run()


def _set_local_label_studio(settings: Settings) -> None:
    """Have this process and all that it starts use the local Label Studio."""
    if not local_server.is_installed():
        raise SettingsError("Label Studio is not installed. Once, for about 4 minutes and 1 GB: make label-studio-venv")
    url, folder = local_server.address(settings.label_studio_port), local_server.data_folder(settings)
    if settings.label_studio_url not in (None, url):
        raise SettingsError(
            f"VLLM_BATCH_LABEL_STUDIO_URL is {settings.label_studio_url}: start without --with-curation to use that "
            "server, or take the setting out to use a local one."
        )
    local_server.copy_of_empty(folder)
    os.environ["VLLM_BATCH_LABEL_STUDIO_URL"] = url
    os.environ["VLLM_BATCH_LABEL_STUDIO_API_KEY"] = local_server.Account.of(folder).token
    os.environ["VLLM_BATCH_LABEL_STUDIO_PROJECT"] = settings.label_studio_project or local_server.PROJECT


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
