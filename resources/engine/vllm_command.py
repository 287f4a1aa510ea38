"""What is started for a catalog entry: the command line and the environment of vLLM's server."""

import json
import os
import re
import sys
from collections.abc import Mapping

from resources.engine.catalog import ModelEntry
from resources.errors import CatalogError

# -P: the folder we were started in must not lend its modules to the server.
VLLM_COMMAND = (sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server")

_OURS = ("uds", "host", "port", "model", "served-model-name", "revision", "api-key", "ssl-keyfile", "ssl-certfile")
_NOT_PASSED_ON = re.compile(r"^(VLLM_BATCH_|DAGSTER_|LABEL_STUDIO_|PG)|(_API_KEY|PASSWORD|DATABASE_URL)$")


def server_arguments(entry: ModelEntry) -> list[str]:
    """The command line of vLLM's server for an entry, without the socket.

    Raises:
        CatalogError: `engine_args` holds one that is ours to set.
    """
    assert entry.source
    arguments = ["--model", str(entry.local_source or entry.source)]
    arguments += ["--served-model-name", entry.name, *entry.aliases]
    if entry.revision:
        arguments.append(f"--revision={entry.revision}")
    # An empty list means all domains to vLLM. `.invalid` is never a domain (RFC 2606).
    arguments += ["--allowed-media-domains", *(entry.allowed_media_domains or ("none.invalid",))]
    arguments += ["--enable-request-id-headers", "--disable-uvicorn-access-log"]
    if entry.adapters:
        modules = [json.dumps({"name": name, "path": path}) for name, path in entry.adapters.items()]
        arguments += ["--enable-lora", "--lora-modules", *modules]
    for key, value in entry.engine_args.items():
        arguments += _argument(entry.name, key, value)
    return arguments


def _argument(model: str, key: str, value: object) -> list[str]:
    head, dot, field = key.partition(".")  # `compilation_config.mode: 3` is one field of a JSON argument
    name = head.lstrip("-").replace("_", "-")
    if name in _OURS:
        raise CatalogError(f"model `{model}`: `engine_args.{key}` is set by the server's owner; take it out.")
    flag = f"--{name}{dot}{field}"
    if isinstance(value, bool) and not dot:
        return [flag if value else f"--no-{name}"]
    if isinstance(value, dict) or dot or name in ("allowed-origins", "allowed-methods", "allowed-headers"):
        return [f"{flag}={value if isinstance(value, str) else json.dumps(value)}"]
    if isinstance(value, list):
        texts = [json.dumps(item) if isinstance(item, dict | list) else str(item) for item in value]
        return [f"{flag}={text}" for text in texts] if name == "middleware" else [flag, *texts]
    return [f"{flag}={value}"]


def server_environment(entry: ModelEntry, environ: Mapping[str, str]) -> dict[str, str]:
    """Our environment without secrets that are not the server's, what vLLM needs here, and the entry's own on top."""
    environment = {name: value for name, value in environ.items() if not _NOT_PASSED_ON.search(name)}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    environment.setdefault("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")  # else an allowed domain may send it anywhere
    if entry.local_source:
        environment["HF_HUB_OFFLINE"] = "1"
    return environment | entry.env


NO_SLEEP_ON_CPU = "vLLM's sleep mode needs a GPU; here the server stops to make room"
# Errors are logged with what they hold unless we say otherwise: the development mode turns that on.
SLEEP_ARGUMENTS = ("--enable-sleep-mode", "--no-log-error-stack")
# Opens vLLM's development endpoints, sleep and wake among them: to the owner of the socket's folder alone.
SLEEP_ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}


def cpu_environment(entry: ModelEntry) -> dict[str, str]:
    """What vLLM on a CPU needs where nobody says otherwise: 2 GiB of KV cache, a thread on each CPU we may use."""
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2"}
    if entry.devices_needed == 1:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0)))
    return environment
