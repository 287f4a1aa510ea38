"""The settings of the project: one typed object, read from the environment and `.env`, and read nowhere else."""

import difflib
import os
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from resources.errors import SettingsError
from resources.filesystem import private_folder

PREFIX = "VLLM_BATCH_"


class Settings(BaseSettings):
    """Every setting, with its environment variable, meaning and default.

    Names carry the prefix ``VLLM_BATCH_`` in the environment, except for ``DAGSTER_HOME`` and
    ``DAGSTER_POSTGRES_URL``, which are Dagster's own.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_file=".env", env_file_encoding="utf-8", extra="ignore", frozen=True
    )

    data: Path = Field(Path("data"), description="Data root: batches, the inbox, Dagster's home. A local file system.")
    inbox: Path | None = Field(None, description="Folder watched for dropped files. Default: <data>/inbox.")
    input_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description="Further folders that register_files may read, separated by ':'."
    )
    models_file: Path = Field(Path("models.yaml"), description="The model catalog.")
    targets_file: Path = Field(
        Path("targets.yaml"), description="Named webhooks, exports and Label Studio projects. None where it is missing."
    )
    webhook_url: SecretStr | None = Field(None, description="The webhook `default`, which hears of every batch.")
    webhook_secret: SecretStr | None = Field(None, description="Its secret: `whsec_` and base64 of 24 to 64 bytes.")
    enable_webhooks: bool | None = Field(
        None, description="Whether events are sent. Default: where a webhook is defined."
    )
    result_handlers: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Classes that get the results of each batch, `module:Class`, separated by commas."
    )
    handler_timeout: float = Field(3600, gt=0, description="Seconds that a handler may take for a batch.")
    poll_seconds: int = Field(5, ge=1, le=3600, description="How often the inbox is looked at, in seconds.")
    night_cron: str = Field("0 22 * * *", description="When the schedule inbox_at_night takes the inbox (cron).")
    port: int = Field(3000, ge=0, le=65535, description="Port of the web UI on 127.0.0.1; 0 takes a free one.")
    runtime_dir: Path | None = Field(
        None,
        description="Sockets, device locks and process state; short path, private. Default: /tmp/vllm-batch-<uid>.",
    )
    label_studio_url: str | None = Field(
        None, pattern=r"^https?://[^\s/]", description="Label Studio, where people review results."
    )
    label_studio_api_key: SecretStr | None = Field(None, description="Its personal access token, or a legacy token.")
    label_studio_project: str | None = Field(
        None, min_length=1, description="Project for batches that name no target. Default: they are not reviewed."
    )
    label_studio_port: int = Field(
        8080, ge=1, le=65535, description="Port of the local Label Studio (`up --with-curation`, `make label-studio`)."
    )
    enable_curation: bool | None = Field(
        None, description="Label Studio import and gold stars. Default: on where a Label Studio is set."
    )
    enable_monitoring: bool = Field(
        False, description="Observe disk, model servers, runs and what waits, every five minutes."
    )
    dagster_home: Path | None = Field(
        None, validation_alias="DAGSTER_HOME", description="Dagster's home. Default: <data>/dagster."
    )
    dagster_postgres_url: SecretStr | None = Field(
        None,
        validation_alias="DAGSTER_POSTGRES_URL",
        description="PostgreSQL of the Dagster instance. Default: an embedded server owned by `vllm-batch up`.",
    )

    @field_validator("input_roots", mode="before")
    @classmethod
    def _split_roots(cls, value: object) -> object:
        return tuple(part for part in value.split(os.pathsep) if part) if isinstance(value, str) else value

    @field_validator("webhook_url", "webhook_secret", "enable_webhooks", "enable_curation", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("result_handlers", mode="before")
    @classmethod
    def _split_handlers(cls, value: object) -> object:
        parts = value.split(",") if isinstance(value, str) else None
        return value if parts is None else tuple(part.strip() for part in parts if part.strip())

    @property
    def data_root(self) -> Path:
        return self.data.expanduser().resolve()

    @property
    def inbox_dir(self) -> Path:
        return (self.inbox.expanduser().resolve()) if self.inbox else self.data_root / "inbox"

    @property
    def dagster_home_dir(self) -> Path:
        return self.dagster_home.expanduser().resolve() if self.dagster_home else self.data_root / "dagster"

    @property
    def runtime_root(self) -> Path:
        """Private folder (0700) for sockets and locks. Short, since a Unix socket's path holds 107 bytes."""
        root = self.runtime_dir.expanduser() if self.runtime_dir else Path(f"/tmp/vllm-batch-{os.getuid()}")
        return private_folder(root)


def load_settings() -> Settings:
    """Read the settings anew.

    Raises:
        SettingsError: a value does not fit, or a ``VLLM_BATCH_*`` variable is not a setting (with the nearest name).
    """
    known = {str(f.validation_alias or f"{PREFIX}{name.upper()}") for name, f in Settings.model_fields.items()}
    given = {name for name in os.environ if name.startswith(PREFIX)} | _names_in_dotenv()
    for name in sorted(given - known):
        plain = name.removeprefix(PREFIX)
        near = [plain] if plain in known else difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else f" Known settings: {', '.join(sorted(known))}."
        raise SettingsError(f"Unknown setting {name}.{hint}")
    try:
        return Settings()
    except ValidationError as error:
        lines = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()]
        raise SettingsError("Settings that do not fit: " + "; ".join(lines)) from None


@lru_cache(maxsize=1)
def settings() -> Settings:
    """The settings of this process, read once."""
    return load_settings()


def _names_in_dotenv() -> set[str]:
    env_file = Path(".env")
    if not env_file.is_file():
        return set()
    names = (line.removeprefix("export ").split("=", 1)[0].strip() for line in env_file.read_text("utf-8").splitlines())
    return {name.upper() for name in names if name.upper().startswith(PREFIX)}
