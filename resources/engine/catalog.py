"""The model catalog: `models.yaml`, the one place where models and engines are named.

models:
  my-model:
    engine: vllm                     # vllm (default) | openai | "null"
    source: org/name                 # hub id, or a folder (relative to this file)
    revision: main                   # of a hub id
    engine_args: {max_model_len: 4096}
    env: {VLLM_LOGGING_LEVEL: INFO}  # of the server process
    aliases: [my-alias]
    defaults: {temperature: 0}       # body fields for requests that do not set them
    concurrency: 64                  # requests in flight; left out, as many as the server takes
    keep_alive: 300                  # seconds that the server stays after the last run that used it
    residency: sleep                 # what it does when another model needs its GPU: stop (default) | sleep
    adapters:                        # LoRA adapters over this model: names that requests may use, served by its server
      my-model-legal: ./adapters/legal
"""

import difflib
import re
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from resources.batch_format.options import UniqueKeyLoader
from resources.errors import CatalogError

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._/:-]{0,119}$"


def local_folder(source: str) -> Path | None:
    """The folder where a source is a path, not a hub id."""
    return Path(source).expanduser() if source.startswith(("/", "./", "../", "~")) else None


class EngineKind(StrEnum):
    VLLM = "vllm"
    OPENAI = "openai"
    NULL = "null"


class Residency(StrEnum):
    """What an idle vLLM server does to make room on its device."""

    STOP = "stop"
    SLEEP = "sleep"


class ModelEntry(BaseModel):
    """One model of the catalog. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=NAME_PATTERN)
    engine: EngineKind = EngineKind.VLLM
    source: str | None = Field(None, description="Hub id or folder (vllm); the model's name at the endpoint (openai).")
    revision: str | None = None
    engine_args: dict[str, Any] = Field(default_factory=dict, description="Arguments of vLLM's server, as they are.")
    env: dict[str, str] = Field(default_factory=dict, description="Environment of the server process.")
    allowed_media_domains: tuple[str, ...] = Field(
        (), description="Domains the server may fetch media from; none by default."
    )
    base_url: str | None = Field(None, description="openai: URL up to and including /v1.")
    api_key_env: str | None = Field(None, description="openai: name of the environment variable with the key.")
    aliases: tuple[str, ...] = ()
    adapters: dict[str, str] = Field(
        default_factory=dict, description="vllm: LoRA adapters over this model, name to folder or hub id."
    )
    defaults: dict[str, Any] = Field(default_factory=dict)
    concurrency: int | None = Field(
        None, ge=1, le=4096, description="Requests in flight. Default: as many as the server says it takes, or 64."
    )
    startup_timeout: float = Field(900, gt=0, description="Seconds a vLLM server may take to come up.")
    keep_alive: float = Field(300, ge=0, description="Seconds a vLLM server is kept after the last run that used it.")
    residency: Residency = Field(
        Residency.STOP, description="vllm: whether the server stops or sleeps when another model needs its GPU."
    )

    @field_validator("engine", mode="before")
    @classmethod
    def _yaml_null(cls, value: object) -> object:
        """`engine: null` is None to a YAML parser; a person who writes it means the null engine."""
        return EngineKind.NULL if value is None else value

    @field_validator("env", mode="before")
    @classmethod
    def _env_as_text(cls, value: object) -> object:
        return {k: str(v) for k, v in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _fields_of_the_engine(self) -> "ModelEntry":
        if self.engine is EngineKind.VLLM and not self.source:
            raise ValueError("engine vllm needs `source`: a hub id or a folder")
        if self.engine is EngineKind.OPENAI and not self.base_url:
            raise ValueError("engine openai needs `base_url`, for example http://127.0.0.1:8000/v1")
        if self.engine is not EngineKind.VLLM and (self.engine_args or self.revision or self.env or self.adapters):
            raise ValueError("`engine_args`, `revision`, `env` and `adapters` are for engine vllm alone")
        if self.engine is not EngineKind.VLLM and self.residency is Residency.SLEEP:
            raise ValueError("`residency: sleep` is for engine vllm alone")
        if bad := [name for name in self.adapters if not re.match(NAME_PATTERN, name)]:
            raise ValueError(f"`{bad[0]}` is no name for an adapter")
        secret = sorted(
            name for name in self.engine_args if re.search(r"(token|api.?key|password|secret)$", name, re.I)
        )
        if secret:
            raise ValueError(
                f"`engine_args` would show `{secret[0]}` in files and process lists; put it in the environment"
            )
        if self.base_url and "?" in self.base_url:
            raise ValueError("`base_url` must not have a query; a key goes into the variable that `api_key_env` names")
        if self.engine is not EngineKind.OPENAI and (self.base_url or self.api_key_env):
            raise ValueError("`base_url` and `api_key_env` are for engine openai alone")
        return self

    @property
    def served_name(self) -> str:
        """The name the engine knows the model by."""
        return self.source if self.engine is EngineKind.OPENAI and self.source else self.name

    @property
    def most_running(self) -> int | None:
        """How many requests a vLLM server runs at once, where the entry says so."""
        return self._number("max-num-seqs")

    @property
    def devices_needed(self) -> int:
        """How many GPUs a vLLM server takes. What is no number is left to vLLM to explain."""
        return self._number("tensor-parallel-size") or 1

    def _number(self, argument: str) -> int | None:
        said = {key.lstrip("-").replace("_", "-"): value for key, value in self.engine_args.items()}.get(argument)
        return said if isinstance(said, int) and said > 0 else None

    @property
    def server_entry(self) -> "ModelEntry":
        """The entry whose server answers for this one."""
        return self

    @property
    def local_source(self) -> Path | None:
        """The model's folder where `source` is a path, not a hub id."""
        return local_folder(self.source) if self.engine is EngineKind.VLLM and self.source else None


