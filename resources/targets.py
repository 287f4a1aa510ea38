"""Targets: `targets.yaml`, the one place where webhooks, exports and Label Studio projects are defined.

A batch names a target and can never define one, since whoever drops a file is not trusted with URLs and paths. A secret
in the file is only ever `${NAME_OF_A_VARIABLE}`; its value is read from the environment when the file is loaded and is
shown nowhere.

webhooks:
  ops: {url: https://example.org/hook, secret: "${OPS_SECRET}"}
exports:
  lake: {url: s3://bucket/batches, format: parquet}
  warehouse: {url: "${WAREHOUSE_URL}", table: llm_results}

The settings VLLM_BATCH_WEBHOOK_URL and VLLM_BATCH_WEBHOOK_SECRET define one more webhook, `default`, that hears of
every batch.
"""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from resources.batch_format.options import BatchOptions, UniqueKeyLoader
from resources.errors import OptionsError, SettingsError
from resources.exports.targets import ExportTarget
from resources.label_studio.target import ReviewTarget
from resources.settings import Settings
from resources.webhooks.target import WebhookTarget

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_PASSWORD_IN_URL = re.compile(r"://[^/@\s]*:[^/@\s]+@")


class Targets(BaseModel):
    """All targets by section and name. A section is a field here; its key in the file is the field's name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    webhooks: dict[str, WebhookTarget] = Field(default_factory=dict)
    exports: dict[str, ExportTarget] = Field(default_factory=dict)
    label_studio: dict[str, ReviewTarget] = Field(default_factory=dict)

    def names(self, section: str) -> list[str]:
        """The names of a section; none where there is no such section."""
        return sorted(getattr(self, section, {}))

    def refuse_unknown(self, options: BatchOptions, origin: str) -> None:
        """Raises OptionsError where a batch names a target that is not defined."""
        for option, section, names in options.targets():
            known = self.names(section)
            for name in names:
                if name in known:
                    continue
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(known) or 'none'}."
                raise OptionsError(
                    f"{origin}: option `{option}`: no target `{name[:80]}` in `{section}` of the targets file; {hint}"
                )


def load_targets(path: Path, environ: Mapping[str, str] = os.environ) -> Targets:
    """Read a targets file; a file that is not there defines none.

    Raises:
        SettingsError: not YAML, an unknown section or key, a value that does not fit, a variable that is not set. Names
            the file, the target and the key, and shows no value.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeyLoader)
    except FileNotFoundError:
        return Targets()
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} is not readable as YAML: {error}") from None
    if document is None:
        return Targets()
    if not isinstance(document, dict):
        raise SettingsError(f"{path} must hold a mapping of section to targets.")
    sections: dict[str, Any] = {}
    for section, targets in document.items():
        if section not in Targets.model_fields:
            known = ", ".join(Targets.model_fields) or "none"
            raise SettingsError(f"{path}: unknown section `{section}`; sections are: {known}.")
        if not isinstance(targets, dict):
            raise SettingsError(f"{path}: `{section}` must be a mapping of name to target.")
        sections[section] = {
            str(name): {"name": str(name), **_fields(path, f"{section}.{name}", fields, environ)}
            for name, fields in targets.items()
        }
    try:
        return Targets(**sections)
    except ValidationError as error:
        raise SettingsError(f"{path}: " + "; ".join(_explain(e) for e in error.errors())) from None


def all_targets(settings: Settings) -> Targets:
    """The targets of the file that the settings name, and those that the settings themselves define.

    Raises:
        SettingsError: as `load_targets`; or half a webhook is set, one is named `default` in the file too, or webhooks
            are to be on and there is none.
    """
    targets = load_targets(settings.targets_file)
    url, secret = settings.webhook_url, settings.webhook_secret
    if url is None and secret is None:
        if settings.enable_webhooks and not targets.webhooks:
            raise SettingsError(
                f"VLLM_BATCH_ENABLE_WEBHOOKS is on, and no webhook is defined: {settings.targets_file} has none, and "
                "VLLM_BATCH_WEBHOOK_URL is not set."
            )
        return targets
    if url is None or secret is None:
        missing = "WEBHOOK_URL" if url is None else "WEBHOOK_SECRET"
        raise SettingsError(
            f"VLLM_BATCH_{missing} is missing: the webhook `default` needs both, its URL and its secret."
        )
    if "default" in targets.webhooks:
        raise SettingsError(f"{settings.targets_file}: `webhooks.default` is defined by VLLM_BATCH_WEBHOOK_URL too.")
    try:
        default = WebhookTarget(name="default", url=url, secret=(secret,), all_batches=True)
    except ValidationError as error:
        raise SettingsError("VLLM_BATCH_WEBHOOK_URL: " + "; ".join(_explain(e) for e in error.errors())) from None
    return targets.model_copy(update={"webhooks": {**targets.webhooks, "default": default}})


def webhooks_enabled(settings: Settings) -> bool:
    """Whether events are sent: as the settings say, or else where a webhook is defined."""
    return has_targets(settings, "webhooks") if settings.enable_webhooks is None else settings.enable_webhooks


def has_targets(settings: Settings, section: str) -> bool:
    """Whether a section defines anything.

    Targets that cannot be read count as some: who uses them says what is wrong, and a batch runs on without.
    """
    try:
        return bool(all_targets(settings).names(section))
    except SettingsError:
        return True


def _fields(path: Path, where: str, fields: object, environ: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
        raise SettingsError(f"{path}: `{where}` must be a mapping of key to value.")
    if "name" in fields:
        raise SettingsError(f"{path}: `{where}`: unknown key `name` (the key above it is the name).")
    return {key: _filled(path, f"{where}.{key}", value, environ) for key, value in fields.items()}


def _filled(path: Path, where: str, value: Any, environ: Mapping[str, str]) -> Any:
    """The value with `${NAME}` filled in from the environment, in lists and mappings too."""
    if isinstance(value, dict):
        return {key: _filled(path, f"{where}.{key}", item, environ) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(path, where, item, environ) for item in value]
    if not isinstance(value, str):
        return value
    if _PASSWORD_IN_URL.search(_VARIABLE.sub("", value)):
        raise SettingsError(f"{path}: `{where}` holds a password; put it in a variable and write ${{ITS_NAME}} here.")

    def fill(match: re.Match[str]) -> str:
        if not environ.get(match[1]):
            raise SettingsError(f"{path}: `{where}` needs the environment variable {match[1]}, which is not set.")
        return environ[match[1]]

    return _VARIABLE.sub(fill, value)


def _explain(error: Any) -> str:
    """Where and what, without the value: it may be a secret."""
    where = ".".join(str(part) for part in error["loc"])
    said = str(error["msg"]).removeprefix("Value error, ")
    return f"`{where}`: {said}" if where else said
