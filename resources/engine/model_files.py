"""A model's files, looked at without loading them: are they there, do they fit, and how they are fetched."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from resources.engine.catalog import ModelEntry
from resources.errors import EngineError

_BYTES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}
_GPU_SHARE = 0.9  # vLLM's gpu_memory_utilization where the entry does not say


@dataclass(frozen=True)
class Need:
    """Bytes on each device: of weights, and of the KV cache for one request of the longest kind. Activations come on
    top (some percent), so what does not fit by this does not fit."""

    weights: int
    cache: int

    @property
    def total(self) -> int:
        return self.weights + self.cache


def model_folder(entry: ModelEntry) -> Path | None:
    """Where the files are: the folder of the entry, or what the hub's cache holds of its id and revision."""
    if entry.local_source:
        return entry.local_source if (entry.local_source / "config.json").is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(str(entry.source), "config.json", revision=entry.revision)
    return Path(found).parent if isinstance(found, str) else None


def missing_files(folder: Path) -> list[str]:
    """Weight files that an index names and that are not there; or that there are none at all."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_bytes())["weight_map"].values())
        return sorted(name for name in named if not (folder / name).exists())
    return [] if _weight_files(folder) else ["*.safetensors"]


def memory_needed(entry: ModelEntry, folder: Path) -> Need:
    """By the sizes of the weight files and by config.json, for the dtype and the length that the entry asks for."""
    config = json.loads((folder / "config.json").read_bytes())
    config = config.get("text_config") or config
    arguments = {key.lstrip("-").replace("-", "_"): value for key, value in entry.engine_args.items()}
    stored = _BYTES.get(str(config.get("torch_dtype") or config.get("dtype")), 2)
    asked = _BYTES.get(str(arguments.get("dtype")), stored)
    quantized = bool(config.get("quantization_config")) or bool(arguments.get("quantization"))
    weights = sum(path.stat().st_size for path in _weight_files(folder))
    weights = weights if quantized else weights * asked // stored
    return Need(weights // entry.devices_needed, _cache(config, arguments, asked) // entry.devices_needed)


def device_memory(entry: ModelEntry, gpus: bool) -> int:
    """Bytes that a server may use on one device: of the smallest GPU, or of this machine."""
    if not gpus:
        return psutil.virtual_memory().total
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        share = float(entry.engine_args.get("gpu_memory_utilization", _GPU_SHARE))
        return int(min(int(line) for line in lines) * 1024 * 1024 * share)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise EngineError(f"nvidia-smi does not tell the memory of the GPUs ({error})") from None


def pull(entry: ModelEntry) -> Path:
    """Have the files of a hub id here, at its revision; shows progress on stderr. Goes on with a part that is there.

    Raises:
        EngineError: the hub does not answer, or has no such model or revision, or wants a token.
    """
    if entry.local_source:
        raise EngineError(f"`{entry.name}` is the folder {entry.local_source}; there is nothing to pull.")
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = f"{entry.source}" + (f" at {entry.revision}" if entry.revision else "")
    try:
        return Path(snapshot_download(str(entry.source), revision=entry.revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError, OSError, ValueError) as error:
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        raise EngineError(f"{wanted} cannot be fetched from {endpoint}: {str(error).splitlines()[0]}") from None


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")) or sorted(folder.glob("*.gguf"))


def _cache(config: dict[str, Any], arguments: dict[str, Any], width: int) -> int:
    """Keys and values of every layer, for one request of the greatest length."""
    heads = int(config.get("num_attention_heads") or 0)
    if not heads:
        return 0
    size = int(config.get("head_dim") or config.get("hidden_size", 0) // heads)
    kept = int(config.get("num_key_value_heads") or heads)
    length = arguments.get("max_model_len") or config.get("max_position_embeddings") or 0
    length = length if isinstance(length, int) else int(config.get("max_position_embeddings") or 0)
    return 2 * int(config.get("num_hidden_layers") or 0) * kept * size * width * length
