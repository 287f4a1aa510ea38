"""Where a target's Label Studio is, put together from `targets.yaml` and the settings; and whether there is any."""

from dataclasses import dataclass, field

from pydantic import SecretStr

from resources.batch_format.options import BatchOptions
from resources.errors import SettingsError
from resources.label_studio.schema import CurationSchema, load_schema
from resources.label_studio.target import ReviewTarget
from resources.settings import PREFIX, Settings
from resources.targets import Targets

DEFAULT = "default"


@dataclass(frozen=True)
class Connection:
    """One project of one server, with the schema that its results are reviewed by. `name` is the target's."""

    name: str
    url: str
    project: str
    schema: CurationSchema
    api_key: SecretStr = field(repr=False)
    timeout: float = 60


def is_curation_on(settings: Settings, has_targets: bool) -> bool:
    """Whether results are reviewed at all. `has_targets`: some are defined in the targets file.

    Raises:
        SettingsError: it was asked for, and no Label Studio is set.
    """
    is_set = has_targets or (settings.label_studio_url and settings.label_studio_project) is not None
    if settings.enable_curation and not is_set:
        raise SettingsError(
            f"{PREFIX}ENABLE_CURATION is set, but no Label Studio: set {PREFIX}LABEL_STUDIO_URL, "
            f"{PREFIX}LABEL_STUDIO_API_KEY and {PREFIX}LABEL_STUDIO_PROJECT, or `label_studio` in the targets file. "
            "`make label-studio` starts a server and prints what to set."
        )
    return is_set and settings.enable_curation is not False


def target_of(options: BatchOptions, settings: Settings) -> str | None:
    """The name of the target that a batch is reviewed in: its own, else the default one where a project is set."""
    return options.label_studio or (DEFAULT if settings.label_studio_project else None)


def target_names(settings: Settings, targets: Targets) -> list[str]:
    """All targets that there are."""
    names = set(targets.names("label_studio"))
    if settings.label_studio_project and settings.label_studio_url:
        names.add(DEFAULT)
    return sorted(names)


def connection_of(name: str, settings: Settings, targets: Targets) -> Connection:
    """The connection of a target.

    Raises:
        SettingsError: no such target, or its address, token, project or schema is set nowhere.
    """
    target = targets.label_studio.get(name)
    if target is None and name != DEFAULT:
        raise SettingsError(f"No target `{name}` in `label_studio` of the targets file.")
    target = target or ReviewTarget(name=name)
    url = target.url or settings.label_studio_url
    api_key = target.api_key or settings.label_studio_api_key
    project = target.project or settings.label_studio_project
    missing = {"url": url, "api_key": api_key, "project": project}
    for key, value in missing.items():
        if value is None:
            raise SettingsError(
                f"Label Studio target `{name}` has no `{key}`: set it in the targets file, or "
                f"{PREFIX}LABEL_STUDIO_{key.upper()}."
            )
    assert url is not None and api_key is not None and project is not None  # noqa: PT018
    schema = load_schema(target.curation_schema)
    return Connection(name, url.rstrip("/"), project, schema, api_key, target.timeout)