class AdapterEntry(ModelEntry):
    """A LoRA adapter, as a model of its own: asked for by its name, answered by its base model's server."""

    base: ModelEntry
    adapter: str

    @property
    def server_entry(self) -> ModelEntry:
        return self.base


def _with_adapters(entries: list[ModelEntry]) -> Iterator[ModelEntry]:
    for entry in entries:
        yield entry
        fields = entry.model_dump() | {"aliases": (), "adapters": {}}
        for name, path in entry.adapters.items():
            yield AdapterEntry(**(fields | {"name": name}), base=entry, adapter=path)


class Catalog:
    """The models by name and alias, adapters among them."""

    def __init__(self, entries: list[ModelEntry], origin: str = "catalog") -> None:
        self.origin = origin
        entries = list(_with_adapters(entries))
        self.entries = {entry.name: entry for entry in entries}
        self._names: dict[str, str] = {}
        for entry in entries:
            for name in (entry.name, *entry.aliases):
                if name in self._names:
                    raise CatalogError(
                        f"{origin}: the name `{name}` of model `{entry.name}` is taken by model `{self._names[name]}`; "
                        "names and aliases are unique over the whole catalog."
                    )
                self._names[name] = entry.name

    @property
    def names(self) -> dict[str, str]:
        """Every name a request may use, aliases included, with the model that it stands for."""
        return dict(self._names)

    def resolve(self, name: str) -> str | None:
        """The catalog name behind a name or alias; None where there is none."""
        return self._names.get(name)

    def get(self, name: str) -> ModelEntry:
        found = self._names.get(name)
        if found is None:
            raise CatalogError(f"{self.origin}: {self.unknown(name)}")
        return self.entries[found]

    def unknown(self, name: str) -> str:
        """What to tell a person who asked for a model that is not here."""
        near = difflib.get_close_matches(name[:120], self._names, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"it holds: {', '.join(sorted(self.entries)) or 'nothing'}."
        return f"model `{name[:120]}` is not in the catalog; {hint}"

    def problems(self) -> dict[str, str]:
        """What would keep a model from starting, by name, as far as files tell. Loads nothing."""
        found: dict[str, str] = {}
        for entry in self.entries.values():
            folder = entry.local_source
            if folder and not (folder / "config.json").is_file():
                found[entry.name] = f"no model at {folder} (config.json is not there)"
            own = local_folder(entry.adapter) if isinstance(entry, AdapterEntry) else None
            if own and not (own / "adapter_config.json").is_file():
                found[entry.name] = f"no adapter at {own} (adapter_config.json is not there)"
        return found


def load_catalog(path: Path) -> Catalog:
    """Read a catalog file.

    Raises:
        CatalogError: the file is missing or not YAML, a key is unknown, a value does not fit, a name stands twice.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeyLoader)
    except FileNotFoundError:
        raise CatalogError(f"No model catalog at {path}. Set VLLM_BATCH_MODELS_FILE or write one.") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CatalogError(f"{path} is not readable as YAML: {error}") from None
    if not isinstance(document, dict) or set(document) != {"models"} or not isinstance(document["models"], dict):
        raise CatalogError(f"{path} must hold exactly one key, `models`, with a mapping of name to model.")
    return Catalog([_entry(path, name, fields) for name, fields in document["models"].items()], origin=str(path))


def _entry(path: Path, name: object, fields: object) -> ModelEntry:
    if not isinstance(fields, dict):
        raise CatalogError(f"{path}: model `{name}` must be a mapping, not {type(fields).__name__}.")
    if not all(isinstance(key, str) for key in fields):
        raise CatalogError(f"{path}: model `{name}`: keys must be text.")
    if "name" in fields:
        raise CatalogError(f"{path}: model `{name}`: unknown key `name` (the key above it is the name).")
    fields = {**fields, "source": _beside(path, fields.get("source"))} if "source" in fields else fields
    if isinstance(fields.get("adapters"), dict):
        fields = {**fields, "adapters": {key: _beside(path, value) for key, value in fields["adapters"].items()}}
    try:
        return ModelEntry(name=str(name), **fields)
    except ValidationError as error:
        raise CatalogError(f"{path}: model `{name}`: " + "; ".join(_explain(e) for e in error.errors())) from None


def _beside(path: Path, source: object) -> object:
    """A relative path is one relative to the catalog's file."""
    return str((path.parent / source).resolve()) if isinstance(source, str) and source[:2] in ("./", "..") else source


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, ModelEntry.model_fields, n=1)
        return f"unknown key `{key}`" + (f" (did you mean `{near[0]}`?)" if near else "")
    return f"{key}: {error['msg']}" if key else str(error["msg"]).removeprefix("Value error, ")
